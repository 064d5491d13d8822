"""What the tests of runs share: a clock to turn, snapshots, and the database's state as plain values."""

from __future__ import annotations

import asyncio
import itertools
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Connection, event, text

from mollifier.engine import Created, RunEngine
from mollifier.model import Run, Snapshot
from mollifier.postgres.database import Database

ENV, OTHER_ENV = "env_ours", "env_theirs"
ORG = "org_ours"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
_numbers = itertools.count(1)


class Clock:
    """A clock that stands still until it is turned."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def turn(self, **duration: float) -> datetime:
        self.now += timedelta(**duration)
        return self.now


def snapshot(**fields: Any) -> Snapshot:
    """Return a snapshot of a plain trigger at the clock's start, with an id of its own."""
    defaults: dict[str, Any] = {
        "run_id": f"run_{next(_numbers):06d}",
        "org_id": ORG,
        "env_id": ENV,
        "task_id": "echo",
        "created_at": START,
        "payload": b'{"a": 1}',
    }
    return Snapshot(**{**defaults, **fields})


async def create(engine: RunEngine, **fields: Any) -> str:
    """Create one run that nothing stands in the way of; return its id."""
    snap = snapshot(**fields)
    assert await engine.create_runs([snap]) == [Created(snap.run_id)]
    return snap.run_id


async def read(engine: RunEngine, run_id: str, env_id: str = ENV) -> Run:
    """Return a run that is there."""
    run = await engine.get_run(env_id, run_id)
    assert run is not None
    return run


async def rows(database: Database, query: str, **parameters: Any) -> Sequence[Mapping[str, Any]]:
    """Return what a query answers."""
    async with database.statement() as connection:
        return [dict(row) for row in (await connection.execute(text(query), parameters)).mappings()]


async def execute(database: Database, statement: str, **parameters: Any) -> None:
    """Run a statement."""
    async with database.statement() as connection:
        await connection.execute(text(statement), parameters)


async def jobs(database: Database) -> Sequence[str]:
    """Return the runs that have a job, in the order of their jobs."""
    found = await rows(database, "SELECT args ->> 'run_id' AS run_id FROM procrastinate_jobs ORDER BY id")
    return [row["run_id"] for row in found]


class Statements:
    """Notes what a database is asked, from now on."""

    def __init__(self, database: Database) -> None:
        self.asked: list[str] = []
        engine = database._engine  # pyright: ignore[reportPrivateUsage] - nothing else sees what is sent
        event.listen(engine.sync_engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        self.asked.append(statement)


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


class Outage:
    """Makes a database unreachable: nobody may connect to it, and whoever was connected is thrown out."""

    def __init__(self, database_url: str) -> None:
        url = urlsplit(database_url)
        self._name = url.path.removeprefix("/")
        self._beside = url._replace(path="/postgres").geturl()

    async def begin(self) -> None:
        await self._administer("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        await self._administer("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = {text}")

    async def end(self) -> None:
        await self._administer("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")

    async def _administer(self, statement: LiteralString) -> None:
        query = sql.SQL(statement).format(name=sql.Identifier(self._name), text=sql.Literal(self._name))
        async with await psycopg.AsyncConnection.connect(self._beside, autocommit=True) as connection:
            await connection.execute(query)


def let_others_run(patched: pytest.MonkeyPatch) -> None:
    """Have the driver let others run wherever it ever does, as it does on a busy machine: at more awaits, so that more can be cancelled."""
    patched.setattr("psycopg.waiting.MAX_BUSY_TIME", 0)


async def cancelled_everywhere(operation: Callable[[], Coroutine[Any, Any, object]]) -> AsyncIterator[int]:
    """Run the operation again and again, cancelled the first time at its first await, then at its second, and so on to its end.

    Yields the number of the await after each time. What then came out of the operation was the cancellation, if anything: before Python
    3.12 `asyncio.wait_for` loses one that arrives together with what it waits for.
    """
    with pytest.MonkeyPatch.context() as patched:
        let_others_run(patched)
        async for number in _cancelled_in_turn(operation):
            yield number


async def _cancelled_in_turn(operation: Callable[[], Coroutine[Any, Any, object]]) -> AsyncIterator[int]:
    for number in itertools.count(1):
        if not await _is_cancelled_at(number, operation()):
            return
        yield number


async def _is_cancelled_at(number: int, operation: Coroutine[Any, Any, object]) -> bool:
    running = asyncio.ensure_future(_cancelled_at(number, operation))
    await asyncio.wait((running,))
    return running.cancelled() or running.result()


@types.coroutine
def _cancelled_at(number: int, operation: Coroutine[Any, Any, object]) -> Generator[Any, Any, bool]:
    """Pass on whatever the operation waits for; cancel the task that runs it when it waits for the so-many-eth time, and tell whether it did."""
    resume: Callable[[Any], Any] = operation.send
    value: Any = None
    awaits = 0
    while True:
        awaits += 1
        try:
            awaited = resume(value)
        except StopIteration:
            return awaits > number
        if awaits == number and (task := asyncio.current_task()) is not None:
            task.cancel()
        try:
            value = yield awaited
            resume = operation.send
        except BaseException as error:  # noqa: BLE001 - the operation is told of it
            value, resume = error, operation.throw
