"""Random histories: the evaluator against a naive model, the drainer against the rule that nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer, Ready
from mollifier.drainer import Drainer
from mollifier.errors import BufferUnavailableError, EngineUnavailableError, NonRetryableError
from mollifier.handling import Outcome
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.server import Command, Reply, Server
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry
from mollifier.trip import SUB_BUCKETS
from tests.core.fuzzing import fuzz
from tests.core.support import execute, hold, until
from tests.core.virtual_time import Model, VirtualEvaluator, Window, most_in_any_span

pytestmark = [pytest.mark.fuzz, pytest.mark.leaves_keys]

START_US = 1_800_000_000_000_000
FAR_OFF_MS = 2**42


# --- the evaluator -------------------------------------------------------------------------------------------------


def any_window(rng: random.Random) -> Window:
    window_ms = rng.choice([1, 2, 7, 20, 200, 1000])
    threshold, hold_ms = rng.choice([1, 2, 5, 20]), rng.choice([1, window_ms, 3 * window_ms])
    if rng.random() < 0.3:
        return Window(bucket_us=window_ms * 1000, buckets=1, threshold=threshold, hold_ms=hold_ms)
    bucket_us = window_ms * 1000 // SUB_BUCKETS
    return Window(bucket_us=bucket_us, buckets=SUB_BUCKETS + 1, threshold=threshold, hold_ms=hold_ms)


def any_arrivals(rng: random.Random, window: Window) -> list[int]:
    """Return moments that cluster, pause, and sit on and beside the edges of buckets and windows."""
    span_us = window.bucket_us * window.buckets
    moment_us = START_US + rng.randrange(span_us)
    moments: list[int] = []
    for _ in range(rng.randrange(1, 300)):
        match rng.randrange(6):
            case 0:
                moment_us += 0
            case 1:
                moment_us += rng.randrange(window.bucket_us + 1)
            case 2:
                moment_us += rng.randrange(2 * span_us // window.threshold + 1)
            case 3:
                moment_us += window.bucket_us - moment_us % window.bucket_us + rng.choice([-1, 0, 1])
            case 4:
                moment_us += span_us + rng.choice([-window.bucket_us, -1, 0, 1])
            case _:
                moment_us += rng.randrange(span_us // 4 + 1)
        moments.append(moment_us)
    return moments


async def test_the_evaluator_answers_as_its_naive_model_does_in_any_history(redis_client: Redis) -> None:
    evaluator = VirtualEvaluator(redis_client)
    envs = itertools.count()

    async def play(rng: random.Random) -> None:
        window = any_window(rng)
        moments = any_arrivals(rng, window)
        model = Model(window)
        expected = [model.arrive(moment) for moment in moments]
        verdicts = await evaluator.arrive(f"env-{next(envs)}", window, moments)
        assert verdicts == expected, window
        if window.buckets > 1:
            window_us = window.bucket_us * (window.buckets - 1)
            passed = [moment for moment, verdict in zip(moments, verdicts, strict=True) if not verdict.tripped]
            assert most_in_any_span(passed, window_us) <= window.threshold, window
            if most_in_any_span(moments, window.bucket_us * window.buckets) <= window.threshold:
                assert passed == moments, window

    assert await fuzz(play) > 0


# --- the drainer ---------------------------------------------------------------------------------------------------


ENVIRONMENTS = [Ready(org, f"{org}/{env}") for org in ("org:1", "{org}", "org-3") for env in ("a", "b:c")]


class UnreliableServer(Server):
    """Loses questions and answers now and then: some commands never arrive, some are done and nobody learns of it."""

    def __init__(self, redis: Redis, rng: random.Random) -> None:
        super().__init__(redis)
        self._rng = rng
        self.loses = 0.0

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        if self._rng.random() < self.loses / 2:
            raise BufferUnavailableError("the question was lost")
        replies = await super().run_many(commands)
        if self._rng.random() < self.loses / 2:
            raise BufferUnavailableError("the answer was lost")
        return replies


class DrainerHistory:
    """Some drainers of one buffer, an unreliable server, and handlers that fail in every way."""

    def __init__(self, redis: Redis, rng: random.Random) -> None:
        self._rng = rng
        self._settings = Settings(
            partitions=4,
            lease_ms=1000,
            drain_concurrency=rng.choice([1, 3, 20]),
            drain_batch_size=rng.choice([1, 4, 50]),
            drain_max_orgs_per_tick=rng.choice([1, 2, 500]),
            drain_max_attempts=rng.choice([1, 3]),
            drain_poll_interval_ms=1,
        )
        self._server = UnreliableServer(redis, rng)
        self._reliable = Buffer(Server(redis), lambda: self._settings)
        self._handled: Counter[str] = Counter()
        self._given_up: set[str] = set()

    async def play(self) -> None:
        runs = await self._hold_some()
        self._server.loses = self._rng.choice([0.0, 0.02, 0.2])
        drainers = [self._drainer() for _ in range(self._rng.randrange(1, 4))]
        for drainer in drainers:
            drainer.start()

        async def everything_is_settled() -> bool:
            assert all(drainer.in_flight <= self._settings.drain_concurrency for drainer in drainers)
            entries = [await self._reliable.get_entry(ready.org_id, run_id) for run_id, ready in runs.items()]
            states = {entry.state for entry in entries if entry is not None}
            return states <= {EntryState.MATERIALISED, EntryState.FAILED}

        try:
            await until(everything_is_settled, timeout_s=60)
        finally:
            self._server.loses = 0.0
            for drainer in drainers:
                await drainer.stop(5000)
        await self._check(runs)

    async def _hold_some(self) -> dict[str, Ready]:
        runs: dict[str, Ready] = {}
        for number in range(self._rng.randrange(1, 120)):
            ready = self._rng.choice(ENVIRONMENTS)
            runs[f"run-{number}"] = ready
            await hold(self._reliable, f"run-{number}", env=ready.env_id, org=ready.org_id, kind=EntryKind.HELD)
        return runs

    def _drainer(self) -> Drainer:
        buffer = Buffer(self._server, lambda: self._settings)
        jitter = self._rng.random() / 100

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(min(seconds, 0.002))

        return Drainer(buffer, self._handle, lambda: self._settings, Telemetry(), sleep=sleep, jitter=lambda: jitter)

    async def _handle(self, entries: Sequence[Entry]) -> Sequence[Outcome]:
        for _ in range(self._rng.randrange(5)):
            await asyncio.sleep(0)
        if self._rng.random() < 0.05:
            raise EngineUnavailableError("the engine is away")
        return [self._outcome(entry) for entry in entries]

    def _outcome(self, entry: Entry) -> Outcome:
        match self._rng.randrange(20):
            case 0:
                self._given_up.add(entry.run_id)
                return NonRetryableError("never")
            case 1 | 2:
                if entry.attempts + 1 >= self._settings.drain_max_attempts:
                    self._given_up.add(entry.run_id)
                return ValueError("again")
            case 3:
                return EngineUnavailableError("the engine is away")
            case _:
                self._handled[entry.run_id] += 1
                return None

    async def _check(self, runs: dict[str, Ready]) -> None:
        counts = await self._reliable.counts()
        assert (counts.queued, counts.waiting, counts.draining, counts.organizations) == (0, 0, 0, ())
        for run_id, ready in runs.items():
            entry = await self._reliable.get_entry(ready.org_id, run_id)
            assert entry is not None
            expected = EntryState.FAILED if run_id in self._given_up else EntryState.MATERIALISED
            assert entry.state is expected
            assert self._handled[run_id] == (0 if run_id in self._given_up else 1)
        assert counts.failed == len(self._given_up)


async def test_drainers_lose_nothing_and_do_nothing_twice_in_any_history(redis_client: Redis) -> None:
    async def play(rng: random.Random) -> None:
        await execute(redis_client, "FLUSHALL")
        await DrainerHistory(redis_client, rng).play()

    assert await fuzz(play) > 0
