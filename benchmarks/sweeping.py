"""What a sweep costs: how long it takes, what it costs the server, and what others who ask the server notice of it."""

from __future__ import annotations

import asyncio
import time

from benchmarks.report import Figure, Report, percentile
from mollifier.buffer import Acceptance, Buffer
from mollifier.model import EntryKind
from mollifier.server import Server, connect
from mollifier.settings import Settings
from mollifier.sweeper import Sweeper
from mollifier.telemetry import Telemetry

ENTRIES = 100_000
ENVIRONMENTS = 1_000
ORGANIZATIONS = 100
ACCEPTED_AT_ONCE = 500
PING_EVERY_S = 0.02


async def measure(redis_url: str, scale: float) -> Report:
    """Hold entries, sweep them, and ask for something else all the while, as well as before."""
    entries = max(1_000, int(ENTRIES * scale))
    settings = Settings(enabled=True, redis_url=redis_url)
    async with connect(redis_url) as redis, connect(redis_url) as elsewhere:
        server = Server(redis)
        buffer = Buffer(server, lambda: settings)
        await _hold(buffer, entries)
        sweeper = Sweeper(buffer, lambda: settings, Telemetry())
        neighbour = Server(elsewhere)
        quiet_ms = await _pings_ms(neighbour, asyncio.create_task(asyncio.sleep(2)))
        before_us = await _cpu_us(neighbour)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        sweeping = asyncio.create_task(sweeper.sweep())
        busy_ms = await _pings_ms(neighbour, sweeping)
        assert await sweeping
        took_s = time.perf_counter() - started_s
        figures = (
            Figure("seconds", took_s),
            Figure("server_cpu_us_per_entry", (await _cpu_us(neighbour) - before_us) / entries),
            Figure("process_cpu_us_per_entry", (time.process_time() - started_cpu_s) * 1e6 / entries),
            Figure("others_ping_before_p99_ms", percentile(quiet_ms, 99)),
            Figure("others_ping_meanwhile_p50_ms", percentile(busy_ms, 50)),
            Figure("others_ping_meanwhile_p99_ms", percentile(busy_ms, 99), "the gate waits 25"),
        )
        await sweeper.stop()
    question = f"what does a sweep of {entries:,} held entries in {ENVIRONMENTS:,} environments cost?"
    return Report("sweeping", question, figures)


async def _hold(buffer: Buffer, entries: int) -> None:
    for start in range(0, entries, ACCEPTED_AT_ONCE):
        await buffer.accept_many(
            [
                Acceptance(
                    run_id=f"run_{number:08}",
                    env_id=f"env_{number % ENVIRONMENTS}",
                    org_id=f"org_{number % ORGANIZATIONS}",
                    payload=b"x" * 200,
                    kind=EntryKind.HELD,
                    created_us=number,
                )
                for number in range(start, min(entries, start + ACCEPTED_AT_ONCE))
            ]
        )


async def _pings_ms(server: Server, until: asyncio.Task[object]) -> list[float]:
    """Ask the server for nothing again and again until the task is done; return how long each answer took, milliseconds."""
    took_ms: list[float] = []
    while not until.done():
        started_s = time.perf_counter()
        await server.run("PING")
        took_ms.append((time.perf_counter() - started_s) * 1000)
        await asyncio.sleep(PING_EVERY_S)
    return took_ms


async def _cpu_us(server: Server) -> float:
    """Return the processor's time that the server has used so far, microseconds."""
    used = await server.run("INFO", "cpu")
    return (used["used_cpu_user"] + used["used_cpu_sys"]) * 1e6
