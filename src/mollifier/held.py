"""4. Held runs as runs: what the caller sees of an entry. No state is changed here."""

from __future__ import annotations

from datetime import datetime

import msgspec

from mollifier import patches, snapshots
from mollifier.cursors import from_ms
from mollifier.engine import Creation, Ending, KeyKind
from mollifier.expiry import EXPIRED_ERROR, expiry_of
from mollifier.model import Entry, EntryState, Run, RunError, RunStatus
from mollifier.patches import Patched

FAILURE = "SystemFailure"
"""The name of the error of a run that was given up."""
SUPERSEDED = "IdempotencyConflict"
"""The name of the error of a run that gave way to another one with its key."""


def patched(entry: Entry) -> Patched:
    """Return the entry's snapshot as its patches leave it. Raises NonRetryableError when it does not parse."""
    left = patches.apply_all(snapshots.decode(entry.payload), patches.decode(entry.patches))
    # What was changed before is as it was then: whoever asks what may be changed now is told that it has failed.
    return msgspec.structs.replace(left, has_failed=entry.state is EntryState.FAILED)


def run_of(entry: Entry, now: datetime) -> Run:
    """Return the run that the entry stands for, exactly as it will read once created."""
    return as_run(entry, patched(entry), now)


def as_run(entry: Entry, held: Patched, now: datetime) -> Run:
    """Return the run of an entry whose patches have been applied."""
    snapshot = held.snapshot
    status = patches.status_at(held, now)
    expired_at = expiry_of(snapshot) if status is RunStatus.EXPIRED else None
    ended_at = held.cancelled_at or expired_at
    error = EXPIRED_ERROR if status is RunStatus.EXPIRED else None
    if held.has_failed:
        # As it would have been recorded when it was given up.
        error = RunError(message=entry.error or "", name=FAILURE)
        ended_at = held.cancelled_at or from_ms(entry.failed_at_ms)
    return Run(
        snapshot=snapshot,
        status=status,
        updated_at=max(filter(None, (snapshot.created_at, held.changed_at, ended_at))),
        finished_at=ended_at,
        expired_at=expired_at,
        error=error,
    )


def superseded(creation: Creation, winner: str, by: KeyKind, at: datetime) -> Creation:
    """Return what to create of a held run whose key of this kind another run took while nobody could know: CANCELED, naming the winner."""
    message = f"Its key belongs to {winner}, which was created while this run was held."
    error = RunError(message=message, name=SUPERSEDED)
    ending = Ending(status=RunStatus.CANCELED, at=at, error=error, frees=(by,))
    return msgspec.structs.replace(creation, ending=ending)
