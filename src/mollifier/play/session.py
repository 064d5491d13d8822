"""One play from the first call to closed books: send the calls, wait until the system has come to rest, ask what it did."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from mollifier.audit import BUFFERED, DRAINED, WOULD_MOLLIFY, Report
from mollifier.model import RunStatus, Tenant
from mollifier.play.books import Books, reconcile
from mollifier.play.client import Answers, Call, Marker, TriggerClient, all_latencies_ms, percentile
from mollifier.play.evidence import Decisions, connections_received, read_decisions, read_left_in_buffer
from mollifier.play.journal import Journal
from mollifier.play.outage import Outage
from mollifier.play.player import Player
from mollifier.play.process import undisturbed
from mollifier.play.runs import count_statuses, find_runs, unfinished
from mollifier.play.sampling import SampleFigures, Sampler
from mollifier.play.waiting import until
from mollifier.postgres.database import Database
from mollifier.rollout import Mode

CLOCK_SKEW = timedelta(minutes=5)
REPORT_INTERVAL_S = 0.2
ASK_TIMEOUT_S = 30.0
# A worker that was killed leaves entries under a lease of 30 s; a log line is at most late.
PATIENCE_BUFFER_S = 45.0
PATIENCE_LOG_S = 5.0
PATIENCE_RUNS_S = 30.0


@dataclass(frozen=True, kw_only=True)
class System:
    """What is played against, and where to ask what it did.

    `log` is the structured log of all its processes, None when it is out of reach. `mode` is None when unknown. `shared` says that there
    may be other traffic. `redis_url` and `connections_before` are known of an embedded stack only.
    """

    api_urls: Sequence[str]
    admin_token: str
    database_url: str
    log: Path | None
    mode: Mode | None
    shared: bool = False
    redis_url: str | None = None
    connections_before: int | None = None


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long trigger calls took, how late they left, and how long sending them all took."""

    p50_ms: float
    p99_ms: float
    lag_p99_ms: float
    seconds: float


class TenantFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The books of one tenant, as far as they can be told apart; `mollified` is its whole organization's."""

    org_id: str
    env_id: str
    offered: int
    accepted: int
    rejected: int
    errors: int
    would_mollify: int
    mollified: int
    buffered: int
    drained: int
    p50_ms: float
    p99_ms: float


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """The closed books, and what they were made from, per tenant where it can be told apart."""

    books: Books
    timing: Timing
    mode: Mode | None
    answers: Sequence[Answers]
    tenants: Sequence[TenantFigures]
    audit: Report | None
    sample: SampleFigures | None = None
    has_burst: bool = False

    @property
    def imbalances(self) -> tuple[str, ...]:
        """What does not add up, in words."""
        return self.books.imbalances(self.mode, has_burst=self.has_burst) + (
            () if self.sample is None else self.sample.faults
        )

    @property
    def complaints(self) -> Sequence[tuple[str, int]]:
        """Why calls were not accepted, and how often, the most frequent first."""
        return sum((each.complaints for each in self.answers), Counter[str]()).most_common()


Reporter = Callable[[str, Sequence[Answers]], None]
"""Told what is going on, and the answers so far, a few times a second."""


