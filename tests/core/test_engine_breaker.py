"""The breaker in front of the engine: a sick one is asked a few times a second, a bad entry is not taken for one, and nobody is forgotten.

On a real server, by a clock that passes in steps; what is counted is calls of the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from mollifier import patches, snapshots
from mollifier.buffer import Buffer, Popped, Ready
from mollifier.drainer import Drainer
from mollifier.engine import Created, CreateOutcome, Creation, RunEngine
from mollifier.errors import BufferUnavailableError, EngineFailingError, EngineUnavailableError, InvalidRequestError
from mollifier.handling import Outcome
from mollifier.materialise import Materialiser, by_kind
from mollifier.model import Entry, EntryKind, EntryState, Snapshot
from mollifier.server import Server
from mollifier.settings import Settings
from tests.core.observed import Observed, labels
from tests.core.stepped_time import SteppedTime
from tests.core.support import until

pytestmark = pytest.mark.leaves_keys

NOW = datetime(2030, 1, 2, tzinfo=UTC)
SETTINGS = Settings(partitions=4, drain_concurrency=16, drain_batch_size=8, drain_max_attempts=1_000)
AWAY, FAILING = EngineUnavailableError("away"), RuntimeError("disk on fire")


class Engine:
    """Creates runs, or fails as the test wants; notes each call and its moment."""

    def __init__(self, time: SteppedTime) -> None:
        self._time = time
        self.fault: Callable[[Sequence[str]], Exception | None] = lambda _: None
        self.calls: list[tuple[float, list[str]]] = []
        self.batches: list[list[str]] = []

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        run_ids = [creation.snapshot.run_id for creation in creations]
        self.calls.append((self._time.now_s - 1000, run_ids))
        await asyncio.sleep(0)
        if (fault := self.fault(run_ids)) is not None:
            raise fault
        self.batches.append(run_ids)
        return [Created(run_id) for run_id in run_ids]

    @property
    def created(self) -> list[str]:
        return [run_id for batch in self.batches for run_id in batch]

    def fails_all_with(self, fault: Exception | None) -> None:
        self.fault = lambda _: fault

    def fails_those(self, fault: Exception, *run_ids: str) -> None:
        self.fault = lambda asked: fault if set(asked) & set(run_ids) else None


class Bench:
    """A buffer on a real server, an engine, and a drainer between them in a time of their own."""

    def __init__(self, redis: Redis) -> None:
        self.settings = SETTINGS
        self.buffer = Buffer(Server(redis), lambda: self.settings)
        self.time = SteppedTime()
        self.engine = Engine(self.time)
        self.observed = Observed()
        self.audited: list[str] = []
        self.jitter = 0.0

    @property
    def materialiser(self) -> Materialiser:
        return Materialiser(cast("RunEngine", self.engine), self.observed.telemetry, lambda: NOW)

    @asynccontextmanager
    async def draining(self) -> AsyncGenerator[Drainer]:
        materialiser = self.materialiser
        drainer = Drainer(
            self.buffer,
            by_kind(audit=self._audit, held=materialiser.handle),
            lambda: self.settings,
            self.observed.telemetry,
            give_up=materialiser.give_up,
            asks_engine=lambda entry: entry.kind is EntryKind.HELD,
            sleep=self.time.sleep,
            jitter=lambda: self.jitter,
            monotonic=self.time.monotonic,
        )
        drainer.start()
        try:
            yield drainer
        finally:
            await drainer.stop(2000)

    async def _audit(self, entries: Sequence[Entry]) -> Sequence[Outcome]:
        self.audited += [entry.run_id for entry in entries]
        return [None] * len(entries)

    async def hold(self, org: str, number: int, *, kind: EntryKind = EntryKind.HELD, name: str = "") -> list[str]:
        """Hold so many runs of the organization's one environment."""
        run_ids = [f"{name or org}-{index:03}" for index in range(number)]
        for run_id in run_ids:
            snapshot = Snapshot(run_id=run_id, org_id=org, env_id=f"env-{org}", task_id="t", created_at=NOW)
            await self.buffer.accept(run_id, f"env-{org}", org, snapshots.encode(snapshot), kind=kind)
        return run_ids

    async def entries(self, org: str, run_ids: Sequence[str]) -> list[Entry]:
        return [entry for entry in await self.buffer.get_entries(org, run_ids) if isinstance(entry, Entry)]

    async def is_drained(self) -> bool:
        return (await self.buffer.counts()).left == 0

    def changes(self) -> dict[str, float]:
        """How often the breaker came to each state."""
        points = self.observed.points("mollifier.breaker.changes").items()
        return {dict(point)["state"]: value for point, value in points}

    def moments(self) -> list[float]:
        """When the engine was called, seconds."""
        return [round(moment_s, 2) for moment_s, _ in self.engine.calls]


