"""Many changes of one held run: none is lost, and what they cost grows with their number, never with its square."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import msgspec
import pytest

from mollifier import handover
from mollifier.buffer import Buffer
from mollifier.engine import CreateOutcome, Creation
from mollifier.errors import EngineUnavailableError
from mollifier.model import Entry, MetadataOperation, Run, RunStatus
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.runs import Runs
from mollifier.scripts import Settlement
from mollifier.server import Server
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys

INCREMENT = MetadataOperation(type="increment", key="n", value=b"1")


class CountingBuffer(Buffer):
    """Counts what is asked of it about one run."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: Counter[str] = Counter()

    async def get_entry(self, org_id: str, run_id: str) -> Entry | None:
        self.asked["read"] += 1
        return await super().get_entry(org_id, run_id)

    async def patch(self, entry: Entry, patch: bytes, *, unbind: Sequence[str] = ()) -> Settlement:
        reply = await super().patch(entry, patch, unbind=unbind)
        self.asked[f"patch: {reply}"] += 1
        return reply


class CountingEngine(PostgresRunEngine):
    """Counts creations; while it is away, all that is asked of it fails."""

    creations = 0
    is_away = False
    refuses = False

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        self.creations += 1
        self._check()
        if self.refuses:
            raise RuntimeError("no room today")
        return await super().create_held_runs(creations)

    async def change_metadata(self, env_id: str, run_id: str, operations: Sequence[MetadataOperation]) -> Run | None:
        self._check()
        return await super().change_metadata(env_id, run_id, operations)

    async def cancel_run(self, env_id: str, run_id: str, at: datetime) -> Run | None:
        self._check()
        return await super().cancel_run(env_id, run_id, at)

    def _check(self) -> None:
        if self.is_away:
            raise EngineUnavailableError("away", unsent=True)


class Process:
    """What one process of the application changes runs with."""

    def __init__(self, house: House) -> None:
        self.buffer = CountingBuffer(Server(house.client), lambda: house.settings)
        self.engine = CountingEngine(house.database)
        self.runs = Runs(self.engine, self.buffer, lambda: house.settings, house.clock)

    async def increment(self, run_id: str) -> None:
        assert await self.runs.change_metadata(ENVIRONMENT, run_id, [INCREMENT]) is not None

    async def increment_at_once(self, run_id: str, number: int) -> None:
        await asyncio.gather(*(self.increment(run_id) for _ in range(number)))


@asynccontextmanager
async def settled(house: House, run_id: str, expected: int) -> AsyncGenerator[None]:
    """Hold the run to so many increments, before its entry is drained and after."""
    yield
    for _ in range(2):
        run = await house.runs.get(ENVIRONMENT, run_id)
        assert run is not None
        assert msgspec.json.decode(run.snapshot.metadata or b"{}") == {"n": expected}
        await house.drain()
    created = await house.created(run_id)
    assert created is not None
    assert created.status is RunStatus.QUEUED


async def patches_of(house: House, run_id: str) -> Sequence[bytes]:
    entry = await house.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry is not None
    return entry.patches


async def test_concurrent_changes_wait_for_each_other_and_the_many_are_made_in_the_engine(holding: House) -> None:
    run_id = await holding.trigger()
    process = Process(holding)

    async with settled(holding, run_id, 100):
        await process.increment_at_once(run_id, 100)

        assert len(await patches_of(holding, run_id)) == handover.CHANGES_MANY
        assert process.buffer.asked["patch: held"] == handover.CHANGES_MANY
        # Whoever has found the entry before somebody else's change was through reads it again, once.
        assert process.buffer.asked["patch: changed"] <= 100
        # One to find it, one when its turn has come or once more, one once it is marked.
        assert process.buffer.asked["read"] <= 100 * 3
        assert process.engine.creations <= 100 - handover.CHANGES_MANY


async def test_concurrent_changes_of_several_processes_lose_none_and_lose_each_other_a_bounded_number_of_times(
    holding: House,
) -> None:
    run_id = await holding.trigger()
    processes = [Process(holding) for _ in range(4)]

    async with settled(holding, run_id, 100):
        await asyncio.gather(*(process.increment_at_once(run_id, 25) for process in processes))

        patches = len(await patches_of(holding, run_id))
        assert patches <= handover.CHANGES_MANY + len(processes)
        # Each that was appended cost at most one other process its try.
        lost = sum(process.buffer.asked["patch: changed"] for process in processes)
        assert lost <= patches * (len(processes) - 1) + len(processes)


async def test_changes_that_are_large_are_made_in_the_engine_sooner(holding: House) -> None:
    run_id = await holding.trigger()
    value = b'"%s"' % (b"x" * 200_000)
    large = MetadataOperation(type="set", key="k", value=value)
    process = Process(holding)

    for _ in range(6):
        assert await process.runs.change_metadata(ENVIRONMENT, run_id, [large]) is not None

    assert sum(map(len, await patches_of(holding, run_id))) < 2 * handover.CHANGE_BYTES_MANY
    created = await holding.created(run_id)
    assert created is not None
    assert created.snapshot.metadata == b'{"k":%s}' % value
    await holding.drain()


async def test_while_the_engine_is_away_an_entry_takes_many_changes_but_not_any_number(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "CHANGES_MAX", handover.CHANGES_MANY + 8)
    run_id = await holding.trigger()
    process = Process(holding)
    process.engine.is_away = True

    async with settled(holding, run_id, handover.CHANGES_MAX + 1):
        await process.increment_at_once(run_id, handover.CHANGES_MAX)
        assert process.buffer.asked["patch: changed"] <= handover.CHANGES_MAX
        for _ in range(2):
            with pytest.raises(EngineUnavailableError):
                await process.increment(run_id)
        assert len(await patches_of(holding, run_id)) == handover.CHANGES_MAX

        process.engine.is_away = False
        await process.increment(run_id)
        assert len(await patches_of(holding, run_id)) == handover.CHANGES_MAX


async def test_a_run_that_was_changed_often_can_be_cancelled_while_the_engine_is_away_and_grows_by_that_once(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "CHANGES_MAX", 3)
    run_id = await holding.trigger()
    process = Process(holding)
    process.engine.is_away = True
    await process.increment_at_once(run_id, 3)

    for _ in range(3):
        run = await process.runs.cancel(ENVIRONMENT, run_id)
        assert run is not None
        assert run.status is RunStatus.CANCELED

    assert len(await patches_of(holding, run_id)) == 4
    await holding.drain()
    created = await holding.created(run_id)
    assert created is not None
    assert created.status is RunStatus.CANCELED


async def test_a_run_that_the_engine_refuses_takes_changes_while_it_is_held(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "CHANGES_MANY", 2)
    run_id = await holding.trigger()
    process = Process(holding)
    process.engine.refuses = True

    async with settled(holding, run_id, 5):
        for _ in range(5):
            await process.increment(run_id)


async def test_whoever_waits_for_a_creation_that_is_broken_off_creates_the_run(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "CHANGES_MANY", 0)
    run_id = await holding.trigger()
    process = Process(holding)
    asked, go_on = asyncio.Event(), asyncio.Event()
    create = process.engine.create_held_runs

    async def slow(creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        asked.set()
        await go_on.wait()
        return await create(creations)

    monkeypatch.setattr(process.engine, "create_held_runs", slow)
    first, *others = [asyncio.create_task(process.increment(run_id)) for _ in range(3)]
    await asked.wait()
    first.cancel()
    go_on.set()

    async with settled(holding, run_id, 2):
        await asyncio.gather(*others)
        with pytest.raises(asyncio.CancelledError):
            await first