class Session:
    """One play against one system.

    `peak` is about how many calls will be under way at once, and `span_s` how many seconds there are from the first to the last;
    `until_executed` waits for the worker to finish every run, too. `has_burst` says that the calls have a burst in them which the gate
    has to see. `outage` happens meanwhile. Where runs are held, some are sampled.
    """

    def __init__(
        self,
        system: System,
        tenants: Sequence[Tenant],
        *,
        task_id: str,
        marker: Marker,
        report: Reporter,
        peak: int = 1,
        span_s: float = 0.0,
        outage: Outage | None = None,
        until_executed: bool = False,
        has_burst: bool = False,
    ) -> None:
        self._system = system
        self._tenants = tenants
        self._env_ids = {tenant.env_id for tenant in tenants}
        self._task_id = task_id
        self._marker = marker
        self._report = report
        self._peak = peak
        self._until_executed = until_executed
        self._has_burst = has_burst
        self._outage = outage
        self._sampler = Sampler(tenants, marker, span_s=span_s) if system.mode is Mode.DIVERT else None
        self._journal = Journal(system.log) if system.log is not None else None

    async def play(self, calls: Iterable[Call]) -> Played:
        """Play the calls and close the books. Raises EvidenceError or EngineUnavailableError when somebody asked gives no answer."""
        since = datetime.now(UTC) - CLOCK_SKEW
        client = TriggerClient(self._system.api_urls, self._tenants, self._task_id)
        async with (
            client,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)) as http,
            Database(self._system.database_url, pool_size=2) as database,
        ):
            before = await read_decisions(http, self._system.api_urls)
            left_before = await self._left_in_buffer(http) if self._system.shared else 0
            await client.open(self._peak)
            player = Player(self._sending(client))
            started_s = time.perf_counter()
            with undisturbed():
                async with self._reporting("playing", client.answers), self._companions(http):
                    await player.play(calls)
            seconds = time.perf_counter() - started_s
            accepted = {call: run_id for each in client.answers for call, run_id in each.run_ids.items()}
            async with self._reporting("waiting for the buffer to drain", client.answers):
                decisions = (await read_decisions(http, self._system.api_urls)).since(before)
                left, connections, audit = await self._come_to_rest(
                    http, decisions, set(accepted.values()), left_before
                )
            async with self._reporting("waiting for the runs to be executed", client.answers):
                executed = await self._executed(database, since) if self._until_executed else None
            async with self._reporting("closing the books", client.answers):
                sample = None if self._sampler is None else await self._sampler.figures(database)
                runs = reconcile(
                    accepted, [run async for run in find_runs(database, self._env_ids, self._marker, since)]
                )
        books = Books(
            offered=sum(each.offered for each in client.answers),
            accepted=sum(each.accepted for each in client.answers),
            rejected=sum(each.rejected for each in client.answers),
            errors=sum(each.errors for each in client.answers),
            pass_through=decisions.outcomes["pass_through"],
            shadow_log=decisions.outcomes["shadow_log"],
            mollify=decisions.outcomes["mollify"],
            over_cap_created=decisions.over_cap["create"],
            over_cap_rejected=decisions.over_cap["reject"],
            failed_open=decisions.failed_open.total(),
            unbuffered=decisions.failed_open["buffer"],
            would_mollify=None if audit is None else audit.would_mollify,
            buffered=None if audit is None else audit.buffered,
            drained=None if audit is None else audit.drained,
            hash_mismatches=None if audit is None else len(audit.mismatches),
            runs_created=runs.runs_created,
            lost=runs.lost,
            duplicated=runs.duplicated,
            executed=executed,
            left_in_buffer=left,
            buffer_connections=connections,
            sheltered=None if self._outage is None or audit is None else audit.buffered - _to_buffer(decisions),
            attempts_used_up=None if self._journal is None else self._journal.attempts_used_up,
            **({} if sample is None else _sample_fields(sample)),
        )
        latencies_ms = list(all_latencies_ms(client.answers))
        timing = Timing(
            p50_ms=round(percentile(latencies_ms, 50), 2),
            p99_ms=round(percentile(latencies_ms, 99), 2),
            lag_p99_ms=round(percentile(player.lags_s, 99) * 1000, 2),
            seconds=round(seconds, 3),
        )
        return Played(
            books=books,
            timing=timing,
            mode=self._system.mode,
            answers=client.answers,
            tenants=[
                self._tenant(tenant, each, decisions)
                for tenant, each in zip(self._tenants, client.answers, strict=True)
            ],
            audit=audit,
            sample=sample,
            has_burst=self._has_burst,
        )

    def _sending(self, client: TriggerClient) -> Callable[[Call], Coroutine[Any, Any, None]]:
        sampler = self._sampler
        if sampler is None:
            return client.send

        async def send(call: Call) -> None:
            sampler.sent(call)
            await client.send(call)

        return send

    @asynccontextmanager
    async def _companions(self, http: aiohttp.ClientSession) -> AsyncGenerator[None]:
        """What goes on beside the calls: the sample is taken, and an outage happens."""
        async with AsyncExitStack() as stack:
            if self._sampler is not None:
                urls, token = self._system.api_urls, self._system.admin_token
                await stack.enter_async_context(self._sampler.sampling(http, urls, token, self._task_id))
            if self._outage is not None:
                await stack.enter_async_context(self._outage.meanwhile())
            yield

    def _tenant(self, tenant: Tenant, answers: Answers, decisions: Decisions) -> TenantFigures:
        events = Counter[str]() if self._journal is None else self._journal.counts[tenant.env_id]
        return TenantFigures(
            org_id=tenant.org_id,
            env_id=tenant.env_id,
            offered=answers.offered,
            accepted=answers.accepted,
            rejected=answers.rejected,
            errors=answers.errors,
            would_mollify=events[WOULD_MOLLIFY],
            mollified=decisions.mollified[tenant.org_id],
            buffered=events[BUFFERED],
            drained=events[DRAINED],
            p50_ms=round(percentile(answers.latencies_ms, 50), 2),
            p99_ms=round(percentile(answers.latencies_ms, 99), 2),
        )

    async def _come_to_rest(
        self, http: aiohttp.ClientSession, decisions: Decisions, run_ids: set[str], left_before: int
    ) -> tuple[int, int | None, Report | None]:
        """Wait until the buffer is empty and every event is in the log, or nothing moves any more."""
        # Asking for the buffer opens a connection to its server, so the count of those comes first.
        connections = await self._connections()
        if self._journal is not None and self._system.shared:
            self._journal.only = run_ids.__contains__
        mollified, shadowed = _to_buffer(decisions), decisions.outcomes["shadow_log"]

        async def look() -> tuple[int, Report | None]:
            left = max(0, await self._left_in_buffer(http) - left_before)
            return left, None if self._journal is None else self._journal.read()

        def is_at_rest(seen: tuple[int, Report | None]) -> bool:
            left, audit = seen
            if audit is None:
                return left == 0
            held = mollified if self._outage is None else max(mollified, audit.buffered)
            # What the buffer did not take in time it may have taken all the same.
            is_drained = held <= audit.drained <= held + decisions.failed_open["buffer"]
            return left == 0 and is_drained and (audit.buffered, audit.would_mollify) == (held, shadowed)

        def patience_s(seen: tuple[int, Report | None]) -> float:
            return PATIENCE_BUFFER_S if seen[0] else PATIENCE_LOG_S

        left, audit = await until(look, is_at_rest, patience_s)
        return left, connections, audit

    async def _left_in_buffer(self, http: aiohttp.ClientSession) -> int:
        return await read_left_in_buffer(http, self._system.api_urls[0], self._system.admin_token)

    async def _connections(self) -> int | None:
        before, redis_url = self._system.connections_before, self._system.redis_url
        if before is None or redis_url is None:
            return None
        return await connections_received(redis_url) - before - 1

    async def _executed(self, database: Database, since: datetime) -> int:
        async def look() -> Counter[str]:
            return await count_statuses(database, self._env_ids, since)

        statuses = await until(look, lambda seen: unfinished(seen) == 0, lambda _: PATIENCE_RUNS_S)
        return statuses[RunStatus.COMPLETED]

    @asynccontextmanager
    async def _reporting(self, what: str, answers: Sequence[Answers]) -> AsyncGenerator[None]:
        async def report() -> None:
            while True:
                self._report(what, answers)
                await asyncio.sleep(REPORT_INTERVAL_S)

        reporting = asyncio.create_task(report())
        try:
            yield
        finally:
            reporting.cancel()
            with suppress(asyncio.CancelledError):
                await reporting
            self._report(what, answers)


def _to_buffer(decisions: Decisions) -> int:
    """Return how many of the mollified triggers the caps let into the buffer, which took them in time."""
    kept_out = decisions.over_cap["create"] + decisions.over_cap["reject"] + decisions.failed_open["buffer"]
    return decisions.outcomes["mollify"] - kept_out


def _sample_fields(sample: SampleFigures) -> dict[str, int]:
    return {
        "sampled": sample.sampled,
        "sampled_retrieved": sample.retrieved,
        "sampled_tagged": sample.tagged,
        "sampled_cancelled": sample.cancelled,
        "sampled_too_late": sample.too_late,
        "sampled_faults": len(sample.faults),
    }
