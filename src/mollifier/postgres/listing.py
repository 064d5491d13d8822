"""Lists of runs, page by page, newest first by (created_at, id)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, LargeBinary, and_, literal, null, or_, select, tuple_
from sqlalchemy.sql.selectable import Select

from mollifier.cursors import cursor_of, position
from mollifier.model import Run, RunFilter, RunPage, RunStatus
from mollifier.postgres.tables import runs

_CARRIED = ("payload", "context", "output")
SHOWN: Sequence[ColumnElement[Any]] = (
    *(column for column in runs.c if column.name not in _CARRIED),
    literal(b"", LargeBinary).label("payload"),
    null().label("context"),
    null().label("output"),
)
"""The columns of a run without what it carries, which may be large."""


def page_query(env_id: str, query: RunFilter, now: datetime) -> Select[*tuple[Any, ...]]:
    """Return the query of one page and one row more, which tells whether there is another page."""
    conditions = [runs.c.environment_id == env_id, *_conditions(query, now)]
    order = tuple_(runs.c.created_at, runs.c.id)
    place = position(query)
    if place is not None:
        conditions.append(order > tuple_(*place) if query.before is not None else order < tuple_(*place))
    if query.before is not None:
        sorting = (runs.c.created_at.asc(), runs.c.id.asc())
    else:
        sorting = (runs.c.created_at.desc(), runs.c.id.desc())
    return select(*SHOWN).where(*conditions).order_by(*sorting).limit(query.page_size + 1)


def page_of(found: Sequence[Run], query: RunFilter) -> RunPage:
    """Return the page that the query's rows make, in the order in which they were found."""
    has_more = len(found) > query.page_size
    shown = list(found[: query.page_size])
    if query.before is not None:
        shown.reverse()
    if not shown:
        return RunPage(runs=())
    # Whoever came from a cursor came from a page on its other side.
    has_older = has_more or query.before is not None if query.after is None else has_more
    has_newer = has_more if query.before is not None else query.after is not None
    return RunPage(
        runs=tuple(shown),
        next=cursor_of(shown[-1]) if has_older else None,
        previous=cursor_of(shown[0]) if has_newer else None,
    )


def _conditions(query: RunFilter, now: datetime) -> Sequence[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if query.statuses:
        conditions.append(_has_status(query.statuses, now))
    if query.task_ids:
        conditions.append(runs.c.task_id.in_(query.task_ids))
    if query.tags:
        conditions.append(runs.c.tags.overlap(list(query.tags)))
    if query.is_test is not None:
        conditions.append(runs.c.test == query.is_test)
    if query.created_from is not None:
        conditions.append(runs.c.created_at >= query.created_from)
    if query.created_to is not None:
        conditions.append(runs.c.created_at <= query.created_to)
    if query.batch_id is not None:
        conditions.append(runs.c.batch_id == query.batch_id)
    return conditions


def _has_status(statuses: Sequence[RunStatus], now: datetime) -> ColumnElement[bool]:
    """Match what a reader sees: a delayed run is queued from its due moment on, whether or not upkeep has seen it."""
    is_stored = runs.c.status.in_(status.value for status in statuses)
    is_due = and_(runs.c.due_at.is_not(None), runs.c.due_at <= now)
    wants_queued, wants_delayed = RunStatus.QUEUED in statuses, RunStatus.DELAYED in statuses
    if wants_queued and not wants_delayed:
        return or_(is_stored, is_due)
    if wants_delayed and not wants_queued:
        return and_(is_stored, or_(runs.c.due_at.is_(None), runs.c.due_at > now))
    return is_stored
