"""The drainer: fair, bounded, and never dead of a fault, on a real server with handlers that tests control."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from mollifier.backoff import Backoff
from mollifier.buffer import Buffer, Popped, Ready, Reclaimed
from mollifier.drainer import Drainer
from mollifier.errors import BufferUnavailableError, EngineUnavailableError, NonRetryableError
from mollifier.handling import GiveUp, Handler, Outcome
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.scripts import Settlement
from mollifier.server import Server, connect
from mollifier.settings import Settings
from tests.core.observed import Observed, labels
from tests.core.support import ENV, ORG, execute, expire_lease, hold, state_of, take, until

SETTINGS = Settings(
    partitions=8, drain_concurrency=10, drain_batch_size=5, drain_poll_interval_ms=5, drain_max_attempts=3
)


COUNT_UNSETTLED = """
local unsettled = 0
for _, noun in ipairs({'queue:', 'waiting:', 'draining'}) do
  for _, key in ipairs(redis.call('KEYS', 'mollifier:*:' .. noun .. '*')) do
    unsettled = unsettled + redis.call('ZCARD', key)
  end
end
return unsettled
"""


class Sleep:
    """Notes every pause and hardly takes one."""

    def __init__(self) -> None:
        self.pauses_ms: list[int] = []

    async def __call__(self, seconds: float) -> None:
        self.pauses_ms.append(round(seconds * 1000))
        await asyncio.sleep(min(seconds, 0.001))


class Handled:
    """A handler that notes what it was given and answers what the test wants."""

    def __init__(self, answer: Callable[[Entry], Outcome] = lambda _: None) -> None:
        self._answer = answer
        self.batches: list[list[str]] = []
        self.attempts: list[int] = []

    async def __call__(self, entries: Sequence[Entry]) -> Sequence[Outcome]:
        self.batches.append([entry.run_id for entry in entries])
        self.attempts += [entry.attempts for entry in entries]
        return [self._answer(entry) for entry in entries]

    @property
    def run_ids(self) -> list[str]:
        return [run_id for batch in self.batches for run_id in batch]


class FaultyBuffer(Buffer):
    """A buffer whose server gives no answer to the next `faults[operation]` calls of an operation."""

    def __init__(self, server: Server, settings: Callable[[], Settings]) -> None:
        super().__init__(server, settings)
        self.faults: Counter[str] = Counter()

    def _maybe_fail(self, operation: str) -> None:
        if self.faults[operation] > 0:
            self.faults[operation] -= 1
            raise BufferUnavailableError(f"no answer to {operation}")

    async def ready(self, among: Iterable[str] | None = None) -> Any:
        self._maybe_fail("ready")
        return await super().ready(among)

    async def pop_many(self, shares: Sequence[tuple[Ready, int]]) -> list[Popped | BufferUnavailableError]:
        if shares:
            self._maybe_fail("pop")
        return await super().pop_many(shares)

    async def ack_many(self, entries: Sequence[Entry]) -> list[Settlement | BufferUnavailableError]:
        self._maybe_fail("ack")
        return await super().ack_many(entries)

    async def requeue_many(
        self, entries: Sequence[Entry], *, not_before_ms: int | None = None, attempts: int = 1
    ) -> list[Settlement | BufferUnavailableError]:
        self._maybe_fail("requeue")
        return await super().requeue_many(entries, not_before_ms=not_before_ms, attempts=attempts)

    async def fail_many(self, entries: Sequence[Entry], error: str) -> list[Settlement | BufferUnavailableError]:
        self._maybe_fail("fail")
        return await super().fail_many(entries, error)

    async def extend_many(self, entries: Sequence[Entry]) -> list[Settlement | BufferUnavailableError]:
        self._maybe_fail("extend")
        return await super().extend_many(entries)

    async def reclaim_expired(self, limit: int = 100) -> Reclaimed:
        self._maybe_fail("reclaim")
        return await super().reclaim_expired(limit)


class Bench:
    """A buffer on a real server, and drainers of it."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self.settings = settings
        self.buffer = FaultyBuffer(Server(redis), lambda: self.settings)
        self.observed = Observed()
        self.sleep = Sleep()

    def drainer(
        self,
        handler: Handler,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        give_up: GiveUp | None = None,
    ) -> Drainer:
        return Drainer(
            self.buffer,
            handler,
            lambda: self.settings,
            self.observed.telemetry,
            give_up=give_up,
            sleep=sleep or self.sleep,
            jitter=lambda: 0.0,
        )

    @asynccontextmanager
    async def draining(self, handler: Handler, give_up: GiveUp | None = None) -> AsyncGenerator[Drainer]:
        drainer = self.drainer(handler, give_up=give_up)
        drainer.start()
        try:
            yield drainer
        finally:
            await drainer.stop(2000)

    async def nothing_is_left(self) -> bool:
        """Tell whether everything is settled, seen at one moment."""
        return await execute(self._redis, "EVAL", COUNT_UNSETTLED, 0) == 0

    async def state(self, run_id: str, org: str = ORG) -> EntryState | None:
        entry = await self.buffer.get_entry(org, run_id)
        return entry and entry.state

    def outcomes(self) -> dict[str, float]:
        points = self.observed.points("mollifier.drain.entries")
        return {dict(point)["outcome"]: value for point, value in points.items()}


