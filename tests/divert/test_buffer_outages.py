"""The buffer's server down, frozen, slow or cut off: triggers succeed directly and soon ask nobody; afterwards holding resumes by itself.

What is asserted is who was asked and what was decided and created, never how long it took.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from msgspec.structs import replace
from sqlalchemy import func, select

from mollifier.embedded import EmbeddedStack, Stack
from mollifier.errors import BufferUnavailableError, EngineUnavailableError
from mollifier.play.proxy import HOST, LOSE, Fate, Proxy
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.tables import runs
from mollifier.server import Command, Reply, Server, connect
from mollifier.settings import Settings
from tests.conftest import skipping_without_wheels
from tests.core.observed import Observed, labels
from tests.core.support import execute, until
from tests.divert.conftest import DEBOUNCED, ENVIRONMENT, House

OPEN = 2
RECOVERED_S = 30


class Outage:
    """A house whose buffer's server is reached through a proxy, and everything that is asked of that server but a PING."""

    def __init__(self, stack: Stack, proxy: Proxy, house: House, observed: Observed, asked: list[str]) -> None:
        self.stack = stack
        self.proxy = proxy
        self.house = house
        self.observed = observed
        self.asked = asked
        self.made: set[str] = set()

    async def trigger(self, **options: Any) -> str:
        """Trigger, and note the run."""
        run_id = await self.house.trigger(**options)
        self.made.add(run_id)
        return run_id

    async def trigger_all_kinds(self, key: str) -> None:
        """Trigger alone, with a key twice, with a parent, and in a batch of which half have keys."""
        parent = await self.trigger()
        keyed = await self.trigger(idempotency_key=key)
        assert await self.house.trigger_all(idempotency_key=key) == (keyed, True)
        await self.trigger(parent_run_id=parent)
        requests = [
            self.house.request(idempotency_key=f"{key}-{number}" if number % 2 else None) for number in range(20)
        ]
        triggered = await self.house.mollifier.triggers.trigger_many(ENVIRONMENT, requests)
        self.made.update(one.result.run_id for one in triggered)

    def state(self, breaker: str = "buffer") -> float | None:
        return self.observed.points("mollifier.breaker.state").get(labels(breaker=breaker))

    def openings(self) -> dict[str, float]:
        """How often each breaker has opened."""
        points = self.observed.points("mollifier.breaker.changes").items()
        return {dict(point)["breaker"]: value for point, value in points if dict(point)["state"] == "open"}

    def mollified(self) -> float:
        """How many triggers the gate has decided to hold."""
        points = self.observed.points("mollifier.decisions").items()
        return sum(value for point, value in points if dict(point)["outcome"] == "mollify")

    async def until_open(self, breaker: str, do: Callable[[], Awaitable[object]]) -> None:
        async def is_open() -> bool:
            await do()
            return self.state(breaker) == OPEN

        await until(is_open, RECOVERED_S)

    async def asked_while_open(self, breaker: str, do: Callable[[], Awaitable[object]]) -> list[str]:
        """Do something during which the breaker does not close, as in a busy process it may; return what was asked meanwhile."""
        while True:
            await self.until_open(breaker, do)
            before = self.openings()
            # What nobody waits for, keys that are given back, is on its way by now.
            for _ in range(5):
                await asyncio.sleep(0)
            self.asked.clear()
            await do()
            if self.state(breaker) == OPEN and self.openings() == before:
                return list(self.asked)

    async def hold(self) -> str:
        """Trigger until a run is held, for in a busy process the gate may give up; return the run."""
        while True:
            run_id = await self.trigger()
            if await self.house.created(run_id) is None:
                return run_id

    async def holding_resumes(self) -> None:
        """Trigger until one is held again."""
        before = self.mollified()

        async def is_held() -> bool:
            await self.trigger()
            return self.mollified() > before

        await until(is_held, RECOVERED_S)

    async def created(self) -> int:
        async with self.house.database.statement() as connection:
            return (await connection.execute(select(func.count()).select_from(runs))).scalar_one()