@pytest.fixture
def bench(redis_client: Redis) -> Bench:
    return Bench(redis_client)


# --- a sick engine -------------------------------------------------------------------------------------------------


async def test_while_the_engine_is_away_nothing_is_taken_but_one_entry_after_ever_longer_pauses(bench: Bench) -> None:
    run_ids = await bench.hold("a", 8)
    bench.engine.fails_all_with(AWAY)
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 16)
        assert bench.moments() == [0, 0.2, 0.6, 1.4, 3.0, 6.2, 11.2]
        assert [len(run_ids) for _, run_ids in bench.engine.calls] == [8, 1, 1, 1, 1, 1, 1]
        assert {(entry.state, entry.attempts) for entry in await bench.entries("a", run_ids)} == {
            (EntryState.QUEUED, 0)
        }


@pytest.mark.parametrize("fault", [AWAY, FAILING], ids=["away", "failing whatever it is given"])
@pytest.mark.parametrize(("organizations", "depth"), [(1, 120), (40, 12)])
async def test_a_sick_engine_is_asked_a_handful_of_times_a_second_however_much_waits_for_it(
    bench: Bench, fault: Exception, organizations: int, depth: int
) -> None:
    for number in range(organizations):
        await bench.hold(f"org-{number}", depth)
    bench.engine.fails_all_with(fault)
    # The shortest pauses there are.
    bench.jitter = 0.999
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 60)
    by_second = Counter(int(moment_s) for moment_s, _ in bench.engine.calls)
    # What was under way when it fell sick; from then on a few, then fewer.
    assert by_second.pop(0) <= SETTINGS.drain_concurrency + 5
    assert max(by_second.values()) <= 2
    assert sum(by_second.values()) <= 30
    assert (await bench.buffer.counts()).left == organizations * depth


async def test_a_batch_that_a_sick_engine_fails_is_not_tried_entry_by_entry(bench: Bench) -> None:
    run_ids = await bench.hold("a", 8)
    bench.engine.fails_all_with(FAILING)
    (popped,) = await bench.buffer.pop_many([(Ready("a", "env-a"), 8)])
    assert isinstance(popped, Popped)

    outcomes = await bench.materialiser.handle(popped.entries)

    assert [asked for _, asked in bench.engine.calls] == [run_ids, run_ids[:1], run_ids[-1:]]
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, *[EngineFailingError] * 6, RuntimeError]


async def test_entries_that_were_taken_while_it_fell_away_are_put_back_unhandled(
    bench: Bench, redis_client: Redis
) -> None:
    """The second tick has popped when the first one's batch fails."""
    fallen = asyncio.Event()

    class Late(Buffer):
        pops = 0

        async def pop_many(self, shares: Sequence[tuple[Ready, int]]) -> list[Popped | BufferUnavailableError]:
            popped = await super().pop_many(shares)
            self.pops += bool(shares)
            if self.pops == 2:
                fallen.set()
                await until(opened)
            return popped

    async def opened() -> bool:
        return bench.changes().get("open", 0) > 0

    class Waiting(Engine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            await fallen.wait()
            return await super().create_held_runs(creations)

    bench.buffer = Late(Server(redis_client), lambda: bench.settings)
    bench.engine = Waiting(bench.time)
    bench.engine.fails_all_with(AWAY)
    run_ids = await bench.hold("a", 16)
    async with bench.draining() as drainer:

        async def all_are_put_back() -> bool:
            states = {(entry.state, entry.attempts) for entry in await bench.entries("a", run_ids)}
            return drainer.in_flight == 0 and await opened() and states == {(EntryState.QUEUED, 0)}

        await until(all_are_put_back)
        assert [asked for _, asked in bench.engine.calls] == [run_ids[:8]]


async def test_an_entry_that_was_changed_while_the_engine_fell_away_is_put_back_and_comes_again(bench: Bench) -> None:
    (run_id,) = await bench.hold("a", 1)

    class Changing(Engine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            created = await super().create_held_runs(creations)
            if len(self.calls) == 1:
                (entry,) = await bench.entries("a", [run_id])
                assert await bench.buffer.patch(entry, patches.encode(patches.AddTags(("late",), NOW))) == "held"
                self.fails_all_with(AWAY)
            return created

    bench.engine = Changing(bench.time)
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 0.1)
        (entry,) = await bench.entries("a", [run_id])
        assert (entry.state, entry.attempts) == (EntryState.QUEUED, 0)
        assert (len(bench.engine.calls), bench.changes()) == (2, {"open": 1})
        bench.engine.fails_all_with(None)
        await bench.time.pass_until(drainer, bench.is_drained)


# --- it recovers ---------------------------------------------------------------------------------------------------


async def test_when_it_is_back_ever_more_is_taken_and_every_organization_has_its_turn(bench: Bench) -> None:
    organizations = [f"org-{number:02}" for number in range(12)]
    for org in organizations:
        await bench.hold(org, 20)
    bench.engine.fails_all_with(AWAY)
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 5)
        bench.engine.fails_all_with(None)
        await bench.time.pass_until(drainer, bench.is_drained)
    assert [len(batch) for batch in bench.engine.batches[:3]] == [1, 1, 1]
    assert bench.changes() == {
        "open": bench.changes()["open"],
        "half_open": bench.changes()["open"],
        "ramping": 1,
        "closed": 1,
    }
    # Nobody's second batch comes before everybody has had one, give or take those that a tick serves at a time.
    first_places = {
        org: next(i for i, run in enumerate(bench.engine.created) if run.startswith(org)) for org in organizations
    }
    assert max(first_places.values()) <= 3 * len(organizations)
    assert len(bench.engine.created) == 240
    for org in organizations:
        own = [run_id for run_id in bench.engine.created if run_id.startswith(org)]
        assert own == sorted(own)