@pytest.fixture
def bench(redis_client: Redis) -> Bench:
    return Bench(redis_client, SETTINGS)


async def hang(entries: Sequence[Entry]) -> Sequence[Outcome]:
    await asyncio.Event().wait()
    raise AssertionError


def raising(error: Exception) -> Handler:
    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        raise error

    return handle


# --- the plain case ------------------------------------------------------------------------------------------------


async def test_everything_held_is_handled_once_in_order_and_acked(bench: Bench) -> None:
    names = [f"run-{n:02}" for n in range(23)]
    await hold(bench.buffer, *names)
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert handler.run_ids == names
    assert {await bench.state(name) for name in names} == {EntryState.MATERIALISED}
    assert bench.outcomes() == {"acked": 23}


async def test_what_is_accepted_later_is_drained_too(bench: Bench) -> None:
    handler = Handled()
    async with bench.draining(handler):
        await until(idle(bench))
        await hold(bench.buffer, "late")
        await until(bench.nothing_is_left)
    assert handler.run_ids == ["late"]


def idle(bench: Bench) -> Callable[[], Awaitable[bool]]:
    """Return the condition that the drainer found nothing and paused, from now on."""
    before = bench.sleep.pauses_ms.count(bench.settings.drain_poll_interval_ms)

    async def paused() -> bool:
        return bench.sleep.pauses_ms.count(bench.settings.drain_poll_interval_ms) > before

    return paused


async def test_one_rotation_spans_all_partitions(bench: Bench) -> None:
    organizations = [f"org-{n:02}" for n in range(30)]
    for org in organizations:
        await hold(bench.buffer, f"run of {org}", env=f"env of {org}", org=org)
    assert len({bench.buffer.keyspace.of(org) for org in organizations}) > 4
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert handler.run_ids == [f"run of {org}" for org in organizations]


# --- fair ----------------------------------------------------------------------------------------------------------


async def position_of_light_among(bench: Bench, depth: int, neighbours: int) -> int:
    """Return how many entries were handled before the one of a light organization."""
    for number in range(neighbours):
        names = (f"heavy-{number}-{n}" for n in range(depth))
        await hold(bench.buffer, *names, env=f"heavy-{number}", org=f"heavy-{number}")
    await hold(bench.buffer, "light", env="light", org="light")
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    return handler.run_ids.index("light")


@pytest.mark.parametrize("depth", [20, 300])
async def test_a_light_environment_does_not_wait_for_its_neighbours_depth(bench: Bench, depth: int) -> None:
    assert await position_of_light_among(bench, depth, neighbours=3) < SETTINGS.drain_concurrency


async def test_a_light_organization_is_served_within_one_round_of_more_neighbours_than_slots(bench: Bench) -> None:
    assert await position_of_light_among(bench, 20, neighbours=25) <= 26 * SETTINGS.drain_concurrency


async def test_a_light_environment_does_not_wait_for_the_depth_of_one_in_its_own_organization(bench: Bench) -> None:
    await hold(bench.buffer, *(f"heavy-{n}" for n in range(200)), env="heavy")
    await hold(bench.buffer, "light", env="light")
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert handler.run_ids.index("light") <= 2 * SETTINGS.drain_batch_size


