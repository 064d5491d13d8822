"""How fast held entries become runs, against a bare multi-row insert of the same rows and jobs.

The bare side inserts ready-made rows, and their jobs, in transactions of as many as the drainer has in one. It does so with the
product's own statement, the fastest that is known here, so that the ratio is about draining and not about inserting; and, for whoever
asks what that is worth, with an INSERT of several rows of VALUES and one for their jobs, as one writes them by hand.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks.database import House, house
from benchmarks.holding import CountingTelemetry, drain, hold, snapshots_of
from benchmarks.report import Figure, Report, median, percentile
from mollifier.drainer import batch_size
from mollifier.engine import Creation
from mollifier.postgres.creation import insert_rows
from mollifier.postgres.jobs import DEFAULT_QUEUE, EXECUTE, RUN_ID
from mollifier.postgres.rows import row_of
from mollifier.postgres.tables import runs

ENTRIES = 3_000
ROUNDS = 5
SINGLES = 30
_OF_EXECUTION = {"started_at", "attempt_count", "job_id", "output", "output_type", "version"}
_BY_HAND = [name for name in runs.c.keys() if name not in _OF_EXECUTION]  # noqa: SIM118 - a collection of columns


async def measure(_redis_url: str, scale: float) -> Report:
    """Drain and insert in turns, then time single entries on the idle system."""
    entries = max(200, int(ENTRIES * scale))
    telemetry = CountingTelemetry()
    async with house(telemetry=telemetry) as parts:
        await _round(parts, telemetry, entries)
        rounds = [await _round(parts, telemetry, entries) for _ in range(ROUNDS)]
        dwells_ms = await _single_dwells_ms(parts)
    return Report(
        "draining",
        f"how fast do {entries:,} held entries become runs, at the default settings?",
        (
            Figure("entries_per_batch", batch_size(parts.settings)),
            Figure("drained_per_second", entries / median([taken.drained_s for taken in rounds])),
            Figure("bare_inserts_per_second", entries / median([taken.bare_s for taken in rounds])),
            Figure("inserts_by_hand_per_second", entries / median([taken.by_hand_s for taken in rounds])),
            Figure(
                "ratio_of_throughput",
                median([taken.bare_s / taken.drained_s for taken in rounds]),
                "at least 0.5, aim 0.7",
            ),
            Figure("ratio_to_inserts_by_hand", median([taken.by_hand_s / taken.drained_s for taken in rounds])),
            Figure("single_to_created_p50_ms", percentile(dwells_ms, 50), "under 50"),
            Figure("single_to_created_p99_ms", percentile(dwells_ms, 99)),
        ),
    )


class Round(NamedTuple):
    """How long each way took, seconds."""

    drained_s: float
    bare_s: float
    by_hand_s: float


async def _round(parts: House, telemetry: CountingTelemetry, entries: int) -> Round:
    """Drain, insert, and insert by hand."""
    return Round(
        await drain(parts, telemetry, parts.mollifier.drainer(), snapshots_of(entries)),
        await _insert(parts, entries, insert_rows),
        await _insert(parts, entries, _insert_by_hand),
    )


async def _insert(
    parts: House, entries: int, insert: Callable[[AsyncConnection, Sequence[dict[str, Any]]], Awaitable[object]]
) -> float:
    """Return how long the same rows and jobs take in batches of the same size, one transaction each, seconds."""
    now = datetime.now(UTC)
    rows = [row_of(Creation(snapshot=snapshot), now) for snapshot in snapshots_of(entries)]
    size = batch_size(parts.settings)
    started_s = time.perf_counter()
    for start in range(0, len(rows), size):
        async with parts.database.transaction() as connection:
            await insert(connection, rows[start : start + size])
    return time.perf_counter() - started_s


async def _insert_by_hand(connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> None:
    """Insert with one statement of several rows each; the columns that the run's execution fills stay as they are."""
    values = [{name: row[name] for name in _BY_HAND} for row in rows]
    driver = (await connection.get_raw_connection()).driver_connection
    if driver is None:
        raise RuntimeError("the connection is lost")
    one = f"({', '.join(['%s'] * len(_BY_HAND))})"
    names = ", ".join(_BY_HAND)
    await driver.execute(
        f"INSERT INTO runs ({names}) VALUES {', '.join([one] * len(values))}",  # noqa: S608 - the table's own columns
        [value for row in values for value in row.values()],
    )
    job = "(%s, %s, %s, NULL, NULL, %s::jsonb, NULL)::procrastinate_job_to_defer_v1"
    await driver.execute(
        f"SELECT procrastinate_defer_jobs_v1(ARRAY[{', '.join([job] * len(values))}])",
        [
            part
            for row in values
            for part in (row["queue"] or DEFAULT_QUEUE, EXECUTE, row["priority"], f'{{"{RUN_ID}": "{row["id"]}"}}')
        ],
    )


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
