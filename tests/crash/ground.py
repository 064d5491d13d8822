"""Where these tests take place: servers that keep what they answered through a crash, tenants, and what is found there afterwards."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.embedded import ServerName, Stack
from mollifier.facade import Mollifier
from mollifier.model import Environment, Tenant
from mollifier.postgres.catalog import PostgresTaskCatalog, record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.tenants import Tenants
from mollifier.server import connect
from mollifier.settings import Settings
from tests.core.support import execute
from tests.crash import roles
from tests.crash.processes import TIMEOUT_S, Child, child
from tests.postgres.support import rows

TASK = "note"
ADMIN_TOKEN = "admin"
LEASE_MS = 300
DATABASES = 16
"""How many buffers one Valkey keeps apart."""
AT_ONCE = 3
"""How many processes are brought to their ends side by side."""
A = TypeVar("A")
B = TypeVar("B")
_numbers = itertools.count(1)

# Runs tagged `refuse:<sequence>` are refused the first time, `refuse` as long as they are to be executed, `slow` are inserted slowly.
OBSTACLES = """
CREATE FUNCTION crash_obstacles() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE tag text;
BEGIN
    FOREACH tag IN ARRAY NEW.tags LOOP
        IF starts_with(tag, 'refuse:') AND nextval(substr(tag, 8)::regclass) = 1 OR tag = 'refuse' AND NEW.status = 'QUEUED' THEN
            RAISE EXCEPTION 'refused';
        ELSIF tag = 'slow' THEN
            PERFORM pg_sleep(0.4);
        END IF;
    END LOOP;
    RETURN NEW;
END $$;
CREATE TRIGGER crash_obstacles BEFORE INSERT ON runs FOR EACH ROW EXECUTE FUNCTION crash_obstacles();
"""


@dataclass(frozen=True)
class Ground:
    """Servers, and a healthy process's way to the database."""

    stack: Stack
    folder: Path
    database_url: str
    database: Database

    @property
    def executions(self) -> Path:
        """The file in which each execution is noted."""
        return self.folder / "executions"

    @property
    def log(self) -> Path:
        """What the processes say."""
        return self.folder / "log"

    def settings(self, number: int = 0, **changes: Any) -> Settings:
        """Return the settings of a fleet on one of the buffers."""
        fields: dict[str, Any] = {
            "enabled": True,
            "divert": True,
            "redis_url": f"{self.stack.redis_url.partition('?')[0]}?db={number}",
            "database_url": self.database_url,
            "admin_token": ADMIN_TOKEN,
            "partitions": 2,
            "lease_ms": LEASE_MS,
            "request_limit": 1_000_000,
            "trip_threshold": 1_000_000,
            "drain_poll_interval_ms": 20,
            # What is held must not depend on how busy the machine is that runs the tests.
            "gate_deadline_ms": 10_000,
            "accept_deadline_ms": 10_000,
        }
        return Settings(**{**fields, **changes})

    def executed(self) -> Counter[str]:
        """Return how often each run was executed."""
        text = self.executions.read_text() if self.executions.exists() else ""
        return Counter(text.split())

    @asynccontextmanager
    async def api(self, **changes: Any) -> AsyncGenerator[tuple[Child, str]]:
        """Run an API process on the first buffer; yield it and its URL."""
        async with child(roles.api, self.log, self.settings(**changes)) as process:
            yield process, await process.ready()

    async def inherit(self, settings: Sequence[Settings]) -> None:
        """Have another process drain these buffers, and execute what comes of it, until nothing is left to do."""
        async with AsyncExitStack() as stack:
            process = await stack.enter_async_context(child(roles.heir, self.log, settings))
            buffers = [await stack.enter_async_context(buffer_of(each, self.database)) for each in settings]
            await process.ready()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    while not await self._is_done(buffers):
                        await asyncio.sleep(0.1)
            except TimeoutError:
                counts = [await buffer.counts() for buffer in buffers]
                raise process.failure(f"did not get done: {counts}, {await self._jobs()} jobs") from None
            if code := await process.end(in_order=True):
                raise process.failure(f"ended with exit code {code}")

    async def restart(self, server: ServerName) -> None:
        """Kill a server, all its processes, and start it again on what it has kept."""
        await self.stack.stop(server, kill=True)
        await self.stack.start(server)

    async def empty(self) -> None:
        """Empty every buffer."""
        async with connect(self.stack.redis_url) as redis:
            await execute(redis, "FLUSHALL")

    async def _is_done(self, buffers: Sequence[Buffer]) -> bool:
        for buffer in buffers:
            counts = await buffer.counts()
            if counts.left - counts.failed:
                return False
        return await self._jobs() == 0

    async def _jobs(self) -> int:
        return (await rows(self.database, "SELECT count(*) AS jobs FROM procrastinate_jobs"))[0]["jobs"]

    async def runs_tagged(self, tags: Sequence[str]) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return the runs that exist by their tag."""
        query = """
        SELECT id, status, tags, metadata, payload, delayed_until FROM runs WHERE tags && CAST(:tags AS text[]) ORDER BY id
        """
        found: dict[str, list[Mapping[str, Any]]] = {tag: [] for tag in tags}
        for row in await rows(self.database, query, tags=list(tags)):
            for tag in {*row["tags"]} & found.keys():
                found[tag].append(row)
        return found


@asynccontextmanager
async def buffer_of(settings: Settings, database: Database) -> AsyncGenerator[Buffer]:
    """Lend a buffer as a healthy process sees it."""
    async with house_of(settings, database) as (mollifier, _):
        assert mollifier.buffer is not None
        yield mollifier.buffer


@asynccontextmanager
async def house_of(settings: Settings, database: Database) -> AsyncGenerator[tuple[Mollifier, Redis]]:
    """Lend the parts of a healthy process, and a client of its buffer's server."""
    async with connect(settings.redis_url or "") as redis:
        engine, tasks = PostgresRunEngine(database), PostgresTaskCatalog(database)
        yield Mollifier(settings, engine=engine, tasks=tasks, redis=redis), redis