async def test_a_ticks_capacity_is_dealt_round_robin(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_concurrency=10, drain_batch_size=50)
    for org in "abc":
        await hold(bench.buffer, *(f"{org}{n}" for n in range(20)), env=f"env-{org}", org=org)
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert [len(batch) for batch in handler.batches[:3]] == [4, 3, 3]
    assert [batch[0] for batch in handler.batches[:3]] == ["a0", "b0", "c0"]


async def test_a_batch_is_never_larger_than_its_quota(bench: Bench) -> None:
    await hold(bench.buffer, *(f"run-{n}" for n in range(60)))
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert max(len(batch) for batch in handler.batches) == SETTINGS.drain_batch_size


# --- bounded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 7])
async def test_no_more_entries_are_in_flight_than_the_concurrency_allows(bench: Bench, concurrency: int) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_concurrency=concurrency)
    # One entry each, over all partitions: their leases have the same numbers.
    organizations = [f"org-{n}" for n in range(24)]
    for org in organizations:
        await hold(bench.buffer, f"run of {org}", env=f"env of {org}", org=org)
    at_work, most = 0, 0
    turn = asyncio.Condition()

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        nonlocal at_work, most
        at_work += len(entries)
        most = max(most, at_work)
        async with turn:
            await turn.wait()
        at_work -= len(entries)
        return [None] * len(entries)

    async with bench.draining(handle) as drainer:
        while not await bench.nothing_is_left():
            for _ in range(5):
                assert (await bench.buffer.counts()).draining <= concurrency
                assert drainer.in_flight <= concurrency
            async with turn:
                turn.notify(1)
    assert most == concurrency


async def test_entries_are_in_flight_until_they_are_settled_on_the_server(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_concurrency=2, drain_batch_size=2)
    await hold(bench.buffer, *(f"run-{n}" for n in range(10)))
    most = 0

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        nonlocal most
        most = max(most, (await bench.buffer.counts()).draining)
        return [None] * len(entries)

    async with bench.draining(handle):
        await until(bench.nothing_is_left)
    assert most <= 2


# --- retries -------------------------------------------------------------------------------------------------------


async def failed(bench: Bench, run_id: str = "run", org: str = ORG) -> Entry:
    """Wait until the run has failed; return its entry."""

    async def has_failed() -> bool:
        return await bench.state(run_id, org) is EntryState.FAILED

    await until(has_failed)
    entry = await bench.buffer.get_entry(org, run_id)
    assert entry is not None
    return entry


@pytest.mark.leaves_keys
async def test_a_retryable_error_is_retried_up_to_the_attempts_that_are_set_and_then_failed(bench: Bench) -> None:
    await hold(bench.buffer, "run", kind=EntryKind.HELD)
    handler = Handled(lambda _: ValueError("try again"))
    async with bench.draining(handler):
        entry = await failed(bench)
    assert handler.attempts == [0, 1, 2]
    assert (entry.attempts, entry.error, entry.payload) == (3, "ValueError: try again", b"payload")
    assert bench.outcomes() == {"requeued": 2, "failed": 1}


async def test_a_non_retryable_error_fails_at_once(bench: Bench) -> None:
    await hold(bench.buffer, "run")
    handler = Handled(lambda _: NonRetryableError("never"))
    async with bench.draining(handler):
        entry = await failed(bench)
    assert handler.attempts == [0]
    assert (entry.attempts, entry.error) == (1, "NonRetryableError: never")


async def test_a_handler_that_raises_speaks_for_all_its_entries(bench: Bench) -> None:
    await hold(bench.buffer, "a", "b")
    async with bench.draining(raising(NonRetryableError("all of you"))):
        assert (await failed(bench, "a")).error == "NonRetryableError: all of you"
        assert (await failed(bench, "b")).error == "NonRetryableError: all of you"


async def test_each_entry_of_a_batch_is_settled_by_its_own_outcome(bench: Bench) -> None:
    await hold(bench.buffer, "fine", "poison", "shaky", "good")
    outcomes: dict[str, Exception] = {"poison": NonRetryableError("never"), "shaky": ValueError("once")}

    def answer(entry: Entry) -> Outcome:
        return outcomes.get(entry.run_id) if entry.attempts == 0 else None

    handler = Handled(answer)
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    states = {name: await bench.state(name) for name in ("fine", "poison", "shaky", "good")}
    assert states.pop("poison") is EntryState.FAILED
    assert set(states.values()) == {EntryState.MATERIALISED}
    assert handler.run_ids.count("shaky") == 2