@pytest.fixture(scope="module")
def unforgetful() -> Iterator[Stack]:
    """A Valkey of these tests' own, which forgets nothing when it is killed."""
    with skipping_without_wheels(), EmbeddedStack(postgres=False, appendfsync="always") as running:
        yield running


@pytest.fixture
async def outage(unforgetful: Stack, database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Outage]:
    asked: list[str] = []
    run_many = Server.run_many

    async def counting(self: Server, commands: Sequence[Command]) -> list[Reply]:
        asked.extend(str(command[0]) for command in commands if command[0] != "PING")
        return await run_many(self, commands)

    monkeypatch.setattr(Server, "run_many", counting)
    async with (
        Proxy(Path(urlsplit(unforgetful.redis_url).path)) as proxy,
        Database(database_url) as database,
        connect(unforgetful.redis_url) as redis,
    ):
        await execute(redis, "FLUSHALL")
        await record_tasks(database, {"echo": "mollifier.demo_tasks"})
        settings = Settings(
            enabled=True, divert=True, redis_url=f"redis://{HOST}:{proxy.port}", partitions=4, drain_batch_size=200
        )
        observed = Observed()
        house = House(settings, database, observed.telemetry)
        try:
            yield Outage(unforgetful, proxy, house, observed, asked)
        finally:
            await house.mollifier.aclose()


