"""How fast held entries become runs, against a bare multi-row insert of the same rows and jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from benchmarks.database import House, house
from benchmarks.report import Figure, Report, median, percentile
from benchmarks.stage import REQUEST, environment
from mollifier import snapshots
from mollifier.engine import Creation
from mollifier.ids import run_id
from mollifier.model import EntryKind, Snapshot
from mollifier.postgres.creation import insert_rows
from mollifier.postgres.rows import row_of
from mollifier.snapshots import take_snapshot

ENTRIES = 3_000
ROUNDS = 3
SINGLES = 30


async def measure(_redis_url: str, scale: float) -> Report:
    """Drain and insert in turns, then time single entries on the idle system."""
    entries = max(200, int(ENTRIES * scale))
    async with house() as parts:
        pairs = [(await _drain(parts, entries), await _insert(parts, entries)) for _ in range(ROUNDS)]
        dwells_ms = await _single_dwells_ms(parts)
    drained_s, inserted_s = median([pair[0] for pair in pairs]), median([pair[1] for pair in pairs])
    return Report(
        "draining",
        f"how fast do {entries:,} held entries become runs?",
        (
            Figure("drained_per_second", entries / drained_s),
            Figure("bare_inserts_per_second", entries / inserted_s),
            Figure("ratio_of_throughput", median([bare / drain for drain, bare in pairs]), "at least 0.5, aim 0.7"),
            Figure("single_to_created_p50_ms", percentile(dwells_ms, 50), "under 50"),
            Figure("single_to_created_p99_ms", percentile(dwells_ms, 99)),
        ),
    )


def _snapshots(count: int) -> list[Snapshot]:
    taken: list[Snapshot] = []
    for _ in range(count):
        now = datetime.now(UTC)
        taken.append(take_snapshot(environment(), REQUEST, None, run_id(now), now))
    return taken


async def _hold(parts: House, held: Sequence[Snapshot]) -> None:
    buffer = parts.mollifier.buffer
    if buffer is None:
        raise RuntimeError("a buffer is configured")
    for snapshot in held:
        await buffer.accept(
            snapshot.run_id, snapshot.env_id, snapshot.org_id, snapshots.encode(snapshot), kind=EntryKind.HELD
        )


async def _drain(parts: House, entries: int) -> float:
    """Return how long the drainer takes for the entries, seconds."""
    await _hold(parts, _snapshots(entries))
    drainer = parts.mollifier.drainer()
    started_s = time.perf_counter()
    drainer.start()
    await _until_empty(parts)
    elapsed_s = time.perf_counter() - started_s
    await drainer.stop()
    return elapsed_s


async def _until_empty(parts: House) -> None:
    buffer = parts.mollifier.buffer
    while buffer is not None and (await buffer.counts()).left:  # noqa: ASYNC110 - the server tells nobody that it is empty
        await asyncio.sleep(0.05)


async def _insert(parts: House, entries: int) -> float:
    """Return how long the same rows and jobs take in batches of the same size, one transaction each, seconds."""
    now = datetime.now(UTC)
    rows = [row_of(Creation(snapshot=snapshot), now) for snapshot in _snapshots(entries)]
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
    for snapshot in _snapshots(SINGLES):
        # Longer than a poll, so that the drainer is at rest.
        await asyncio.sleep(2 * parts.settings.drain_poll_interval_ms / 1000)
        started_s = time.perf_counter()
        await _hold(parts, [snapshot])
        while await parts.engine.get_run(snapshot.env_id, snapshot.run_id) is None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
        dwells_ms.append((time.perf_counter() - started_s) * 1000)
    await drainer.stop()
    return dwells_ms