async def test_a_poison_entry_at_the_head_blocks_nobody_behind_it(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_batch_size=1, drain_concurrency=1)
    await hold(bench.buffer, "poison", "next")
    handler = Handled(lambda entry: ValueError("again") if entry.run_id == "poison" else None)
    drainer = Drainer(
        bench.buffer,
        handler,
        lambda: bench.settings,
        bench.observed.telemetry,
        sleep=bench.sleep,
        jitter=lambda: 0.999,
    )
    drainer.start()

    async def next_is_done() -> bool:
        return await bench.state("next") is EntryState.MATERIALISED

    await until(next_is_done)
    assert handler.run_ids[:2] == ["poison", "next"]
    await drainer.stop(2000)


async def test_retries_wait_longer_each_time(bench: Bench, redis_client: Redis) -> None:
    await hold(bench.buffer, "run")
    delays: list[float] = []
    scale = 0.1

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        return [ValueError("again")] * len(entries)

    class Watching(FaultyBuffer):
        async def requeue_many(
            self, entries: Sequence[Entry], *, not_before_ms: int | None = None, attempts: int = 1
        ) -> list[Settlement | BufferUnavailableError]:
            assert not_before_ms is not None
            delays.append(not_before_ms - entries[0].accepted_at_ms - entries[0].dwell_ms)
            return await super().requeue_many(entries, not_before_ms=not_before_ms, attempts=attempts)

    drainer = Drainer(
        Watching(Server(redis_client), lambda: bench.settings),
        handle,
        lambda: bench.settings,
        bench.observed.telemetry,
        sleep=bench.sleep,
        jitter=lambda: scale,
        monotonic=lambda: 0.0,
    )
    drainer.start()
    await failed(bench)
    await drainer.stop(2000)
    assert delays == [21, 41]


@pytest.mark.parametrize("answers", [[], [None, None]], ids=["too few", "too many"])
async def test_a_handler_that_answers_another_number_of_outcomes_fails_its_entries(
    bench: Bench, answers: list[Outcome]
) -> None:
    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        return answers

    await hold(bench.buffer, "run")
    async with bench.draining(handle):
        assert "outcomes for 1 entries" in ((await failed(bench)).error or "")


async def test_a_handler_that_answers_no_outcomes_at_all_fails_its_entries(bench: Bench) -> None:
    async def handle(entries: Sequence[Entry]) -> Any:
        return None

    await hold(bench.buffer, "run")
    async with bench.draining(handle):
        await failed(bench)


async def test_a_handler_cancelled_from_inside_is_retried_and_then_failed(bench: Bench) -> None:
    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        raise asyncio.CancelledError

    await hold(bench.buffer, "run")
    async with bench.draining(handle):
        assert (await failed(bench)).attempts == 3


def backoffs(bench: Bench) -> list[int]:
    """Return the pauses that were taken because of faults."""
    regular = {bench.settings.drain_poll_interval_ms, round(bench.settings.lease_ms / 3)}
    return [pause for pause in bench.sleep.pauses_ms if pause not in regular]


# --- faults of the buffer ------------------------------------------------------------------------------------------


def test_back_off_doubles_from_its_floor_to_its_cap_and_starts_anew_after_a_success() -> None:
    backoff = Backoff()
    assert [backoff.next_ms() for _ in range(8)] == [100, 200, 400, 800, 1600, 3200, 5000, 5000]
    backoff.reset()
    assert backoff.next_ms() == 100


@pytest.mark.parametrize("operation", ["ready", "pop"])
async def test_a_failing_listing_or_pop_is_survived_with_growing_pauses(bench: Bench, operation: str) -> None:
    await hold(bench.buffer, "run")
    bench.buffer.faults[operation] = 7
    async with bench.draining(Handled()):
        await until(bench.nothing_is_left)
        assert backoffs(bench) == [100, 200, 400, 800, 1600, 3200, 5000]
        bench.sleep.pauses_ms.clear()
        bench.buffer.faults[operation] = 1
        await hold(bench.buffer, "next")
        await until(bench.nothing_is_left)
        assert backoffs(bench) == [100]
    assert await bench.state("run") is EntryState.MATERIALISED


async def test_faults_are_counted_by_operation(bench: Bench) -> None:
    bench.buffer.faults["ready"] = 2
    async with bench.draining(Handled()):
        await until(idle(bench))
    assert bench.observed.points("mollifier.drain.faults") == {labels(operation="list"): 2}


