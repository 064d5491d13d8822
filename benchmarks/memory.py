"""What a held entry takes on the buffer's server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime

from redis.asyncio import Redis

from benchmarks.report import Figure, Report
from benchmarks.stage import REQUEST, Counters, environment, flush
from mollifier import snapshots
from mollifier.buffer import Buffer
from mollifier.ids import run_id
from mollifier.model import EntryKind, Snapshot
from mollifier.server import Server, connect
from mollifier.settings import Settings
from mollifier.snapshots import take_snapshot

ENTRIES = 20_000
ENVIRONMENTS = 20
ENTRY_BYTES = 1024


async def measure(redis_url: str, scale: float) -> Report:
    """Hold entries, as the trigger path does, and see what the server's memory grows by."""
    entries = max(1000, int(ENTRIES * scale))
    held = list(_snapshots(entries))
    encoded = [(snapshot, snapshots.encode(snapshot)) for snapshot in held]
    opaque = [(snapshot, os.urandom(ENTRY_BYTES)) for snapshot in held]
    async with connect(redis_url) as redis:
        exact_bytes = await _growth_bytes(redis, opaque) / entries
        with_snapshot_bytes = await _growth_bytes(redis, encoded) / entries
    return Report(
        "memory",
        f"what does each of {entries:,} held entries of 1 KB take?",
        (
            Figure("entry_bytes", ENTRY_BYTES),
            Figure("memory_per_entry_bytes", exact_bytes, "at most 2,048"),
            Figure("ratio_to_entry", exact_bytes / ENTRY_BYTES, "at most 2"),
            Figure("trigger_payload_bytes", len(REQUEST.payload)),
            Figure("snapshot_with_that_payload_bytes", sum(len(payload) for _, payload in encoded) / entries),
            Figure("memory_per_snapshot_bytes", with_snapshot_bytes, "at most 2,048"),
        ),
    )


def _snapshots(count: int) -> Iterator[Snapshot]:
    for number in range(count):
        now = datetime.now(UTC)
        yield take_snapshot(environment(number % ENVIRONMENTS), REQUEST, None, run_id(now), now)


async def _growth_bytes(redis: Redis, held: list[tuple[Snapshot, bytes]]) -> int:
    settings = Settings()
    counters, buffer = Counters(redis), Buffer(Server(redis), lambda: settings)
    await flush(redis)
    before_bytes = await counters.used_memory_bytes()
    for snapshot, payload in held:
        await buffer.accept(snapshot.run_id, snapshot.env_id, snapshot.org_id, payload, kind=EntryKind.HELD)
    after_bytes = await counters.used_memory_bytes()
    await flush(redis)
    return after_bytes - before_bytes