async def trip(mollifier: Mollifier, redis: Redis, environment: Environment) -> None:
    """Have the environment's triggers held from now on."""
    assert mollifier.buffer is not None
    keys = mollifier.buffer.keyspace.of(environment.org_id)
    await execute(redis, "SET", keys.tripped(environment.id), "1", "PX", 3_600_000)


async def free_claims(
    mollifier: Mollifier, redis: Redis, environment: Environment, digests: Iterable[str]
) -> Sequence[str]:
    """Have the lifetimes of these claims pass: they are minutes, for which no test is to wait. Return those that have none."""
    assert mollifier.buffer is not None
    keys = mollifier.buffer.keyspace.of(environment.org_id)
    eternal: list[str] = []
    for key in map(keys.idempotency, digests):
        if (await execute(redis, "GET", key) or b"").startswith((b"claim:", b"doubt")):
            if int(await execute(redis, "PTTL", key)) == -1:
                eternal.append(key)
            await execute(redis, "PEXPIRE", key, 1)
    return eternal


async def prepare(stack: Stack, folder: Path, database_url: str, database: Database) -> Ground:
    """Make the task and the obstacles in an empty database."""
    await record_tasks(database, {TASK: roles.TASKS})
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(OBSTACLES)
    return Ground(stack, folder, database_url, database)


async def new_tenant(database: Database, name: str) -> Tenant:
    """Make a tenant whose triggers may be held."""
    tenants = Tenants(database)
    tenant = await tenants.create_tenant(name)
    await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
    return tenant


def environment_of(tenant: Tenant) -> Environment:
    """Return the tenant's environment as an authenticated caller's."""
    return Environment(
        id=tenant.env_id,
        name="prod",
        project_id=tenant.project_id,
        org_id=tenant.org_id,
        org_flags={"mollifierEnabled": True},
    )


async def for_each(things: Sequence[A], act: Callable[[A], Awaitable[B]], *, at_once: int | None = None) -> list[B]:
    """Act on each, a few at once; return what comes of it, in order."""
    free = asyncio.Semaphore(at_once or AT_ONCE)

    async def one(thing: A) -> B:
        async with free:
            return await act(thing)

    tasks = [asyncio.create_task(one(thing)) for thing in things]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def new_name() -> str:
    """Return a name that nothing else here has."""
    return f"case{next(_numbers)}"


def payload(ground: Ground, marker: str) -> Any:
    """Return a payload that says which call it came with."""
    return {"file": str(ground.executions), "marker": marker}