@pytest.mark.parametrize("faults", [1, 4, 12])
async def test_an_ack_that_fails_never_has_the_handler_run_again(bench: Bench, faults: int) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, lease_ms=100)
    await hold(bench.buffer, "run")
    bench.buffer.faults["ack"] = faults
    handler = Handled()
    async with bench.draining(handler):

        async def run_is_settled() -> bool:
            return await bench.state("run") in {EntryState.MATERIALISED, EntryState.FAILED}

        await until(run_is_settled)
    assert handler.run_ids == ["run"]
    assert await bench.state("run") is EntryState.MATERIALISED


@pytest.mark.parametrize("operation", ["requeue", "fail"])
async def test_a_failing_requeue_or_fail_is_tried_again(bench: Bench, operation: str) -> None:
    await hold(bench.buffer, "run", "other")
    bench.buffer.faults[operation] = 3
    handler = Handled(lambda entry: ValueError("again") if entry.run_id == "run" else None)
    async with bench.draining(handler):
        entry = await failed(bench)
        await until(bench.nothing_is_left)
    assert entry.attempts == 3
    assert handler.run_ids.count("other") == 1


async def test_a_broken_environment_harms_no_other(bench: Bench, redis_client: Redis) -> None:
    await hold(bench.buffer, "stuck", env="broken")
    await hold(bench.buffer, *(f"run-{n}" for n in range(20)), env="sound", org="sound")
    keys = bench.buffer.keyspace.of(ORG)
    await execute(redis_client, "SET", keys.queue("broken"), "not a sorted set", "EX", 60)
    handler = Handled()
    async with bench.draining(handler):

        async def the_sound_one_is_drained() -> bool:
            return len(handler.run_ids) == 20

        await until(the_sound_one_is_drained)
    assert bench.observed.points("mollifier.drain.faults")[labels(operation="pop")] >= 1


