"""How fast held entries become runs, against a bare multi-row insert of the same rows and jobs."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from benchmarks.database import House, house
from benchmarks.holding import CountingTelemetry, drain, hold, snapshots_of
from benchmarks.report import Figure, Report, median, percentile
from mollifier.engine import Creation
from mollifier.postgres.creation import insert_rows
from mollifier.postgres.rows import row_of

ENTRIES = 3_000
ROUNDS = 5
SINGLES = 30


async def measure(_redis_url: str, scale: float) -> Report:
    """Drain and insert in turns, then time single entries on the idle system."""
    entries = max(200, int(ENTRIES * scale))
    telemetry = CountingTelemetry()
    async with house(telemetry=telemetry) as parts:
        await _pair(parts, telemetry, entries)
        pairs = [await _pair(parts, telemetry, entries) for _ in range(ROUNDS)]
        dwells_ms = await _single_dwells_ms(parts)
    return Report(
        "draining",
        f"how fast do {entries:,} held entries become runs, at the default settings?",
        (
            Figure("drained_per_second", entries / median([drained_s for drained_s, _ in pairs])),
            Figure("bare_inserts_per_second", entries / median([bare_s for _, bare_s in pairs])),
            Figure(
                "ratio_of_throughput",
                median([bare_s / drained_s for drained_s, bare_s in pairs]),
                "at least 0.5, aim 0.7",
            ),
            Figure("single_to_created_p50_ms", percentile(dwells_ms, 50), "under 50"),
            Figure("single_to_created_p99_ms", percentile(dwells_ms, 99)),
        ),
    )


async def _pair(parts: House, telemetry: CountingTelemetry, entries: int) -> tuple[float, float]:
    """Return how long draining takes and how long inserting, seconds."""
    drained_s = await drain(parts, telemetry, parts.mollifier.drainer(), snapshots_of(entries))
    return drained_s, await _insert(parts, entries)


async def _insert(parts: House, entries: int) -> float:
    """Return how long the same rows and jobs take in batches of the same size, one transaction each, seconds."""
    now = datetime.now(UTC)
    rows = [row_of(Creation(snapshot=snapshot), now) for snapshot in snapshots_of(entries)]
    size = parts.settings.drain_batch_size
    started_s = time.perf_counter()
    for start in range(0, len(rows), size):
        async with parts.database.transaction() as connection:
            await insert_rows(connection, rows[start : start + size])
    return time.perf_counter() - started_s


async def _single_dwells_ms(parts: House) -> list[float]:
    """Return how long single entries took from their acceptance until their run was there, milliseconds."""
    drainer = parts.mollifier.drainer()
    drainer.start()
    dwells_ms: list[float] = []
    for snapshot in snapshots_of(SINGLES):
        # Longer than a poll, so that the drainer is at rest.
        await asyncio.sleep(2 * parts.settings.drain_poll_interval_ms / 1000)
        started_s = time.perf_counter()
        await hold(parts, [snapshot])
        while await parts.engine.get_run(snapshot.env_id, snapshot.run_id) is None:  # noqa: ASYNC110 - the database tells nobody
            await asyncio.sleep(0.001)
        dwells_ms.append((time.perf_counter() - started_s) * 1000)
    await drainer.stop()
    return dwells_ms
