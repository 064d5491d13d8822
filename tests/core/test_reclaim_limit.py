"""The last limit of reclaims: an entry that kills those who give it up, too, ends as a dead letter, whatever its attempts."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.buffer import Accepted, Buffer, Reclaimed
from mollifier.keys import PartitionKeys
from mollifier.model import EntryKind, EntryState
from mollifier.server import Server
from mollifier.settings import GIVE_UPS_MAX
from tests.core.support import ENV, ORG, SETTINGS, bound, drain_ids, execute, expire_lease, hold, lifetime_ms, take

LIMIT = GIVE_UPS_MAX + 1

pytestmark = pytest.mark.leaves_keys


@pytest.fixture
def buffer(redis_client: Redis) -> Buffer:
    limited = msgspec.structs.replace(SETTINGS, drain_max_reclaims=1)
    return Buffer(Server(redis_client), lambda: limited)


async def come_back(buffer: Buffer, redis: Redis, run_id: str) -> Reclaimed:
    """Have whoever takes the run up die of it."""
    assert (await take(buffer)).run_id == run_id
    await expire_lease(redis, buffer.keyspace.of(ORG), run_id)
    return await buffer.reclaim_expired()


async def test_an_entry_comes_back_as_often_as_the_limit_says_and_then_fails_with_the_reason(
    buffer: Buffer, redis_client: Redis
) -> None:
    await hold(buffer, "run", kind=EntryKind.HELD)
    for _ in range(LIMIT):
        assert await come_back(buffer, redis_client, "run") == Reclaimed(returned=("run",))
    assert await come_back(buffer, redis_client, "run") == Reclaimed(failed=("run",))
    entry = await buffer.get_entry(ORG, "run")
    assert entry is not None
    assert (entry.state, entry.attempts, entry.reclaims, entry.lease) == (EntryState.FAILED, 0, LIMIT + 1, 0)
    assert entry.payload == b"payload"
    assert entry.error is not None
    assert f"ran out {LIMIT + 1} times" in entry.error
    counts = await buffer.counts()
    assert (counts.failed, counts.left) == (1, 1)
    assert await buffer.pop(ORG, ENV) is None


async def test_what_stands_behind_an_entry_that_keeps_coming_back_is_drained(
    buffer: Buffer, redis_client: Redis
) -> None:
    await hold(buffer, "deadly", "next")
    for _ in range(LIMIT + 1):
        await come_back(buffer, redis_client, "deadly")
    assert await drain_ids(buffer) == ["next"]


async def test_attempts_bring_no_entry_nearer_to_the_limit(buffer: Buffer, redis_client: Redis) -> None:
    await hold(buffer, "run")
    for _ in range(LIMIT):
        await come_back(buffer, redis_client, "run")
    for _ in range(3):
        assert await buffer.requeue(await take(buffer)) == "held"
    entry = await take(buffer)
    assert (entry.attempts, entry.reclaims) == (3, LIMIT)


async def test_a_caller_s_key_is_free_once_its_run_came_back_too_often(buffer: Buffer, redis_client: Redis) -> None:
    keys = bound("task", "key")
    await buffer.accept("run", ENV, ORG, b"", kind=EntryKind.HELD, bindings=keys)
    for _ in range(LIMIT):
        await come_back(buffer, redis_client, "run")
        assert await buffer.bound_run(ORG, keys[0].digest) == "run"
    await come_back(buffer, redis_client, "run")
    assert await buffer.bound_run(ORG, keys[0].digest) is None
    assert isinstance(await buffer.accept("other", ENV, ORG, b"", bindings=keys), Accepted)


async def test_an_audit_copy_that_came_back_too_often_expires_as_it_would_have(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    for _ in range(LIMIT + 1):
        await come_back(buffer, redis_client, "run")
    for key in (keys.entry("run"), keys.failed):
        left_ms = await lifetime_ms(redis_client, key)
        assert left_ms is not None
        assert left_ms <= SETTINGS.entry_ttl_s * 1000


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deaths=st.lists(st.booleans(), max_size=12))
async def test_only_deaths_count_towards_the_limit_in_any_order_of_deaths_and_retries(
    *, buffer: Buffer, redis_client: Redis, deaths: list[bool]
) -> None:
    await execute(redis_client, "FLUSHALL")
    await hold(buffer, "run")
    died = 0
    for dies in deaths:
        if dies:
            died += 1
            reclaimed = await come_back(buffer, redis_client, "run")
            assert reclaimed == (Reclaimed(returned=("run",)) if died <= LIMIT else Reclaimed(failed=("run",)))
            if died > LIMIT:
                break
        else:
            assert await buffer.requeue(await take(buffer)) == "held"
    entry = await buffer.get_entry(ORG, "run")
    assert entry is not None
    assert (entry.state is EntryState.FAILED, entry.reclaims) == (died > LIMIT, died)