@pytest.mark.leaves_keys("*:failed")
async def test_broken_entries_and_references_to_nothing_are_counted_and_passed_by(
    bench: Bench, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await hold(bench.buffer, "broken", "gone", "gone too", "sound")
    keys = bench.buffer.keyspace.of(ORG)
    await execute(redis_client, "HSET", keys.entry("broken"), "accepted_ms", "yesterday")
    await execute(redis_client, "DEL", keys.entry("gone"), keys.entry("gone too"))
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert handler.run_ids == ["sound"]
    assert bench.outcomes() == {"malformed": 1, "orphaned": 2, "acked": 1}
    told = [record for record in caplog.records if record.message == "mollifier.orphans_dropped"]
    assert [record.__dict__["fields"] for record in told] == [{"count": 2}]


@pytest.mark.parametrize(
    "outcome", [NonRetryableError("never"), ValueError("again")], ids=["while it fails", "while it is put back"]
)
@pytest.mark.leaves_keys("*:failed", "*:owners")
async def test_a_held_entry_that_vanishes_while_it_is_handled_is_told_of_and_counted_once(
    bench: Bench, redis_client: Redis, caplog: pytest.LogCaptureFixture, outcome: Outcome
) -> None:
    keys = bench.buffer.keyspace.of(ORG)

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        await execute(redis_client, "DEL", keys.entry("run"))
        return [outcome]

    await hold(bench.buffer, "run", kind=EntryKind.HELD)
    async with bench.draining(handle):
        await until(bench.nothing_is_left)
        await until(idle(bench))
    assert bench.outcomes() == {"evicted": 1}
    told = [record for record in caplog.records if record.message == "mollifier.entry_evicted"]
    assert [vars(record)["fields"]["run_id"] for record in told] == ["run"]


async def test_what_the_server_refuses_to_take_back_is_told_of(bench: Bench, redis_client: Redis) -> None:
    await hold(bench.buffer, "run")
    await take(bench.buffer)
    keys = bench.buffer.keyspace.of(ORG)
    await expire_lease(redis_client, keys, "run")
    await execute(redis_client, "SET", keys.queue(ENV), "no queue", "EX", 60)

    async def it_is_told() -> bool:
        return bool(bench.observed.points("mollifier.drain.faults").get(labels(operation="reclaim")))

    async with bench.draining(Handled()):
        await until(it_is_told)


async def test_a_server_that_cut_every_connection_is_drained_again(redis_client: Redis, redis_url: str) -> None:
    handler = Handled()
    async with connect(redis_url) as redis:
        bench = Bench(redis, SETTINGS)
        async with bench.draining(handler):
            await until(idle(bench))
            await execute(redis_client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await hold(Buffer(Server(redis_client), lambda: SETTINGS), "run")
            await until(idle(bench))
            await until(bench.nothing_is_left)
    assert handler.run_ids == ["run"]


# --- leases --------------------------------------------------------------------------------------------------------


async def test_entries_that_a_dead_drainer_left_come_back(bench: Bench, redis_client: Redis) -> None:
    await hold(bench.buffer, "left", "next")
    await take(bench.buffer)
    await expire_lease(redis_client, bench.buffer.keyspace.of(ORG), "left")
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert sorted(handler.run_ids) == ["left", "next"]
    assert bench.outcomes() == {"reclaimed": 1, "acked": 2}


async def test_an_entry_that_has_come_back_too_often_is_given_up_unhandled(
    bench: Bench, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_max_reclaims=0)
    await hold(bench.buffer, "deadly", "next")
    await take(bench.buffer)
    await expire_lease(redis_client, bench.buffer.keyspace.of(ORG), "deadly")
    handler = Handled()

    async def it_is_given_up() -> bool:
        return await bench.state("deadly") is EntryState.FAILED and await bench.state("next") is EntryState.MATERIALISED

    async with bench.draining(handler):
        await until(it_is_given_up)
        await until(idle(bench))
    assert handler.run_ids == ["next"]
    assert bench.outcomes() == {"reclaimed": 1, "failed": 1, "acked": 1}
    (told,) = [record for record in caplog.records if record.message == "mollifier.entry_failed"]
    assert vars(told)["fields"]["run_id"] == "deadly"
    assert "ran out 1 times" in vars(told)["fields"]["error"]


async def test_an_entry_that_even_giving_it_up_is_deadly_for_is_a_dead_letter_and_told_of(
    bench: Bench, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_max_reclaims=0)
    await hold(bench.buffer, "deadly", "next")
    for _ in range(bench.settings.max_returns):
        await take(bench.buffer)
        await expire_lease(redis_client, bench.buffer.keyspace.of(ORG), "deadly")
        await bench.buffer.reclaim_expired()
    await take(bench.buffer)
    await expire_lease(redis_client, bench.buffer.keyspace.of(ORG), "deadly")
    handler = Handled()

    async def it_is_a_dead_letter() -> bool:
        return await bench.state("deadly") is EntryState.FAILED and await bench.state("next") is EntryState.MATERIALISED

    async with bench.draining(handler):
        await until(it_is_a_dead_letter)
        await until(idle(bench))
    assert handler.run_ids == ["next"]
    assert bench.outcomes() == {"reclaim_limit": 1, "acked": 1}
    (told,) = [record for record in caplog.records if record.message == "mollifier.reclaimed_too_often"]
    assert vars(told)["fields"]["run_id"] == "deadly"


async def test_what_came_back_is_handled_alone_after_what_has_not(bench: Bench, redis_client: Redis) -> None:
    await hold(bench.buffer, "a", "b", "c", "d")
    keys = bench.buffer.keyspace.of(ORG)
    for run_id in ("a", "b"):
        assert (await take(bench.buffer)).run_id == run_id
        await expire_lease(redis_client, keys, run_id)
    await bench.buffer.reclaim_expired()
    handler = Handled()
    async with bench.draining(handler):
        await until(bench.nothing_is_left)
    assert handler.batches == [["c", "d"], ["a"], ["b"]]


async def test_an_engine_that_is_away_is_asked_once_for_all_that_came_back(bench: Bench, redis_client: Redis) -> None:
    await hold(bench.buffer, "a", "b", "c")
    for entry in [await take(bench.buffer) for _ in range(3)]:
        await expire_lease(redis_client, bench.buffer.keyspace.of(ORG), entry.run_id)
    await bench.buffer.reclaim_expired()
    asked: list[str] = []

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        asked.extend(entry.run_id for entry in entries)
        return [EngineUnavailableError("away") if len(asked) == 1 else None for _ in entries]

    async with bench.draining(handle):
        await until(bench.nothing_is_left)
    assert asked == ["a", "a", "b", "c"]
    assert bench.outcomes() == {"requeued": 3, "acked": 3}


async def test_an_engine_that_falls_away_while_failures_are_recorded_is_asked_for_none_of_the_others(
    bench: Bench,
) -> None:
    await hold(bench.buffer, "a", "handled", "tried again", "b", "c")
    answers: dict[str, Outcome] = {"handled": None, "tried again": ValueError("no room")}
    handler = Handled(lambda entry: answers.get(entry.run_id, NonRetryableError("broken")))
    asked: list[str] = []

    async def give_up(entry: Entry, _: BaseException) -> bool:
        asked.append(entry.run_id)
        if len(asked) == 1:
            raise EngineUnavailableError("away")
        answers["tried again"] = None
        return True

    async with bench.draining(handler, give_up):
        await until(bench.nothing_is_left)

    assert asked == ["a", "a", "b", "c"]
    assert Counter(handler.run_ids) == {"a": 2, "handled": 1, "tried again": 2, "b": 2, "c": 2}
    assert set(handler.attempts) == {0, 1}
    assert bench.outcomes() == {"acked": 2, "requeued": 4, "given_up": 3}


async def test_every_lease_is_extended_while_its_handler_is_at_work(bench: Bench, redis_client: Redis) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_concurrency=50)
    organizations = [f"org-{n}" for n in range(12)]
    for org in organizations:
        await hold(bench.buffer, f"run of {org}", env=f"env of {org}", org=org)
    release = asyncio.Event()
    handled: list[str] = []

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        handled.extend(entry.run_id for entry in entries)
        await release.wait()
        return [None] * len(entries)

    async with bench.draining(handle) as drainer:

        async def all_are_at_work() -> bool:
            return drainer.in_flight == len(organizations)

        await until(all_are_at_work)
        before = await ends_of_leases(bench, redis_client)

        async def all_leases_were_pushed() -> bool:
            now = await ends_of_leases(bench, redis_client)
            return all(now[run_id] > end for run_id, end in before.items())

        await until(all_leases_were_pushed)
        release.set()
        await until(bench.nothing_is_left)
    assert sorted(handled) == sorted(f"run of {org}" for org in organizations)


async def ends_of_leases(bench: Bench, redis: Redis) -> dict[bytes, float]:
    """Return when each lease ends, by run."""
    state = await state_of(redis)
    return dict(pair for keys in bench.buffer.keyspace.partitions for pair in state.get(keys.draining, []))


@pytest.mark.parametrize("operation", ["extend", "reclaim"])
async def test_a_failing_extension_or_reclaim_ends_no_loop(bench: Bench, operation: str) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, lease_ms=100)
    bench.buffer.faults[operation] = 3
    await hold(bench.buffer, "run")
    release = asyncio.Event()

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        await release.wait()
        return [None] * len(entries)

    async def faults_are_over() -> bool:
        return bench.buffer.faults[operation] == 0

    async with bench.draining(handle):
        await until(faults_are_over)
        release.set()
        await until(bench.nothing_is_left)
    assert bench.observed.points("mollifier.drain.faults") == {labels(operation=operation): 3}


