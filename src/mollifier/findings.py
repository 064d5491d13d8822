"""4. What a drainer comes across that is no work for it: nothing is passed by in silence, each is counted and told of once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mollifier.buffer import Popped, Reclaimed
from mollifier.errors import MalformedEntryError
from mollifier.telemetry import Telemetry

log = logging.getLogger("mollifier.drainer")


def tell_popped(popped: Popped, telemetry: Telemetry) -> None:
    """Tell of what a pop met beside the entries that it took."""
    _tell_malformed(popped.malformed, telemetry)
    tell_evicted(popped.evicted, telemetry)
    if popped.orphans:
        log.warning("mollifier.orphans_dropped", extra={"fields": {"count": popped.orphans}})
    for _ in range(popped.orphans):
        telemetry.settled("orphaned", 0)


def tell_reclaimed(reclaimed: Reclaimed, telemetry: Telemetry) -> None:
    """Tell of entries whose holders died: those that come back, and those that have come back too often."""
    for _ in reclaimed.returned:
        telemetry.settled("reclaimed", 0)
    for run_id in reclaimed.failed:
        detail = (
            "it came back after each lease that ran out, and whoever took it up died or hung; it is a dead letter now"
        )
        log.error("mollifier.reclaimed_too_often", extra={"fields": {"run_id": run_id, "detail": detail}})
        telemetry.settled("reclaim_limit", 0)
    tell_evicted(reclaimed.evicted, telemetry)
    _tell_malformed([MalformedEntryError(run_id, "fields are missing") for run_id in reclaimed.malformed], telemetry)
    for fault in reclaimed.faults:
        telemetry.faulted("reclaim", fault)


def tell_evicted(run_ids: Sequence[str], telemetry: Telemetry) -> None:
    """Tell of held runs whose entries vanished."""
    for run_id in run_ids:
        detail = "the buffer's server let go of a held entry: its payload is lost; have the server evict nothing (noeviction)"
        log.error("mollifier.entry_evicted", extra={"fields": {"run_id": run_id, "detail": detail}})
        telemetry.settled("evicted", 0)


def _tell_malformed(errors: Sequence[MalformedEntryError], telemetry: Telemetry) -> None:
    for error in errors:
        log.error("mollifier.malformed_entry", extra={"fields": {"run_id": error.run_id, "error": error.reason}})
        telemetry.settled("malformed", 0)
