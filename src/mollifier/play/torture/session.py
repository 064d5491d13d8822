"""One torture from the first order to closed accounts, on an embedded stack of its own."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from sqlalchemy import func, select

from mollifier.buffer import Buffer
from mollifier.embedded import EmbeddedStack, Stack
from mollifier.errors import BufferUnavailableError
from mollifier.model import FINAL_STATUSES, RunError, Tenant
from mollifier.play.client import Marker
from mollifier.play.proxy import HOST, Proxy
from mollifier.play.stage import Organization, make_tenants
from mollifier.play.torture.accounts import Accounts, RunRow, close
from mollifier.play.torture.callers import CALL_TIMEOUT_S, Callers
from mollifier.play.torture.chaos import Chaos, Links
from mollifier.play.torture.fleet import Fleet
from mollifier.play.torture.ledger import Ledger
from mollifier.play.torture.orders import make_orders
from mollifier.play.torture.plan import APIS, WORKERS, Plan, make_plan
from mollifier.play.torture.recovery import Recoveries, p99_s
from mollifier.play.waiting import until
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import migrate_async
from mollifier.postgres.tables import runs
from mollifier.postgres.tenants import Tenants
from mollifier.processes import ChildEnvironment, Processes
from mollifier.server import Server, connect

ORGANIZATIONS = (Organization("noisy", 2), Organization("busy"), Organization("quiet"))
REPORT_INTERVAL_S = 0.2
# An entry may wait for a retry, a run for a worker that is taken for dead, and both for their turn.
PATIENCE_BUFFER_S = 60.0
PATIENCE_RUNS_S = 75.0

Reporter = Callable[[str, Ledger, float], None]
"""Told what is going on, the answers so far, and the share of the plan that is over; a few times a second."""


class Torture(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for: a seed, how long to go on, the lease of the workers, and how many triggers there are to be each second."""

    seed: int
    minutes: float
    lease_s: float
    rate_per_s: float


class Tortured(NamedTuple):
    """The closed accounts and what was done to the system.

    `kills` counts the killed processes by kind. `recovery_s` has for each stranded entry how long after the kill it was settled, where
    nothing else was at fault meanwhile; `recovery_disturbed_s` where something was. `left_in_buffer` are entries not settled at the end.
    """

    torture: Torture
    accounts: Accounts
    kills: Mapping[str, int]
    faults: Mapping[str, int]
    left_in_buffer: int
    recovery_s: Sequence[float]
    recovery_disturbed_s: Sequence[float]
    seconds: float
    complaints: Mapping[str, int]

    @property
    def imbalances(self) -> tuple[str, ...]:
        """What does not add up, in words."""
        late = f"{self.recovery_late} entries of killed workers were settled later than {self.bound_s:g} s, twice the lease"
        rules = (
            (self.left_in_buffer, f"{self.left_in_buffer} entries are left in the buffer"),
            (self.recovery_late, late),
        )
        return (*self.accounts.imbalances(), *(finding for is_broken, finding in rules if is_broken))

    @property
    def bound_s(self) -> float:
        """Within how many seconds what a killed worker held has to be settled by another one: twice the lease."""
        return 2 * self.torture.lease_s

    @property
    def recovery_late(self) -> int:
        """How many stranded entries took longer than the bound though nothing else was at fault."""
        return sum(seconds > self.bound_s for seconds in self.recovery_s)

    def record(self) -> dict[str, Any]:
        """Return all of it as `--json` prints it."""
        return {
            "balanced": not self.imbalances,
            "seed": self.torture.seed,
            "minutes": self.torture.minutes,
            "lease_s": self.torture.lease_s,
            "seconds": round(self.seconds, 1),
            **msgspec.to_builtins(self.accounts),
            "left_in_buffer": self.left_in_buffer,
            "kills": self.kills,
            "faults": self.faults,
            "recovered": len(self.recovery_s),
            "recovery_p99_s": p99_s(self.recovery_s),
            "recovery_late": self.recovery_late,
            "recovered_disturbed": len(self.recovery_disturbed_s),
            "recovery_disturbed_p99_s": p99_s(self.recovery_disturbed_s),
            "imbalances": self.imbalances,
            "complaints": self.complaints,
        }


async def run_torture(
    torture: Torture,
    environment: ChildEnvironment,
    *,
    log: Path,
    report: Reporter,
    on_progress: Callable[[str], object],
    tell: Callable[[str], object],
) -> Tortured:
    """Do it. Raises ProcessError when a process ends that nobody killed, EmbeddedError when a server does not come back."""
    async with AsyncExitStack() as at_end:
        # Synced before each answer: what was accepted outlives even the machine, so that nothing may be lost at all.
        stack = await at_end.enter_async_context(
            EmbeddedStack(durable=True, appendfsync="always", on_progress=on_progress)
        )
        valkey = await at_end.enter_async_context(Proxy(stack.sockets / "valkey.sock"))
        postgres = await at_end.enter_async_context(Proxy(stack.sockets / ".s.PGSQL.5432"))
        on_progress("creating the schema and the tenants")
        await migrate_async(stack.database_url)
        async with Database(stack.database_url, pool_size=2) as database:
            tenants = await make_tenants(Tenants(database), ORGANIZATIONS, enroll=True)
        on_progress("starting API and worker processes")
        variables = environment.on(
            redis_url=f"redis://{HOST}:{valkey.port}/0",
            database_url=f"postgresql://mollifier@{HOST}:{postgres.port}/mollifier",
            admin_token=environment.settings.admin_token or secrets.token_urlsafe(24),
        )
        processes = Processes(variables, log)
        at_end.push_async_callback(processes.stop)
        fleet = Fleet(processes)
        urls = await fleet.start(workers=WORKERS, apis=APIS)
        async with Database(stack.database_url, pool_size=2) as database:
            await processes.tasks_recorded(database)
        redis = connect(stack.redis_url)
        at_end.push_async_callback(redis.aclose)
        server = Server(redis)
        buffer = Buffer(server, lambda: environment.settings)
        recoveries = Recoveries(server, buffer.keyspace.partitions)
        chaos = Chaos(stack, fleet, Links(valkey, postgres), recoveries, tell=tell)
        http = await at_end.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
            )
        )
        marker = Marker(secrets.token_hex(4))
        session = _Session(
            torture=torture,
            stack=stack,
            tenants=tenants,
            marker=marker,
            fleet=fleet,
            chaos=chaos,
            recoveries=recoveries,
            buffer=buffer,
            callers=Callers(http, urls, tenants, marker, seed=torture.seed),
        )
        return await session.run(report)