# --- starting and stopping -----------------------------------------------------------------------------------------


def loops(name: str = "mollifier-drain") -> int:
    return sum(task.get_name() == name for task in asyncio.all_tasks())


async def test_starting_twice_starts_one_loop(bench: Bench) -> None:
    drainer = bench.drainer(Handled())
    assert not drainer.running
    drainer.start()
    drainer.start()
    assert (drainer.running, loops()) == (True, 1)
    assert await drainer.stop(2000)
    assert (drainer.running, loops()) == (False, 0)


async def test_stopping_one_that_never_started_is_harmless(bench: Bench) -> None:
    drainer = bench.drainer(Handled())
    assert await drainer.stop(2000)
    assert await drainer.stop(2000)


async def test_a_stopped_drainer_can_be_started_again(bench: Bench) -> None:
    handler = Handled()
    drainer = bench.drainer(handler)
    for name in ("first", "second"):
        await hold(bench.buffer, name)
        drainer.start()
        await until(bench.nothing_is_left)
        assert await drainer.stop(2000)
    assert handler.run_ids == ["first", "second"]


async def test_a_cancellation_that_gets_lost_on_the_way_ends_the_loops_all_the_same(redis_client: Redis) -> None:
    asked = asyncio.Event()

    class LosesCancellations(FaultyBuffer):
        async def reclaim_expired(self, limit: int = 100) -> Reclaimed:
            asked.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return Reclaimed()

    bench = Bench(redis_client, SETTINGS)
    bench.buffer = LosesCancellations(Server(redis_client), lambda: SETTINGS)
    drainer = bench.drainer(Handled())
    drainer.start()
    await asked.wait()
    assert await drainer.stop(2000)

    async def no_loop_is_left() -> bool:
        return loops() + loops("mollifier-leases") == 0

    await until(no_loop_is_left)


