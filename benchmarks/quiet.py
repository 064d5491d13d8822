"""What the trigger path costs with Mollifier on while nobody bursts: one round trip, and how long it takes."""

from __future__ import annotations

import time

from benchmarks.report import Figure, Report, percentile
from benchmarks.stage import REQUEST, Counters, environment, flush, mollifier_of
from mollifier.facade import Mollifier
from mollifier.server import connect
from mollifier.settings import Settings

TRIGGERS = 10_000
CHUNK = 500


async def measure(redis_url: str, scale: float) -> Report:
    """Trigger one after the other with Mollifier on and off, in turns, and count what reaches the server."""
    triggers = max(CHUNK, int(TRIGGERS * scale) // CHUNK * CHUNK)
    settings = Settings(enabled=True, redis_url=redis_url, trip_threshold=1_000_000)
    async with connect(redis_url) as redis:
        await flush(redis)
        counters = Counters(redis)
        on, off = mollifier_of(settings, redis), mollifier_of(Settings(enabled=False), redis)
        await _trigger_us(on, 10)
        taken_us: dict[str, list[float]] = {"on": [], "off": []}
        round_trips = 0
        for _ in range(triggers // CHUNK):
            taken_us["off"] += await _trigger_us(off, CHUNK)
            before_reads = await counters.reads()
            taken_us["on"] += await _trigger_us(on, CHUNK)
            round_trips += await counters.reads() - before_reads - 1
        ping_us = await _ping_us(on, triggers)
        await flush(redis)
    return Report(
        "quiet",
        f"what do {triggers:,} triggers cost with Mollifier on and no burst?",
        (
            Figure("round_trips_per_trigger", round_trips / triggers, "1"),
            Figure("off_p50_us", percentile(taken_us["off"], 50)),
            Figure("on_p50_us", percentile(taken_us["on"], 50)),
            Figure("added_p50_us", percentile(taken_us["on"], 50) - percentile(taken_us["off"], 50)),
            Figure("added_p99_us", percentile(taken_us["on"], 99) - percentile(taken_us["off"], 99)),
            Figure("a_bare_ping_p50_us", percentile(ping_us, 50), "the same client's round trip"),
        ),
    )


async def _trigger_us(mollifier: Mollifier, count: int) -> list[float]:
    who = environment()
    taken_us: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        await mollifier.triggers.trigger(who, REQUEST)
        taken_us.append((time.perf_counter() - started) * 1_000_000)
    return taken_us


async def _ping_us(mollifier: Mollifier, count: int) -> list[float]:
    assert mollifier.buffer is not None
    taken_us: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        await mollifier.buffer.ping()
        taken_us.append((time.perf_counter() - started) * 1_000_000)
    return taken_us
