"""Leases: what a dead drainer had is back in the queue within a third of a lease after its end, however much that is."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.keys import PartitionKeys
from mollifier.leases import Leases
from tests.core.observed import Observed
from tests.core.support import ENV, ORG, SETTINGS, execute, expire_lease, hold

pytestmark = pytest.mark.leaves_keys

PORTION = 100


@pytest.mark.parametrize("number", [1, PORTION, 3 * PORTION + 1])
async def test_all_that_dead_holders_left_is_put_back_at_one_look(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, number: int
) -> None:
    run_ids = [f"run{index:03}" for index in range(number)]
    await hold(buffer, *run_ids)
    for index in range(number):
        entry = await buffer.pop(ORG, ENV)
        assert entry is not None
        await expire_lease(redis_client, keys, run_ids[index])
    looks = 0

    async def pause(_: float) -> None:
        nonlocal looks
        looks += 1

    await Leases(buffer, lambda: SETTINGS, Observed().telemetry, pause).keep(lambda: looks > 1)

    assert await execute(redis_client, "ZCARD", keys.draining) == 0
    assert await execute(redis_client, "ZRANGE", keys.queue(ENV), 0, -1) == [run_id.encode() for run_id in run_ids]


async def test_what_has_expired_under_a_dead_holder_keeps_nothing_else_waiting(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    for index in range(2 * PORTION + 1):
        await hold(buffer, f"run{index:03}")
        assert await buffer.pop(ORG, ENV) is not None
        await expire_lease(redis_client, keys, f"run{index:03}")
    gone = [keys.entry(f"run{index:03}") for index in range(2 * PORTION)]
    await execute(redis_client, "DEL", *gone)
    looks = 0

    async def pause(_: float) -> None:
        nonlocal looks
        looks += 1

    await Leases(buffer, lambda: SETTINGS, Observed().telemetry, pause).keep(lambda: looks > 1)

    assert await execute(redis_client, "ZRANGE", keys.queue(ENV), 0, -1) == [b"run200"]


async def test_what_cannot_be_put_back_is_looked_at_again_after_a_pause(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    """A lease that names nothing but is refused each time: the loop rests, whatever it meets."""
    await execute(redis_client, "SET", keys.draining, "no leases at all", "PX", 60_000)
    pauses = 0

    async def pause(_: float) -> None:
        nonlocal pauses
        pauses += 1

    await Leases(buffer, lambda: SETTINGS, Observed().telemetry, pause).keep(lambda: pauses >= 3)

    assert pauses == 3