async def test_stopping_lets_handlers_at_work_finish_and_takes_nothing_more(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_batch_size=1, drain_concurrency=1)
    await hold(bench.buffer, "working", "untouched")
    started, release = asyncio.Event(), asyncio.Event()

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        started.set()
        await release.wait()
        return [None] * len(entries)

    drainer = bench.drainer(handle)
    drainer.start()
    await started.wait()
    stopping = asyncio.create_task(drainer.stop(5000))
    await asyncio.sleep(0)
    release.set()
    assert await stopping
    assert await bench.state("working") is EntryState.MATERIALISED
    assert await bench.state("untouched") is EntryState.QUEUED


async def test_a_handler_that_hangs_does_not_keep_the_drainer_from_stopping(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await hold(bench.buffer, "run")
    drainer = bench.drainer(hang)
    drainer.start()

    async def it_hangs() -> bool:
        return drainer.in_flight == 1

    await until(it_hangs)
    assert await drainer.stop(20) is False
    assert not drainer.running
    (record,) = [r for r in caplog.records if r.getMessage() == "mollifier.drainer_stop_deadline"]
    assert record.levelno == logging.WARNING
    assert record.__dict__["fields"] == {"timeout_ms": 20, "entries_in_flight": 1}
    assert await bench.state("run") is EntryState.DRAINING


async def test_a_handler_that_refuses_to_be_cancelled_does_not_keep_the_drainer_from_stopping(bench: Bench) -> None:
    await hold(bench.buffer, "run")
    release = asyncio.Event()

    async def refuse(entries: Sequence[Entry]) -> Sequence[Outcome]:
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()
        return [None] * len(entries)

    drainer = bench.drainer(refuse)
    drainer.start()

    async def it_is_at_work() -> bool:
        return drainer.in_flight == 1

    await until(it_is_at_work)
    assert await drainer.stop(20) is False
    release.set()


async def test_a_hanging_handler_blocks_neither_other_environments_nor_the_loop(bench: Bench) -> None:
    await hold(bench.buffer, "stuck", env="stuck", org="stuck")
    handler = Handled()

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        return await (hang(entries) if entries[0].run_id == "stuck" else handler(entries))

    drainer = bench.drainer(handle)
    drainer.start()
    await hold(bench.buffer, *(f"run-{n}" for n in range(30)))

    async def the_others_are_done() -> bool:
        return len(handler.run_ids) == 30

    await until(the_others_are_done)
    assert await drainer.stop(20) is False


async def test_a_full_drainer_stops_without_waiting_for_a_slot(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_concurrency=1)
    await hold(bench.buffer, "a", "b")
    drainer = bench.drainer(hang)
    drainer.start()

    async def it_is_full() -> bool:
        return drainer.in_flight == 1

    await until(it_is_full)
    assert await drainer.stop(0) is False
    await asyncio.sleep(0)
    assert loops() == 0


async def test_the_default_deadline_is_the_one_that_is_set(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(SETTINGS, drain_shutdown_timeout_ms=0)
    await hold(bench.buffer, "run")
    drainer = bench.drainer(hang)
    drainer.start()

    async def it_hangs() -> bool:
        return drainer.in_flight == 1

    await until(it_hangs)
    assert await drainer.stop() is False


async def test_two_drainers_share_the_work_and_handle_everything_once(bench: Bench) -> None:
    for org in range(6):
        await hold(bench.buffer, *(f"{org}-{n}" for n in range(30)), env=f"env-{org}", org=f"org-{org}")
    one, other = Handled(), Handled()
    async with bench.draining(one), bench.draining(other):
        await until(bench.nothing_is_left)
    handled = one.run_ids + other.run_ids
    assert sorted(handled) == sorted(f"{org}-{n}" for org in range(6) for n in range(30))