@dataclass(frozen=True, kw_only=True)
class _Session:
    """The parts of one torture, put together."""

    torture: Torture
    stack: Stack
    tenants: Sequence[Tenant]
    marker: Marker
    fleet: Fleet
    chaos: Chaos
    recoveries: Recoveries
    buffer: Buffer
    callers: Callers

    async def run(self, report: Reporter) -> Tortured:
        """Let the callers call while the plan is carried out; then wait until the system is at rest, and close the accounts."""
        plan = make_plan(self.torture.seed, self.torture.minutes * 60, self.torture.lease_s)
        orders = make_orders(self.torture.seed, rate_per_s=self.torture.rate_per_s, tenants=len(self.tenants))
        enough = asyncio.Event()
        started_s = time.monotonic()
        watching = asyncio.create_task(self.fleet.watch())
        working = asyncio.create_task(self._work(plan, orders, enough, report))
        try:
            await asyncio.wait((watching, working), return_when=asyncio.FIRST_COMPLETED)
            left = await (working if working.done() else watching)
        finally:
            enough.set()
            for task in (watching, working):
                task.cancel()
            await asyncio.gather(watching, working, return_exceptions=True)
        async with Database(self.stack.database_url, pool_size=2) as database:
            rows = [row async for row in find_rows(database, [one.env_id for one in self.tenants], self.marker)]
        return Tortured(
            torture=self.torture,
            accounts=close(self.callers.ledger, rows, seed=self.torture.seed),
            kills={kind: self.fleet.kills[kind] for kind in ("api", "worker", "valkey", "postgres")},
            faults={kind.value: count for kind, count in sorted(self.chaos.counts.items())},
            left_in_buffer=left,
            recovery_s=self.recoveries.seconds(disturbed=False),
            recovery_disturbed_s=self.recoveries.seconds(disturbed=True),
            seconds=time.monotonic() - started_s,
            complaints=dict(self.callers.ledger.complaints.most_common()),
        )

    async def _work(self, plan: Plan, orders: Any, enough: asyncio.Event, report: Reporter) -> int:
        """Go through all of it; return how many entries are left in the buffer at the end."""
        started_s = time.monotonic()

        def share() -> float:
            return min(1.0, (time.monotonic() - started_s) / plan.seconds)

        async with asyncio.TaskGroup() as group:
            calling = group.create_task(self.callers.send_all(orders, enough))
            async with self._reporting("tormenting", report, share):
                await self.chaos.carry_out(plan)
            enough.set()
            async with self._reporting("waiting for the last answers", report, share):
                await calling
        async with self._reporting("waiting for the buffer to drain", report, share):
            left = await until(self._left, lambda seen: seen == 0, lambda _: PATIENCE_BUFFER_S)
            if not left:
                await self.recoveries.finish()
        async with (
            self._reporting("waiting for the runs to be executed", report, share),
            Database(self.stack.database_url, pool_size=2) as database,
        ):
            await until(lambda: _unexecuted(database), lambda seen: seen == 0, lambda _: PATIENCE_RUNS_S)
        return left

    async def _left(self) -> int:
        try:
            return (await self.buffer.counts()).left
        except BufferUnavailableError:
            return -1

    @asynccontextmanager
    async def _reporting(self, what: str, report: Reporter, share: Callable[[], float]) -> AsyncGenerator[None]:
        async def repeat() -> None:
            while True:
                report(what, self.callers.ledger, share())
                await asyncio.sleep(REPORT_INTERVAL_S)

        repeating = asyncio.create_task(repeat())
        try:
            yield
        finally:
            repeating.cancel()
            with suppress(asyncio.CancelledError):
                await repeating


async def _unexecuted(database: Database) -> int:
    query = select(func.count()).select_from(runs).where(runs.c.status.not_in(FINAL_STATUSES))
    async with database.statement() as connection:
        return (await connection.execute(query)).scalar_one()


async def find_rows(database: Database, env_ids: Sequence[str], marker: Marker) -> AsyncGenerator[RunRow]:
    """Yield every run of these environments that the marker knows."""
    query = select(
        runs.c.id, runs.c.tags, runs.c.status, runs.c.payload, runs.c.attempt_count, runs.c.started_at, runs.c.error
    ).where(runs.c.environment_id.in_(env_ids))
    async with database.statement() as connection:
        found = (await connection.execute(query)).all()
    for row in found:
        if (trial := marker.call_of(row.tags)) is not None:
            yield RunRow(
                run_id=row.id,
                trial=trial,
                status=row.status,
                tags=tuple(row.tags),
                payload=row.payload,
                attempt_count=row.attempt_count,
                started_at=row.started_at,
                error_name=msgspec.json.decode(row.error, type=RunError).name if row.error else None,
            )
