"""5. Lists of runs over both stores: newest first by (created_at, id), in pages that stay where they are while runs are drained.

Both stores keep that one order: the engine in an index, the buffer in a sorted set whose scores are the triggers' moments. A page asks each for
what is nearest to its cursor and merges the two. The buffer is read first: a run that moves from the buffer to the engine in between is
then seen twice, and is shown once, as the engine has it; the other way round it would be missed.

The engine answers filters from its indexes; the buffer knows nothing of what it holds, so its runs are read in chunks, nearest first,
until the page is full. A read of very many that match nothing stops early: the page is then short, and leads on from the place that was reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec
from msgspec.structs import replace

from mollifier import held
from mollifier.buffer import Buffer, HeldPlace
from mollifier.cursors import Cursor, as_us, cursor_at, cursor_of, from_us, position
from mollifier.engine import RunEngine
from mollifier.errors import MalformedEntryError, NonRetryableError
from mollifier.model import Entry, EntryKind, EntryState, Environment, Run, RunFilter, RunPage

_CHUNK = 32
_CHUNK_MAX = 500
_CHUNK_BYTES = 8 * 2**20
_READ_MAX = 10_000
_READ_BYTES = 64 * 2**20


class HeldRuns(msgspec.Struct, frozen=True):
    """Held runs that a page may show, nearest to its cursor first. `reached`: up to this place that is all of them; None: everywhere."""

    runs: tuple[Run, ...] = ()
    reached: Cursor | None = None


async def held_runs(
    buffer: Buffer, engine: RunEngine, environment: Environment, query: RunFilter, now: datetime
) -> HeldRuns:
    """Read the held runs that the filter shows: those nearest to its cursor, one more than the page has room for."""
    cursor = position(query)
    place = None if cursor is None else HeldPlace(as_us(cursor[0]), cursor[1])
    found: list[Run] = []
    read, read_bytes = 0, 0
    while True:
        limit = _limit(query, len(found), read, read_bytes)
        places = await buffer.held_places(
            environment.org_id,
            environment.id,
            beyond=place,
            newest_first=query.before is None,
            limit=limit,
            from_us=None if query.created_from is None else as_us(query.created_from),
            to_us=None if query.created_to is None else as_us(query.created_to),
        )
        entries = await buffer.get_entries(environment.org_id, [place.run_id for place in places])
        found += await _shown(engine, environment, query, entries, now)
        if len(places) < limit:
            return HeldRuns(tuple(found))
        place = places[-1]
        read += len(places)
        read_bytes += sum(len(entry.payload) for entry in entries if isinstance(entry, Entry))
        if len(found) > query.page_size or read >= _READ_MAX or read_bytes >= _READ_BYTES:
            return HeldRuns(tuple(found), reached=(from_us(place.created_us), place.run_id))


def merge(page: RunPage, waiting: HeldRuns, query: RunFilter) -> RunPage:
    """Return the page with the held runs in their places; one that is in the engine by now is shown as it is there."""
    backwards = query.before is not None
    known = {run.id for run in page.runs}
    both = [*page.runs, *(run for run in waiting.runs if run.id not in known)]
    both.sort(key=_key, reverse=not backwards)
    if (reached := waiting.reached) is not None:
        both = [run for run in both if (_key(run) <= reached if backwards else _key(run) >= reached)]
    shown = both[: query.page_size]
    # Where the engine has more than its page shows, its page is full, and so is this one unless the buffer was not read far enough.
    engine_has_more = (page.previous if backwards else page.next) is not None
    far = near = None
    if len(both) > len(shown) or engine_has_more or reached is not None:
        far = cursor_at(*reached) if reached is not None and len(shown) < query.page_size else cursor_of(shown[-1])
    if shown and (query.after is not None or backwards):
        near = cursor_of(shown[0])
    if backwards:
        return RunPage(runs=tuple(reversed(shown)), next=near, previous=far)
    return RunPage(runs=tuple(shown), next=far, previous=near)


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


def _limit(query: RunFilter, found: int, read: int, read_bytes: int) -> int:
    """Return how many entries to read next: what the page lacks where all are shown, else more and more; never too many bytes."""
    missing = query.page_size + 1 - found
    if not read:
        return min(missing, _CHUNK)
    wanted = _CHUNK_MAX if _selects(query) else missing
    return max(1, min(wanted, _CHUNK_MAX, _CHUNK_BYTES * read // max(1, read_bytes)))


async def _shown(
    engine: RunEngine,
    environment: Environment,
    query: RunFilter,
    entries: Sequence[Entry | MalformedEntryError | None],
    now: datetime,
) -> list[Run]:
    """Return the runs of these entries that the filter shows, without those that the engine may know as something else by now."""
    runs = [run for run in (_listed(entry, now) for entry in entries) if run is not None and matches(run, query)]
    if not runs or not (query.statuses or query.tags):
        return runs
    # A created run is shown as the engine has it, or not at all where it no longer matches.
    created = await engine.get_progress(environment.id, [run.id for run in runs])
    return [run for run in runs if run.id not in created]


def _listed(entry: Entry | MalformedEntryError | None, now: datetime) -> Run | None:
    """Return the run of an entry as a list shows it; None where the engine has it, and where there is nothing to be read."""
    if not isinstance(entry, Entry) or entry.kind is not EntryKind.HELD or entry.state is EntryState.MATERIALISED:
        return None
    try:
        run = held.run_of(entry, now)
    except NonRetryableError:
        return None
    return replace(run, snapshot=replace(run.snapshot, payload=b"", context=None))


def _selects(query: RunFilter) -> bool:
    """Return whether the filter may pass over held runs within its span of time."""
    return bool(query.statuses or query.task_ids or query.tags or query.batch_id) or query.is_test is not None


def _key(run: Run) -> Cursor:
    return run.snapshot.created_at, run.id
