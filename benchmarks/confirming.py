"""What it costs to have accepts confirmed, per appendfsync: one alone, and many at a time, as in a burst."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from redis.asyncio import Redis

from benchmarks.report import Figure, Report, median, percentile
from benchmarks.stage import PAYLOAD, flush
from mollifier.buffer import Acceptance, Accepted, Buffer
from mollifier.embedded import EmbeddedStack
from mollifier.model import EntryKind
from mollifier.server import Server, connect
from mollifier.settings import Settings

ALONE = 40
BURST = 4_000
CALLERS = 500
CASES = (("none", "everysec"), ("none", "always"), ("aof", "everysec"), ("aof", "always"))

_numbers = itertools.count()


async def measure(_redis_url: str, scale: float) -> Report:
    """Accept one entry after another, then in a burst by many callers at a time, in each case, on a server with an append-only file."""
    figures: list[Figure] = []
    async with EmbeddedStack(postgres=False) as stack, connect(stack.redis_url) as redis:
        for confirm, policy in CASES:
            settings = Settings(redis_url=stack.redis_url, accept_confirm=confirm)
            await _configure(redis, policy)
            buffer = Buffer(Server(redis), lambda settings=settings: settings)
            await _accept(buffer)
            alone_ms = [await _accept(buffer) for _ in range(max(10, int(ALONE * scale)))]
            burst = max(CALLERS, int(BURST * scale))
            started_s = time.perf_counter()
            burst_ms = await _burst(buffer, burst)
            per_s = burst / (time.perf_counter() - started_s)
            name = f"{policy}, {'confirmed' if confirm == 'aof' else 'unconfirmed'}"
            figures += [
                Figure(f"{name}: alone_p50_ms", median(alone_ms)),
                Figure(f"{name}: alone_p99_ms", percentile(alone_ms, 99)),
                Figure(f"{name}: burst_p50_ms", median(burst_ms)),
                Figure(f"{name}: burst_p99_ms", percentile(burst_ms, 99)),
                Figure(f"{name}: burst_per_s", per_s),
            ]
            await flush(redis)
    return Report("confirming", f"what does it cost to confirm accepts? ({CALLERS} callers in a burst)", tuple(figures))


async def _configure(redis: Redis, policy: str) -> None:
    untyped: Any = redis
    await untyped.config_set("appendfsync", policy)


async def _burst(buffer: Buffer, number: int) -> list[float]:
    left = iter(range(number))

    async def caller() -> list[float]:
        return [await _accept(buffer) for _ in left]

    return [latency for latencies in await asyncio.gather(*(caller() for _ in range(CALLERS))) for latency in latencies]


async def _accept(buffer: Buffer) -> float:
    """Accept one held entry; return how long that took, milliseconds."""
    number = next(_numbers)
    acceptance = Acceptance(
        run_id=f"run_{number:012}",
        env_id=f"env_{number % 20}",
        org_id=f"org_{number % 20}",
        payload=PAYLOAD,
        kind=EntryKind.HELD,
    )
    started_s = time.perf_counter()
    (outcome,) = await buffer.accept_many([acceptance])
    assert isinstance(outcome, Accepted)
    return (time.perf_counter() - started_s) * 1000
