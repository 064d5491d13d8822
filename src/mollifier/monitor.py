"""4. The monitor's handler: what draining means for audit copies. The run exists already; the copy only has to come out whole."""

from __future__ import annotations

from collections.abc import Sequence

from mollifier import snapshots
from mollifier.errors import NonRetryableError
from mollifier.handling import Handler, Outcome
from mollifier.model import Entry
from mollifier.telemetry import Telemetry


def audit_handler(telemetry: Telemetry) -> Handler:
    """Return a handler that logs `mollifier.drained` for each entry."""

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        return [_audit(telemetry, entry) for entry in entries]

    return handle


def _audit(telemetry: Telemetry, entry: Entry) -> Outcome:
    try:
        snapshot = snapshots.decode(entry.payload)
    except NonRetryableError as error:
        return error
    telemetry.drained(snapshot, entry)
    return None
