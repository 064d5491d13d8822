"""Entries to drain, and a drainer that is timed without being watched: nothing asks the servers while it is at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from benchmarks.database import House
from benchmarks.stage import REQUEST, environment
from mollifier import snapshots
from mollifier.buffer import Acceptance, Accepted
from mollifier.cursors import as_us
from mollifier.drainer import Drainer
from mollifier.ids import run_id
from mollifier.model import EntryKind, Snapshot
from mollifier.snapshots import take_snapshot
from mollifier.telemetry import Telemetry

AT_ONCE = 200
PATIENCE_S = 300


class CountingTelemetry(Telemetry):
    """Counts the entries whose acknowledgement the server has confirmed."""

    def __init__(self) -> None:
        super().__init__()
        self._left = 0
        self.all_settled = asyncio.Event()

    def expect(self, entries: int) -> None:
        """Set `all_settled` after so many acknowledgements from now."""
        self._left = entries
        self.all_settled.clear()

    def settled(self, outcome: str, dwell_ms: int) -> None:
        """Count as always, and count down."""
        super().settled(outcome, dwell_ms)
        self._left -= outcome == "acked"
        if self._left <= 0:
            self.all_settled.set()


def snapshots_of(entries: int, organizations: int = 1) -> list[Snapshot]:
    """Return snapshots of triggers that the organizations make in turns."""
    taken: list[Snapshot] = []
    for number in range(entries):
        now = datetime.now(UTC)
        taken.append(take_snapshot(environment(number % organizations), REQUEST, None, run_id(now), now))
    return taken


async def hold(parts: House, held: Sequence[Snapshot]) -> None:
    """Accept the snapshots, many in one round trip."""
    buffer = parts.mollifier.buffer
    if buffer is None:
        raise RuntimeError("a buffer is configured")
    for start in range(0, len(held), AT_ONCE):
        outcomes = await buffer.accept_many([_acceptance(snapshot) for snapshot in held[start : start + AT_ONCE]])
        if not all(isinstance(outcome, Accepted) for outcome in outcomes):
            raise RuntimeError(f"an entry was not stored: {outcomes}")


async def drain(parts: House, telemetry: CountingTelemetry, drainer: Drainer, held: Sequence[Snapshot]) -> float:
    """Hold the snapshots, then start the drainer; return how long it takes until the last of them is settled, seconds."""
    await hold(parts, held)
    telemetry.expect(len(held))
    started_s = time.perf_counter()
    drainer.start()
    async with asyncio.timeout(PATIENCE_S):
        await telemetry.all_settled.wait()
    elapsed_s = time.perf_counter() - started_s
    await drainer.stop()
    return elapsed_s


def _acceptance(snapshot: Snapshot) -> Acceptance:
    return Acceptance(
        run_id=snapshot.run_id,
        env_id=snapshot.env_id,
        org_id=snapshot.org_id,
        payload=snapshots.encode(snapshot),
        kind=EntryKind.HELD,
        created_us=as_us(snapshot.created_at),
    )
