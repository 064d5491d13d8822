"""What an environment costs once it has been quiet for a window and a hold: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.report import Figure, Report
from benchmarks.stage import Counters, environment, flush
from mollifier.keys import Keyspace
from mollifier.model import Verdict
from mollifier.scripts import Call, Scripts, trip
from mollifier.server import Server, connect
from mollifier.settings import Settings
from mollifier.trip import SUB_BUCKETS

ENVIRONMENTS = 10_000
TRIGGERS_EACH = 3
WINDOW_MS = 10_000
AT_ONCE = 500
SETTLED_LOOKS = 10
KEYSPACE = Keyspace(Settings().partitions)


async def measure(redis_url: str, scale: float) -> Report:
    """Have every environment trigger and half of them trip, then wait until the last window and hold have run out."""
    environments = max(AT_ONCE, int(ENVIRONMENTS * scale))
    async with connect(redis_url) as redis:
        await flush(redis)
        counters = Counters(redis)
        await _trigger(redis_url, range(1))
        await flush(redis)
        before_bytes = await counters.used_memory_bytes()
        await _trigger(redis_url, range(environments))
        busy_bytes, busy_keys = await counters.used_memory_bytes(), await counters.keys()
        idle_bytes = await _settled_bytes(counters)
        idle_keys = await counters.keys()
    return Report(
        "idle",
        f"what do {environments:,} environments cost while they trigger, and once they are idle?",
        (
            Figure("busy_keys", busy_keys),
            Figure("busy_bytes_per_environment", (busy_bytes - before_bytes) / environments),
            Figure("idle_keys", idle_keys, "0"),
            Figure("idle_bytes_in_all", idle_bytes - before_bytes, "the same for any number of environments"),
        ),
    )


async def _trigger(redis_url: str, numbers: Sequence[int]) -> None:
    """Trigger over a connection of its own, whose buffers are gone before memory is looked at."""
    calls = [_call(number) for number in numbers for _ in range(TRIGGERS_EACH + number % 2)]
    async with connect(redis_url) as redis:
        for start in range(0, len(calls), AT_ONCE):
            for reply in await Scripts(Server(redis)).run_many(calls[start : start + AT_ONCE]):
                assert isinstance(reply, tuple), reply


def _call(number: int) -> Call[tuple[Verdict, ...]]:
    who = environment(number)
    keys = KEYSPACE.of(who.org_id)
    return trip(
        rate=keys.rate(who.id),
        tripped=keys.tripped(who.id),
        bucket_us=WINDOW_MS * 1000 // SUB_BUCKETS,
        buckets=SUB_BUCKETS + 1,
        threshold=TRIGGERS_EACH,
        hold_ms=WINDOW_MS,
        number=1,
    )


async def _settled_bytes(counters: Counters) -> int:
    """Wait until nothing is left and the server has given back what it held for it; return what it uses then."""
    least, unchanged = await counters.used_memory_bytes(), 0
    while await counters.keys() > 0 or unchanged < SETTLED_LOOKS:
        await asyncio.sleep(0.2)
        used = await counters.used_memory_bytes()
        unchanged = 0 if used < least else unchanged + 1
        least = min(least, used)
    return least
