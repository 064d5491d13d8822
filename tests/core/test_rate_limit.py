"""The limit of an API key's requests: at exact moments, by the real server's clock, and without a server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.errors import BufferUnavailableError
from mollifier.keys import Keyspace
from mollifier.rate_limit import RateLimiter
from mollifier.scripts import Scripts, limit
from mollifier.server import Command, Reply, Server, connect
from mollifier.settings import Settings
from mollifier.trip import SUB_BUCKETS
from tests.core.observed import Observed, labels
from tests.core.support import ORG, ShimmedServer, execute, lifetime_ms
from tests.core.virtual_time import NOW_US, SHIM

START_US = 1_800_000_000_000_000
MS = 1000
WINDOW_MS = 1_000
BUCKET_US = WINDOW_MS * MS // SUB_BUCKETS
KEY = "key_1"
KEYSPACE = Keyspace(4)
numbers = itertools.count()
virtual = pytest.mark.leaves_keys("virtual:*", "requests:*")

Answer = tuple[bool, int, int]


class Counter:
    """Runs the real script on the real server at moments of the test's choice, for a key of its own."""

    def __init__(self, redis: Redis, most: int) -> None:
        self._server = ShimmedServer(redis, SHIM)
        self._call = limit(
            requests=f"requests:{next(numbers)}", bucket_us=BUCKET_US, buckets=SUB_BUCKETS + 1, limit=most
        )

    async def ask(self, offsets_ms: Sequence[float]) -> list[Answer]:
        call = self._call
        commands: list[Command] = []
        for offset_ms in offsets_ms:
            commands.append(("SET", NOW_US, START_US + round(offset_ms * MS)))
            commands.append(("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.args))
        replies = (await self._server.run_many(commands))[1::2]
        assert not [reply for reply in replies if isinstance(reply, Exception)]
        return [call.parse(reply) for reply in replies]


@virtual
async def test_as_many_as_the_limit_pass_and_the_next_is_told_when_to_come_back(redis_client: Redis) -> None:
    assert await Counter(redis_client, 3).ask([0, 10, 20, 30]) == [
        (True, 2, 1050),
        (True, 1, 1040),
        (True, 0, 1030),
        (False, 0, 1020),
    ]


@virtual
async def test_who_comes_back_when_told_passes(redis_client: Redis) -> None:
    counter = Counter(redis_client, 1)
    (_, (allowed, _, reset_ms)) = await counter.ask([7, 400])
    assert not allowed
    assert [allowed for allowed, _, _ in await counter.ask([400 + reset_ms - 1, 400 + reset_ms])] == [False, True]


@virtual
async def test_a_refused_request_does_not_count(redis_client: Redis) -> None:
    answers = await Counter(redis_client, 2).ask([0, 0, *range(100, 1050, 50), 1050])
    assert [allowed for allowed, _, _ in answers] == [True, True, *[False] * 19, True]


@virtual
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    gaps=st.lists(st.integers(0, 400), min_size=1, max_size=80),
    most=st.integers(1, 8),
)
def test_in_any_span_of_a_window_no_more_than_the_limit_pass(redis_url: str, gaps: list[int], most: int) -> None:
    offsets = list(itertools.accumulate(gaps))

    async def ask() -> list[Answer]:
        async with connect(redis_url) as redis:
            return await Counter(redis, most).ask(offsets)

    passed = [at_ms for at_ms, (allowed, _, _) in zip(offsets, asyncio.run(ask()), strict=True) if allowed]
    for first, last in zip(passed, passed[most:], strict=False):
        assert last - first > WINDOW_MS - 1
    refused = set(offsets) - set(passed)
    for at_ms in refused:
        # Conservative by one bucket, and no more.
        assert sum(at_ms - WINDOW_MS * 1.05 <= other <= at_ms for other in passed) >= most


# --- the limiter ---------------------------------------------------------------------------------------------------


def limited(**more: Any) -> Settings:
    values: dict[str, Any] = {"request_limit": 2, "request_limit_window_s": 3600, "gate_deadline_ms": 10_000, **more}
    return Settings(**values)


def limiter(server: Server, settings: Settings, observed: Observed | None = None) -> RateLimiter:
    telemetry = (observed or Observed()).telemetry
    return RateLimiter(Scripts(server), KEYSPACE, lambda: settings, telemetry)


async def test_replicas_share_the_count_and_keys_do_not(redis_client: Redis) -> None:
    replicas = [limiter(Server(redis_client), limited()) for _ in range(3)]
    quotas = [await one.spend(ORG, KEY) for one in replicas]
    assert [quota.allowed for quota in quotas if quota] == [True, True, False]
    other = await replicas[0].spend(ORG, "key_2")
    assert other is not None
    assert (other.allowed, other.limit, other.window_s, other.remaining) == (True, 2, 3600, 1)
    assert 3_500_000 < other.reset_ms <= 3_780_000


async def test_the_count_lives_no_longer_than_it_counts(redis_client: Redis) -> None:
    await limiter(Server(redis_client), limited()).spend(ORG, KEY)
    left_ms = await lifetime_ms(redis_client, KEYSPACE.of(ORG).requests(KEY))
    assert left_ms is not None
    assert left_ms <= 3_780_000


class Counting(Server):
    """Notes how often it was asked."""

    asked = 0

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        self.asked += 1
        return await super().run_many(commands)


async def test_without_a_limit_nobody_is_asked_and_with_one_it_costs_one_round_trip(redis_client: Redis) -> None:
    server = Counting(redis_client)
    assert await limiter(server, limited(request_limit=None)).spend(ORG, KEY) is None
    assert server.asked == 0
    one = limiter(server, limited())
    await one.spend(ORG, KEY)
    server.asked = 0
    await one.spend(ORG, KEY)
    assert server.asked == 1


async def test_without_an_answer_every_request_passes_and_soon_nobody_is_asked() -> None:
    observed = Observed()
    async with connect("redis://127.0.0.1:1") as redis:
        server = Counting(redis)
        one = limiter(server, limited(), observed)
        assert [await one.spend(ORG, KEY) for _ in range(50)] == [None] * 50
    assert observed.points("mollifier.failed_open") == {labels(part="limit"): 50}
    assert server.asked < 10


async def test_a_server_that_hangs_holds_nobody_up_beyond_the_deadline(redis_client: Redis) -> None:
    class Hanging(Server):
        async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
            await asyncio.Event().wait()
            raise BufferUnavailableError("never")

    observed = Observed()
    one = limiter(Hanging(redis_client), limited(gate_deadline_ms=5), observed)
    async with asyncio.timeout(30):
        assert [await one.spend(ORG, KEY) for _ in range(10)] == [None] * 10
    assert observed.points("mollifier.failed_open") == {labels(part="limit"): 10}


async def test_what_the_server_holds_is_not_trusted_to_be_a_count(redis_client: Redis) -> None:
    await execute(redis_client, "SET", KEYSPACE.of(ORG).requests(KEY), "not a hash", "PX", 60_000)
    assert await limiter(Server(redis_client), limited()).spend(ORG, KEY) is None
