"""The sweeper: one of all processes sweeps, another takes over when it stops or dies, and nobody else is harmed by one that was frozen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.errors import BufferUnavailableError
from mollifier.keys import SWEEPER_CLAIM, SWEEPER_REPORT, PartitionKeys
from mollifier.model import EntryKind
from mollifier.server import Server, connect
from mollifier.sweeper import Sweeper
from mollifier.sweeps import INDEXES, MISMATCHES
from tests.core.observed import Observed, labels
from tests.core.support import ENV, ORG, SETTINGS, execute, hold, lifetime_ms, until

HELD = EntryKind.HELD
CLAIM_MS = 300
LAST = "org:6"
"""An organization in the last partition, which a sweep comes to last."""

pytestmark = pytest.mark.leaves_keys

GAUGES = ("stale", "oldest", "held.entries", "held.size", "dead_letters", "orphans", "mismatches")


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.slept_s.append(duration_s)
        await asyncio.sleep(0.001)


class Replica:
    """One process: its sweeper, and what it shows."""

    def __init__(self, buffer: Buffer, token: str, claim_ms: int = CLAIM_MS, clock: Clock | None = None) -> None:
        self.observed = Observed()
        self.clock = clock or Clock()
        self.sweeper = Sweeper(
            buffer,
            lambda: SETTINGS,
            self.observed.telemetry,
            claim_ms=claim_ms,
            sleep=self.clock.sleep,
            monotonic=self.clock.monotonic,
            new_token=lambda: token,
        )

    def shown(self) -> dict[str, float]:
        """What the gauges show that is not zero; fails where a series is missing."""
        shown: dict[str, float] = {}
        for name in GAUGES:
            points = self.observed.points(f"mollifier.sweep.{name}")
            assert len(points) == {"orphans": len(INDEXES), "mismatches": len(MISMATCHES)}.get(name, 1)
            for point, value in points.items():
                shown[".".join([name, *(str(label) for _, label in point)])] = value
        return {name: value for name, value in shown.items() if value}


@asynccontextmanager
async def running(*replicas: Replica) -> AsyncGenerator[None]:
    for replica in replicas:
        replica.sweeper.start()
    try:
        yield
    finally:
        for replica in replicas:
            await replica.sweeper.stop()


def true(condition: Callable[[], object]) -> Callable[[], Awaitable[bool]]:
    async def is_true() -> bool:
        return bool(condition())

    return is_true


async def holder(redis: Redis) -> bytes | None:
    return await execute(redis, "GET", SWEEPER_CLAIM)


# --- what is shown -------------------------------------------------------------------------------------------------


async def test_what_a_sweep_finds_is_shown_and_falls_back_to_zero_with_the_next(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    replica = Replica(buffer, "a", claim_ms=60_000)
    assert replica.shown() == {}
    await hold(buffer, "a", "b", "gone", kind=HELD, payload=b"12345")
    await execute(redis_client, "DEL", keys.orgs, keys.envs(ORG), keys.entry("gone"))
    await execute(redis_client, "HSET", keys.entry("a"), "accepted_ms", await buffer.now_ms() - 60_000)

    assert await replica.sweeper.sweep()

    shown = replica.shown()
    assert shown.pop("oldest") >= 60_000
    assert shown == {
        "stale": 1,
        "held.entries": 3,
        "held.size": 15,
        "dead_letters": 1,
        "orphans.queue": 1,
        "orphans.held": 1,
        "orphans.owners": 1,
        "mismatches.missing": 2,
    }
    for run_id in ("a", "b"):
        entry = await buffer.pop(ORG, ENV)
        assert entry is not None
        assert (entry.run_id, await buffer.ack(entry)) == (run_id, "held")
    assert await replica.sweeper.sweep()
    assert replica.shown() == {"dead_letters": 1}
    await replica.sweeper.stop()


async def test_every_replica_reads_the_report_of_the_one_that_swept(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    assert await buffer.last_sweep() is None
    await hold(buffer, "a", kind=HELD)
    await execute(redis_client, "DEL", keys.queue(ENV))
    before_ms = await buffer.now_ms()
    assert await Replica(buffer, "a", claim_ms=60_000).sweeper.sweep()
    report = await buffer.last_sweep()
    assert report is not None
    assert before_ms <= report.at_ms <= await buffer.now_ms()
    assert (report.mismatches, report.repaired, report.entries) == ({"unplaced": 1}, {"returned": 1}, 1)
    left_ms = await lifetime_ms(redis_client, SWEEPER_REPORT)
    assert left_ms is not None
    assert 6 * 86_400_000 < left_ms <= 7 * 86_400_000


async def test_a_report_replaces_the_last_one_whole_on_a_full_server_too(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    replica = Replica(buffer, "a", claim_ms=60_000)
    await hold(buffer, "a", kind=HELD)
    await execute(redis_client, "DEL", keys.queue(ENV))
    assert await replica.sweeper.sweep()
    await execute(redis_client, "CONFIG", "SET", "maxmemory", 1)
    try:
        assert await replica.sweeper.sweep()
    finally:
        await execute(redis_client, "CONFIG", "SET", "maxmemory", 0)
    report = await buffer.last_sweep()
    assert report is not None
    assert (report.mismatches, report.repaired, report.entries) == ({}, {}, 1)


# --- who sweeps ----------------------------------------------------------------------------------------------------


async def test_of_two_replicas_one_sweeps_and_the_other_shows_zeros(buffer: Buffer, redis_client: Redis) -> None:
    await hold(buffer, "a", kind=HELD)
    first, second = Replica(buffer, "a", claim_ms=60_000), Replica(buffer, "b", claim_ms=60_000)
    async with running(first):
        await until(true(first.shown))
        async with running(second):
            await until(true(lambda: len(second.clock.slept_s) > 2))
            assert (first.sweeper.is_elected, second.sweeper.is_elected) == (True, False)
            assert second.shown() == {}
            assert not await second.sweeper.sweep()
            await first.sweeper.stop()
            assert first.shown() == {}
            await until(true(second.shown))
    assert await holder(redis_client) is None


async def test_when_the_one_that_sweeps_dies_another_takes_over_once_its_claim_has_run_out(
    buffer: Buffer, redis_client: Redis
) -> None:
    await hold(buffer, "a", kind=HELD)
    dead = Replica(buffer, "dead")
    assert await dead.sweeper.sweep()
    heir = Replica(buffer, "heir")
    assert not await heir.sweeper.sweep()

    async def takes_over() -> bool:
        return await heir.sweeper.sweep()

    await until(takes_over)
    assert await holder(redis_client) == b"claim:heir"
    assert heir.shown()


async def test_one_that_was_frozen_breaks_its_sweep_off_when_another_has_taken_over(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    heir = Replica(buffer, "heir", claim_ms=60_000)

    class Freezing(Clock):
        async def sleep(self, duration_s: float) -> None:
            """Be away, after the first piece, for longer than the claim lives."""
            if await holder(redis_client) == b"claim:frozen":
                await execute(redis_client, "DEL", SWEEPER_CLAIM)
                assert await heir.sweeper.sweep()
                await hold(buffer, "a", kind=HELD, org=LAST)
                await execute(redis_client, "DEL", buffer.keyspace.of(LAST).queue(ENV))
                self.now_s += 2 * CLAIM_MS

    frozen = Replica(buffer, "frozen", clock=Freezing())
    assert not await frozen.sweeper.sweep()
    assert frozen.shown() == {}
    assert await execute(redis_client, "EXISTS", buffer.keyspace.of(LAST).queue(ENV)) == 0
    report = await buffer.last_sweep()
    assert report is not None
    assert report.entries == 0
    await frozen.sweeper.stop()
    assert await holder(redis_client) == b"claim:heir"


async def test_a_report_of_one_that_was_deposed_is_refused(buffer: Buffer, redis_client: Redis) -> None:
    replica = Replica(buffer, "a", claim_ms=60_000)
    assert await replica.sweeper.sweep()
    before = await buffer.last_sweep()
    await execute(redis_client, "SET", SWEEPER_CLAIM, "claim:b", "PX", 60_000)
    assert not await replica.sweeper.sweep()
    assert await buffer.last_sweep() == before
    assert not replica.sweeper.is_elected


async def test_a_claim_lives_as_long_as_it_is_renewed_and_no_longer(buffer: Buffer, redis_client: Redis) -> None:
    replica = Replica(buffer, "a", claim_ms=60_000)
    assert await replica.sweeper.sweep()
    left_ms = await lifetime_ms(redis_client, SWEEPER_CLAIM)
    assert left_ms is not None
    assert left_ms <= 60_000
    await execute(redis_client, "PEXPIRE", SWEEPER_CLAIM, 10_000)
    replica.clock.now_s += 20
    assert await replica.sweeper.sweep()
    left_ms = await lifetime_ms(redis_client, SWEEPER_CLAIM)
    assert left_ms is not None
    assert left_ms > 10_000
    replica.clock.now_s += 59
    assert replica.sweeper.is_elected
    replica.clock.now_s += 1
    assert not replica.sweeper.is_elected


# --- the loop ------------------------------------------------------------------------------------------------------


async def test_it_sweeps_once_an_interval_and_keeps_its_claim_in_between(buffer: Buffer) -> None:
    replica = Replica(buffer, "a", claim_ms=15_000)
    reports: list[int] = []

    async def three_have_come() -> bool:
        report = await buffer.last_sweep()
        if report is not None and report.at_ms not in reports:
            reports.append(report.at_ms)
        return len(reports) == 3

    async with running(replica):
        await until(three_have_come)
    waited_s = [slept_s for slept_s in replica.clock.slept_s if slept_s > 1]
    assert max(waited_s) == pytest.approx(5)
    assert sum(waited_s[:6]) == pytest.approx(SETTINGS.sweep_interval_s)


async def test_starting_it_twice_starts_one_and_stopping_it_twice_is_harmless(
    buffer: Buffer, redis_client: Redis
) -> None:
    replica = Replica(buffer, "a", claim_ms=60_000)
    async with running(replica, replica):
        await until(true(lambda: replica.sweeper.is_elected))
        loops = [task for task in asyncio.all_tasks() if task.get_name() == "mollifier-sweep"]
        assert len(loops) == 1
    assert await holder(redis_client) is None


async def test_a_server_that_is_away_costs_it_nothing_but_time(buffer: Buffer, redis_url: str) -> None:
    class Flaky(Server):
        away = True

        async def run_many(self, commands: list[tuple[str]]) -> list[object]:  # pyright: ignore[reportIncompatibleMethodOverride]
            if self.away:
                raise BufferUnavailableError("away")
            return await super().run_many(commands)

    await hold(buffer, "a", kind=HELD)
    async with connect(redis_url) as redis:
        server = Flaky(redis)
        replica = Replica(Buffer(server, lambda: SETTINGS), "a", claim_ms=15_000)
        async with running(replica):
            await until(true(lambda: len(replica.clock.slept_s) > 3))
            assert replica.clock.slept_s[:3] == [0.1, 0.2, 0.4]
            assert replica.observed.points("mollifier.drain.faults")[labels(operation="sweep")] >= 3
            server.away = False
            await until(true(replica.shown))
            server.away = True
            # What was found is shown for as long as nobody else can have been elected.
            await until(true(lambda: not replica.sweeper.is_elected))
            await until(true(lambda: replica.shown() == {}))
        assert replica.shown() == {}


async def test_what_it_shows_is_gone_when_the_server_has_forgotten_everything(
    buffer: Buffer, redis_client: Redis
) -> None:
    await hold(buffer, "a", kind=HELD)
    replica = Replica(buffer, "a", claim_ms=15_000)
    async with running(replica):
        await until(true(replica.shown))
        await execute(redis_client, "FLUSHALL")
        await until(true(lambda: replica.shown() == {}))

        async def has_swept_anew() -> bool:
            return await buffer.last_sweep() is not None

        await until(has_swept_anew)
