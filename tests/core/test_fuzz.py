"""Random histories: the evaluator and the buffer against naive models, the drainer against the rule that nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from mollifier.buffer import Accepted, Buffer, Popped, Ready
from mollifier.drainer import Drainer, Outcome
from mollifier.errors import BufferUnavailableError, EngineUnavailableError, NonRetryableError
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.server import Command, Reply, Server
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry
from mollifier.trip import SUB_BUCKETS
from tests.core.buffer_model import ModelBuffer, Reference
from tests.core.fuzzing import fuzz
from tests.core.support import SETTINGS, bound, execute, hold, state_of, until
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


# --- the buffer ----------------------------------------------------------------------------------------------------

ENVIRONMENTS = [Ready(org, f"{org}/{env}") for org in ("org:1", "{org}", "org-3") for env in ("a", "b:c")]
TASK_KEYS = [("task", "key"), ("task", "other"), None, None, None]


class BufferHistory:
    """One random history of a buffer on a real server, beside a model that has to agree with it."""

    def __init__(self, redis: Redis, rng: random.Random) -> None:
        self._redis = redis
        self._rng = rng
        limits = msgspec.structs.replace(SETTINGS, drain_max_reclaims=rng.choice([0, 1, 10]))
        self._buffer = Buffer(Server(redis), lambda: limits)
        self._model = ModelBuffer(max_reclaims=limits.drain_max_reclaims)
        self._kinds = rng.choice([[EntryKind.AUDIT], [EntryKind.HELD], list(EntryKind)])
        self._popped: list[Entry] = []
        self._names = itertools.count()

    async def play(self) -> None:
        steps: dict[Callable[[], Awaitable[None]], int] = {
            self._accept: 10,
            self._pop: 8,
            self._ack: 4,
            self._requeue: 4,
            self._fail: 2,
            self._extend: 1,
            self._reclaim: 2,
            self._fall_due: 2,
            self._lose: 1,
            self._read: 1,
        }
        weighted = list(steps.values())
        for number in range(self._rng.randrange(20, 150)):
            (step,) = self._rng.choices(list(steps), weighted)
            await step()
            if number % 10 == 0:
                await self._compare()
        await self._compare()
        await self._drain_all()

    # Each step runs one operation on both sides.

    async def _accept(self) -> None:
        known = list(self._model.entries)
        run_id = self._rng.choice(known) if known and self._rng.random() < 0.1 else f"run-{next(self._names)}"
        ready = self._model.entries[run_id].ready if run_id in self._model.entries else self._rng.choice(ENVIRONMENTS)
        kind = self._rng.choice(self._kinds)
        payload, key = self._rng.randbytes(self._rng.randrange(40)), self._rng.choice(TASK_KEYS)
        expected = self._model.expect_accept(run_id, ready, key)
        outcome = await self._buffer.accept(
            run_id,
            ready.env_id,
            ready.org_id,
            payload,
            kind=kind,
            bindings=bound(*key, env=ready.env_id) if key else (),
        )
        if expected is not None:
            assert outcome == expected
            return
        assert isinstance(outcome, Accepted)
        self._model.accept(outcome, ready, kind, payload, key)

    async def _pop(self) -> None:
        chosen = self._rng.sample(ENVIRONMENTS, self._rng.randrange(1, 4))
        shares = [(ready, self._rng.randrange(1, 6)) for ready in chosen]
        expected = [self._model.pop(ready, limit) for ready, limit in shares]
        for popped, taken in zip(await self._buffer.pop_many(shares), expected, strict=True):
            assert isinstance(popped, Popped)
            assert [entry.run_id for entry in popped.entries] == taken.run_ids
            assert (popped.orphans, popped.malformed) == (taken.orphans, ())
            for entry in popped.entries:
                self._model.leased(entry)
                self._popped.append(entry)

    def _some_entry(self) -> Entry | None:
        return self._rng.choice(self._popped) if self._popped else None

    async def _ack(self) -> None:
        if (entry := self._some_entry()) is not None:
            assert await self._buffer.ack(entry) == self._model.ack(entry)

    async def _fail(self) -> None:
        if (entry := self._some_entry()) is not None:
            assert await self._buffer.fail(entry, "error") == self._model.fail(entry, "error")

    async def _extend(self) -> None:
        if (entry := self._some_entry()) is not None:
            assert await self._buffer.extend_many([entry]) == [self._model.holds(entry)]

    async def _requeue(self) -> None:
        if (entry := self._some_entry()) is None:
            return
        wait, far_off, attempts = self._rng.random() < 0.5, self._rng.random() < 0.5, self._rng.randrange(2)
        moment_ms = (FAR_OFF_MS if far_off else 1) if wait else None
        answer = await self._buffer.requeue(entry, not_before_ms=moment_ms, attempts=attempts)
        assert answer == self._model.requeue(entry, wait=wait, far_off=wait and far_off, attempts=attempts)

    async def _reclaim(self) -> None:
        draining = sorted(self._model.draining)
        chosen = self._rng.sample(draining, self._rng.randrange(len(draining) + 1))
        for run_id in chosen:
            keys = self._buffer.keyspace.of(self._model.draining[run_id].org_id)
            assert await execute(self._redis, "ZADD", keys.draining, "XX", "CH", 1, run_id) == 1
        assert await self._reclaimed() == self._model.reclaim(chosen)

    async def _reclaimed(self) -> tuple[set[str], set[str]]:
        reclaimed = await self._buffer.reclaim_expired()
        return set(reclaimed.returned), set(reclaimed.failed)

    async def _fall_due(self) -> None:
        """Let the not-before moments of some waiting entries have come."""
        ready = self._rng.choice(ENVIRONMENTS)
        waiting = [r for r in self._model.waiting.get(ready, []) if r.far_off]
        keys = self._buffer.keyspace.of(ready.org_id)
        for reference in self._rng.sample(waiting, self._rng.randrange(len(waiting) + 1)):
            reference.far_off = False
            member = f"{reference.sequence}:{reference.run_id}"
            assert await execute(self._redis, "ZADD", keys.waiting(ready.env_id), "XX", "CH", 1, member) == 1
            await execute(self._redis, "ZADD", keys.envs(ready.org_id), 1, ready.env_id)
            await execute(self._redis, "ZADD", keys.orgs, 1, ready.org_id)

    async def _lose(self) -> None:
        """Have an entry vanish that is not settled."""
        alive = [run_id for run_id, held in self._model.entries.items() if held.key is None]
        if alive:
            run_id = self._rng.choice(alive)
            keys = self._buffer.keyspace.of(self._model.entries[run_id].ready.org_id)
            assert await execute(self._redis, "DEL", keys.entry(run_id)) == 1
            self._model.lose(run_id)

    async def _read(self) -> None:
        ready = self._rng.choice(ENVIRONMENTS)
        listed = await self._buffer.list_entries(ready.org_id, ready.env_id, limit=1000)
        names = [entry.run_id for entry in listed if isinstance(entry, Entry)]
        queued = [r.run_id for r in self._model.queued.get(ready, []) if r.run_id in self._model.entries]
        assert names == queued

    # The whole state of both sides is compared now and then.

    async def _compare(self) -> None:
        assert await self._ready() == self._model.ready()
        for run_id, held in self._model.entries.items():
            entry = await self._buffer.get_entry(held.ready.org_id, run_id)
            assert entry is not None
            assert (entry.state, entry.payload, entry.kind) == (held.state, held.payload, held.kind)
            assert (entry.sequence, entry.attempts, entry.reclaims) == (held.sequence, held.attempts, held.reclaims)
            assert entry.error == held.error
        state = await state_of(self._redis)
        await self._compare_references(state)
        await self._compare_lifetimes(state)

    async def _ready(self) -> set[Ready]:
        return {Ready(org, env) for org, envs in (await self._buffer.ready()).items() for env in envs}

    async def _compare_references(self, state: dict[str, Any]) -> None:
        for ready in ENVIRONMENTS:
            keys = self._buffer.keyspace.of(ready.org_id)
            queued, waiting = self._model.queued.get(ready, []), self._model.waiting.get(ready, [])
            assert state.get(keys.queue(ready.env_id), []) == [(r.run_id.encode(), r.sequence) for r in queued]
            waits = {f"{r.sequence}:{r.run_id}".encode() for r in waiting}
            assert {member for member, _ in state.get(keys.waiting(ready.env_id), [])} == waits
            listed = dict(state.get(keys.envs(ready.org_id), []))
            assert (ready.env_id.encode() in listed) == bool(queued or waiting)
            assert_due_in_time(listed.get(ready.env_id.encode()), queued, waiting)
        for noun, expected in (("draining", self._model.draining), ("failed", self._model.failed)):
            members = {m.decode() for k, v in state.items() if k.endswith(f":{noun}") for m, _ in v}
            assert members == set(expected)
        orgs = {m.decode() for k, v in state.items() if k.endswith(":orgs") for m, _ in v}
        assert orgs == {r.org_id for r in ENVIRONMENTS if self._model.queued.get(r) or self._model.waiting.get(r)}

    async def _compare_lifetimes(self, state: dict[str, Any]) -> None:
        for ready in ENVIRONMENTS:
            keys = self._buffer.keyspace.of(ready.org_id)
            places = {
                keys.queue(ready.env_id): self._model.queued.get(ready, []),
                keys.waiting(ready.env_id): self._model.waiting.get(ready, []),
            }
            for key, references in places.items():
                kinds = {self._model.entries[r.run_id].kind for r in references if r.run_id in self._model.entries}
                if EntryKind.HELD in kinds:
                    for name in (key, keys.envs(ready.org_id), keys.orgs):
                        assert await execute(self._redis, "PTTL", name) == -1, name
        if self._kinds == [EntryKind.AUDIT]:
            for key in state:
                if not key.endswith(":seq"):
                    assert await execute(self._redis, "PTTL", key) >= 0, key

    async def _drain_all(self) -> None:
        """Take out everything that is left: every entry once, in order."""
        await self._buffer.reclaim_expired()
        for run_id in sorted(self._model.draining):
            keys = self._buffer.keyspace.of(self._model.draining[run_id].org_id)
            await execute(self._redis, "ZADD", keys.draining, "XX", 1, run_id)
        assert await self._reclaimed() == self._model.reclaim(sorted(self._model.draining))
        for references in self._model.waiting.values():
            for reference in references:
                reference.far_off = False
        for ready in ENVIRONMENTS:
            keys = self._buffer.keyspace.of(ready.org_id)
            for reference in self._model.waiting.get(ready, []):
                member = f"{reference.sequence}:{reference.run_id}"
                await execute(self._redis, "ZADD", keys.waiting(ready.env_id), "XX", 1, member)
            expected = self._model.pop(ready, 10_000)
            while (entry := await self._buffer.pop(ready.org_id, ready.env_id)) is not None:
                assert entry.run_id == expected.run_ids.pop(0)
                assert await self._buffer.ack(entry) == "held"
            assert expected.run_ids == []
        counts = await self._buffer.counts()
        assert (counts.queued, counts.waiting, counts.draining, counts.organizations) == (0, 0, 0, ())


def assert_due_in_time(score: float | None, queued: Sequence[Reference], waiting: Sequence[Reference]) -> None:
    """The index names a moment at or before which the earliest entry is due."""
    if queued:
        assert score is not None
        assert score < FAR_OFF_MS
    elif waiting:
        assert score == (FAR_OFF_MS if all(r.far_off for r in waiting) else 1)


async def test_the_buffer_answers_as_its_model_does_in_any_history(redis_client: Redis) -> None:
    async def play(rng: random.Random) -> None:
        await execute(redis_client, "FLUSHALL")
        await BufferHistory(redis_client, rng).play()

    assert await fuzz(play) > 0


# --- the drainer ---------------------------------------------------------------------------------------------------


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
