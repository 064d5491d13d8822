"""Lists of runs, page by page, newest first by (created_at, id).

A cursor names a place between runs, not a page number: runs that appear at the top while someone reads move nothing below.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, literal_column, or_, select, tuple_
from sqlalchemy.sql.selectable import Select

from mollifier.errors import FieldError, InvalidRequestError
from mollifier.model import Run, RunFilter, RunPage, RunStatus
from mollifier.postgres.tables import runs


class _Place(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    created_at: datetime
    id: str


def page_query(env_id: str, query: RunFilter, now: datetime) -> Select[*tuple[Any, ...]]:
    """Return the query of one page and one row more, which tells whether there is another page."""
    conditions = [runs.c.environment_id == env_id, *_conditions(query, now)]
    order = tuple_(runs.c.created_at, runs.c.id)
    if query.after is not None and query.before is not None:
        raise InvalidRequestError(FieldError("page[before]", "goes without page[after]: give one of the two"))
    if query.after is not None:
        conditions.append(order < _place(query.after, "page[after]"))
    if query.before is not None:
        conditions.append(order > _place(query.before, "page[before]"))
        sorting = (runs.c.created_at.asc(), runs.c.id.asc())
    else:
        sorting = (runs.c.created_at.desc(), runs.c.id.desc())
    everything: ColumnElement[Any] = literal_column("runs.*")
    return select(everything).select_from(runs).where(*conditions).order_by(*sorting).limit(query.page_size + 1)


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
        next=_cursor(shown[-1]) if has_older else None,
        previous=_cursor(shown[0]) if has_newer else None,
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


def _cursor(run: Run) -> str:
    place = msgspec.json.encode(_Place(run.snapshot.created_at, run.id))
    return base64.urlsafe_b64encode(place).rstrip(b"=").decode()


def _place(cursor: str, field: str) -> Any:
    try:
        encoded = cursor.encode("ascii")
        text = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        place = msgspec.json.decode(text, type=_Place)
    except (UnicodeEncodeError, binascii.Error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequestError(FieldError(field, "is no cursor of a page; take it from `pagination`")) from error
    if place.created_at.tzinfo is None:
        place.created_at = place.created_at.replace(tzinfo=UTC)
    return tuple_(place.created_at, place.id)