Fault = Callable[[Outage], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def down(outage: Outage) -> AsyncGenerator[None]:
    await outage.stack.stop("valkey", kill=True)
    yield
    await outage.stack.start("valkey")


@asynccontextmanager
async def frozen(outage: Outage) -> AsyncGenerator[None]:
    pid = outage.stack.valkey_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def slow(outage: Outage) -> AsyncGenerator[None]:
    outage.proxy.misbehave(requests=Fate(delay_s=1.0))
    yield
    outage.proxy.behave()


@asynccontextmanager
async def partitioned(outage: Outage) -> AsyncGenerator[None]:
    outage.proxy.misbehave(requests=LOSE, replies=LOSE)
    yield
    outage.proxy.behave()


FAULTS: list[Fault] = [down, frozen, slow, partitioned]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_triggers_succeed_directly_and_soon_ask_nobody_and_holding_resumes_by_itself(
    outage: Outage, fault: Fault
) -> None:
    await outage.house.trip()
    await outage.holding_resumes()
    numbers = iter(range(1_000))

    async def everything() -> None:
        await outage.trigger_all_kinds(f"k{next(numbers)}")

    async with fault(outage):
        assert await outage.asked_while_open("buffer", everything) == []

    await outage.holding_resumes()
    # Keys that were claimed without an answer keep nobody waiting.
    for number in range(next(numbers)):
        run_id, cached = await outage.house.trigger_all(idempotency_key=f"k{number}")
        assert (run_id in outage.made, cached) == (True, True)
    await outage.house.drain()
    assert await outage.created() == len(outage.made)


async def test_reads_of_what_may_be_held_fail_and_soon_ask_nobody_and_answer_again_by_themselves(
    outage: Outage,
) -> None:
    await outage.house.trip()
    held = await outage.hold()
    outage.house.settings = replace(outage.house.settings, accept_deadline_ms=50)

    async def read() -> None:
        with pytest.raises(BufferUnavailableError):
            await outage.house.runs.get(ENVIRONMENT, held)

    async with partitioned(outage):
        assert await outage.asked_while_open("read", read) == []
        created = await outage.trigger(debounce=DEBOUNCED)
        assert await outage.house.runs.get(ENVIRONMENT, created) is not None

    async def is_read() -> bool:
        try:
            return await outage.house.runs.get(ENVIRONMENT, held) is not None
        except BufferUnavailableError:
            return False

    await until(is_read, RECOVERED_S)
    await outage.house.drain()


async def test_a_server_too_slow_for_the_gate_is_quick_enough_for_a_read(outage: Outage) -> None:
    await outage.house.trip()
    held = await outage.hold()

    numbers = itertools.count()
    outage.proxy.misbehave(requests=Fate(delay_s=0.1))

    async def trigger() -> None:
        await outage.trigger(idempotency_key=f"k{next(numbers)}")

    # Nor is a key claimed, which would have been answered in time.
    assert await outage.asked_while_open("buffer", trigger) == []
    run = await outage.house.runs.get(ENVIRONMENT, held)

    assert run is not None
    assert outage.state("read") is None
    outage.proxy.behave()
    await outage.house.drain()


async def test_writes_that_are_too_large_for_their_deadline_blind_no_gate(outage: Outage) -> None:
    await outage.house.trip()
    await outage.hold()
    payload = b'"%s"' % (b"x" * 1_000_000)
    # A narrow line: a question takes a few milliseconds, a megabyte two seconds.
    outage.proxy.misbehave(requests=Fate(delay_s=0.002, piece_bytes=1_000))

    assert await outage.asked_while_open("accept", lambda: outage.trigger(payload=payload)) == ["EVALSHA"]

    # The gate is asked as before, and its decisions stand; what it would hold is created.
    assert outage.openings() == {"accept": outage.openings()["accept"]}
    outage.proxy.behave()
    await outage.house.drain()
    assert await outage.created() == len(outage.made)


async def test_while_the_engine_is_away_too_a_trigger_tries_the_buffer_whatever_the_gate_has_met(
    outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is too slow for the gate is still a better place for a run than none."""
    await outage.house.trip()
    await outage.hold()
    outage.proxy.misbehave(requests=Fate(delay_s=0.05))
    assert await outage.asked_while_open("buffer", outage.trigger) == []

    async def away(_: object) -> None:
        raise EngineUnavailableError("away")

    left = (await outage.house.buffer.counts()).left
    with monkeypatch.context() as patched:
        patched.setattr(outage.house.engine, "create_runs", away)
        await outage.trigger()
    assert (await outage.house.buffer.counts()).left == left + 1

    outage.proxy.behave()
    await outage.house.drain()
    assert await outage.created() == len(outage.made)


async def test_requests_that_are_cancelled_in_flight_never_have_their_replies_read_by_others(outage: Outage) -> None:
    """On a line on which replies come late and in pieces, whoever is left gets what is its own: its run, with its payload and its key."""
    await outage.house.trip()
    outage.house.settings = replace(outage.house.settings, gate_deadline_ms=20_000, accept_deadline_ms=20_000)
    outage.proxy.misbehave(requests=Fate(delay_s=0.001), replies=Fate(delay_s=0.0002, piece_bytes=97))
    chance = random.Random(1)
    numbers = itertools.count()

    async def call(number: int) -> None:
        payload, key = str(number).encode(), f"k{number}"
        run_id = await outage.trigger(payload=payload, idempotency_key=key)
        run = await outage.house.runs.get(ENVIRONMENT, run_id)
        assert run is not None
        assert (run.id, run.snapshot.payload, run.snapshot.idempotency_key) == (run_id, payload, key)
        assert await outage.house.trigger_all(payload=payload, idempotency_key=key) == (run_id, True)

    cancelled = answered = 0
    while min(cancelled, answered) < 60:
        calls = [asyncio.create_task(call(next(numbers))) for _ in range(20)]
        for each in calls[:14]:
            await asyncio.sleep(chance.random() * 0.015)
            each.cancel()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, asyncio.CancelledError):
                cancelled += 1
            else:
                assert outcome is None
                answered += 1

    outage.proxy.behave()
    await outage.house.drain()
    # What was cancelled may have become a run; whoever was answered has one.
    assert len(outage.made) <= await outage.created() <= next(numbers)
