"""Draining several partitions, whose counters hand out the same lease numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from mollifier.buffer import Buffer
from mollifier.drainer import Drainer
from mollifier.handling import Outcome
from mollifier.model import Entry
from mollifier.telemetry import Telemetry
from tests.core.support import SETTINGS, hold, until


async def test_entries_of_all_partitions_count_against_one_concurrency(buffer: Buffer) -> None:
    orgs = [f"org_{number}" for number in range(8)]
    assert len({buffer.keyspace.of(org).number for org in orgs}) > 2
    for org in orgs:
        await hold(buffer, f"run_{org}", env=f"env_{org}", org=org)
    handling: list[str] = []
    let_go = asyncio.Event()

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        handling.extend(entry.run_id for entry in entries)
        await let_go.wait()
        return [None] * len(entries)

    settings = replace(SETTINGS, drain_concurrency=2, drain_poll_interval_ms=1)
    drainer = Drainer(buffer, handle, lambda: settings, Telemetry())
    drainer.start()

    async def is_full() -> bool:
        return drainer.in_flight >= 2

    async def is_drained() -> bool:
        return (await buffer.counts()).left == 0

    await until(is_full)
    for _ in range(50):
        await buffer.ping()
    assert (drainer.in_flight, len(handling)) == (2, 2)
    let_go.set()
    await until(is_drained)
    await drainer.stop()
    assert sorted(handling) == sorted(f"run_{org}" for org in orgs)