async def test_an_engine_that_falls_away_again_while_it_is_tried_is_left_alone_for_longer(bench: Bench) -> None:
    await bench.hold("a", 50)
    bench.engine.fails_all_with(AWAY)
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 1)
        calls = len(bench.engine.calls)
        bench.engine.fault = lambda _: AWAY if len(bench.engine.created) >= 3 else None
        await bench.time.pass_s(drainer, 10)
    since = bench.moments()[calls:]
    assert [len(asked) for _, asked in bench.engine.calls[calls : calls + 3]] == [1, 2, 4]
    assert [round(later - sooner, 1) for sooner, later in itertools.pairwise(since[2:5])] == [1.6, 3.2]


# --- what is not the engine's fault --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [FAILING, InvalidRequestError()], ids=["failing", "invalid"])
async def test_bad_entries_among_good_ones_open_nothing(bench: Bench, fault: Exception) -> None:
    bench.settings = Settings(partitions=4, drain_concurrency=16, drain_batch_size=8, drain_max_attempts=2)
    good = await bench.hold("good", 40)
    mixed = await bench.hold("mixed", 40)
    bad = [run_id for index, run_id in enumerate(mixed) if index % 9 == 4]
    bench.engine.fails_those(fault, *bad)
    async with bench.draining() as drainer:

        async def all_is_settled() -> bool:
            counts = await bench.buffer.counts()
            return counts.left == counts.failed

        await bench.time.pass_until(drainer, all_is_settled)
    assert bench.changes() == {}
    assert sorted(bench.engine.created) == sorted({*good, *mixed} - {*bad})


async def test_one_tenants_entries_that_all_fail_keep_nobody_elses_waiting(bench: Bench) -> None:
    bench.settings = Settings(
        partitions=4, drain_concurrency=16, drain_batch_size=8, drain_max_attempts=2, drain_retry_base_ms=1
    )
    bad = await bench.hold("bad", 30)
    bench.engine.fails_those(FAILING, *bad)
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 3)
        good = [run_id for number in range(6) for run_id in await bench.hold(f"good-{number}", 20)]

        async def the_good_are_done() -> bool:
            return len(bench.engine.created) == len(good)

        before_s = bench.time.now_s
        await bench.time.pass_until(drainer, the_good_are_done)
        assert bench.time.now_s - before_s < 30
    assert sorted(bench.engine.created) == sorted(good)


async def test_an_audit_copy_tells_nothing_of_the_engine(bench: Bench) -> None:
    await bench.hold("a", 1)
    bench.engine.fails_all_with(AWAY)
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 0.1)
        copies = await bench.hold("copies", 30, kind=EntryKind.AUDIT)

        async def copies_are_drained() -> bool:
            return len(bench.audited) == len(copies)

        await bench.time.pass_until(drainer, copies_are_drained)
        assert "closed" not in bench.changes()
        assert "ramping" not in bench.changes()


# --- what an operator sees -----------------------------------------------------------------------------------------


async def test_its_state_is_shown_counted_and_logged_once_per_change(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mollifier")
    await bench.hold("a", 40)
    bench.engine.fails_all_with(AWAY)
    state = labels(breaker="engine")
    async with bench.draining() as drainer:
        await bench.time.pass_s(drainer, 30)
        assert bench.observed.points("mollifier.breaker.state")[state] == 2
        assert await bench.buffer.is_engine_away()
        bench.engine.fails_all_with(None)
        await bench.time.pass_until(drainer, bench.is_drained)
        assert bench.observed.points("mollifier.breaker.state")[state] == 0

        async def others_know() -> bool:
            return not await bench.buffer.is_engine_away()

        await bench.time.pass_until(drainer, others_know)
    told: list[Any] = [r.__dict__["fields"] for r in caplog.records if r.getMessage() == "mollifier.engine_breaker"]
    assert told == [{"state": "open"}, {"state": "ramping"}, {"state": "closed"}]
    assert bench.changes()["open"] > 5
