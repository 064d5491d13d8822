"""4. Held runs as runs: what the caller sees of an entry, and where it stands in a list. No state is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from mollifier import patches, snapshots
from mollifier.buffer import Buffer
from mollifier.cursors import Cursor, cursor_of, position
from mollifier.engine import Creation, Ending
from mollifier.errors import MalformedEntryError, NonRetryableError
from mollifier.model import Entry, EntryState, Environment, Run, RunError, RunFilter, RunPage, RunStatus, Snapshot
from mollifier.patches import Patched

SUPERSEDED = "IdempotencyConflict"
"""The name of the error of a run that gave way to another one with its key."""
_CHUNK = 200


def patched(entry: Entry) -> Patched:
    """Return the entry's snapshot as its patches leave it. Raises NonRetryableError when it does not parse."""
    return patches.apply_all(snapshots.decode(entry.payload), patches.decode(entry.patches))


def run_of(entry: Entry, now: datetime) -> Run:
    """Return the run that the entry stands for, exactly as it will read once created."""
    return as_run(entry, patched(entry), now)


def as_run(entry: Entry, held: Patched, now: datetime) -> Run:
    """Return the run of an entry whose patches have been applied."""
    snapshot = held.snapshot
    status = _status(held, now)
    ended_at = held.cancelled_at
    if status is RunStatus.EXPIRED:
        ended_at = _expiry(snapshot)
    error = None
    if entry.state is EntryState.FAILED:
        status, error = RunStatus.SYSTEM_FAILURE, RunError(message=entry.error or "", name="SystemFailure")
    return Run(
        snapshot=snapshot,
        status=status,
        updated_at=held.cancelled_at or snapshot.created_at,
        finished_at=ended_at,
        expired_at=ended_at if status is RunStatus.EXPIRED else None,
        error=error,
    )


def superseded(creation: Creation, winner: str, at: datetime) -> Creation:
    """Return what to create of a held run whose key another run took while nobody could know: CANCELED, naming the winner."""
    message = f"Its key belongs to {winner}, which was created while this run was held."
    error = RunError(message=message, name=SUPERSEDED)
    ending = Ending(status=RunStatus.CANCELED, at=at, error=error, frees_keys=True)
    return msgspec.structs.replace(creation, ending=ending)


async def candidates(buffer: Buffer, environment: Environment, query: RunFilter, now: datetime) -> list[Run]:
    """Return the held runs that may stand on the page: those nearest to its cursor, one more than it has room for."""
    cursor = position(query)
    backwards = query.before is not None
    from_ms = int(cursor[0].timestamp() * 1000) if cursor is not None else None
    run_ids = await buffer.held_run_ids(environment.org_id, environment.id, from_ms=from_ms, newest_first=not backwards)
    found: list[Run] = []
    for start in range(0, len(run_ids), _CHUNK):
        entries = await buffer.get_entries(environment.org_id, run_ids[start : start + _CHUNK])
        seen = [run for run in (_listed(entry, now) for entry in entries) if run is not None]
        found += [run for run in seen if _beyond(run, cursor, query) and matches(run, query)]
        # The index knows milliseconds only: what shares the last one seen may belong before it, so that one is read to its end.
        if seen and len(found) > query.page_size and _ms(seen[-1]) != _ms(found[query.page_size]):
            break
    return found


def merge(page: RunPage, held: Sequence[Run], query: RunFilter) -> RunPage:
    """Return the page with the held runs in their places; one that is in the engine by now is shown as it is there."""
    known = {run.id for run in page.runs}
    both = [*page.runs, *(run for run in held if run.id not in known)]
    both.sort(key=_key, reverse=True)
    backwards = query.before is not None
    shown = both[-query.page_size :] if backwards else both[: query.page_size]
    cut = len(both) > len(shown)
    older = (True if backwards else cut or page.next is not None) if shown else False
    newer = (cut or page.previous is not None) if backwards else (page.previous is not None or query.after is not None)
    return RunPage(
        runs=tuple(shown),
        next=cursor_of(shown[-1]) if shown and older else None,
        previous=cursor_of(shown[0]) if shown and newer else None,
    )


def matches(run: Run, query: RunFilter) -> bool:
    """Return whether the run is one that the filter shows, by the engine's own rules."""
    snapshot = run.snapshot
    return (
        (not query.statuses or run.status in query.statuses)
        and (not query.task_ids or snapshot.task_id in query.task_ids)
        and (not query.tags or not set(query.tags).isdisjoint(snapshot.tags))
        and (query.is_test is None or snapshot.test == query.is_test)
        and (query.created_from is None or snapshot.created_at >= query.created_from)
        and (query.created_to is None or snapshot.created_at <= query.created_to)
        and (query.batch_id is None or snapshot.batch_id == query.batch_id)
    )


def _status(held: Patched, now: datetime) -> RunStatus:
    if held.cancelled_at is not None:
        return RunStatus.CANCELED
    expires_at = _expiry(held.snapshot)
    if expires_at is not None and expires_at <= now:
        return RunStatus.EXPIRED
    delayed_until = held.snapshot.delayed_until
    return RunStatus.DELAYED if delayed_until is not None and delayed_until > now else RunStatus.QUEUED


def _expiry(snapshot: Snapshot) -> datetime | None:
    if snapshot.ttl_s is None:
        return None
    try:
        return (snapshot.delayed_until or snapshot.created_at) + timedelta(seconds=snapshot.ttl_s)
    except OverflowError:
        return None


def _listed(entry: Entry | MalformedEntryError | None, now: datetime) -> Run | None:
    if entry is None or isinstance(entry, MalformedEntryError):
        return None
    try:
        return run_of(entry, now)
    except NonRetryableError:
        return None


def _key(run: Run) -> tuple[datetime, str]:
    return run.snapshot.created_at, run.id


def _beyond(run: Run, cursor: Cursor | None, query: RunFilter) -> bool:
    if cursor is None:
        return True
    return _key(run) > cursor if query.before is not None else _key(run) < cursor


def _ms(run: Run) -> int:
    return int(run.snapshot.created_at.timestamp() * 1000)
