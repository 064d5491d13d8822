"""Places in a list of runs: opaque to the caller, the same in both stores.

A cursor names a place between runs, (created_at, id), not a page number: runs that appear at the top, or move from one store to the
other while someone reads, move nothing.
"""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime, timedelta

import msgspec

from mollifier.errors import FieldError, InvalidRequestError
from mollifier.model import Run, RunFilter

Cursor = tuple[datetime, str]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class _Place(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    created_at: datetime
    id: str


def cursor_of(run: Run) -> str:
    """Return the cursor of the run's place."""
    return cursor_at(run.snapshot.created_at, run.id)


def cursor_at(created_at: datetime, run_id: str) -> str:
    """Return the cursor of a place, whether or not a run stands there."""
    place = msgspec.json.encode(_Place(created_at, run_id))
    return base64.urlsafe_b64encode(place).rstrip(b"=").decode()


def as_us(moment: datetime) -> int:
    """Return the moment as microseconds since 1970, which is all that a moment has: places compare as their moments do."""
    return (moment - _EPOCH) // _MICROSECOND


def from_us(moment_us: int) -> datetime:
    """Return the moment of so many microseconds since 1970."""
    return _EPOCH + moment_us * _MICROSECOND


def from_ms(moment_ms: int | None) -> datetime | None:
    """Return the moment of so many milliseconds since 1970; None where no calendar has it, as of an entry that was damaged."""
    try:
        return None if moment_ms is None else from_us(moment_ms * 1000)
    except OverflowError:
        return None


def position(query: RunFilter) -> Cursor | None:
    """Return the place that the filter's page starts from, None for the newest page.

    Raises InvalidRequestError, naming `page[after]` or `page[before]`, for a cursor that was not made here, and for both at once.
    """
    if query.after is not None and query.before is not None:
        raise InvalidRequestError(FieldError("page[before]", "goes without page[after]: give one of the two"))
    if query.after is not None:
        return place_of(query.after, "page[after]")
    if query.before is not None:
        return place_of(query.before, "page[before]")
    return None


def place_of(cursor: str, field: str) -> Cursor:
    """Return the place that a cursor names. Raises InvalidRequestError, naming the field, for one that was not made here."""
    try:
        encoded = cursor.encode("ascii")
        text = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        place = msgspec.json.decode(text, type=_Place)
    except (UnicodeEncodeError, binascii.Error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _no_cursor(field) from error
    if "\0" in place.id:
        # No run is called so, and no database can be asked for what comes after it.
        raise _no_cursor(field)
    if place.created_at.tzinfo is None:
        return place.created_at.replace(tzinfo=UTC), place.id
    return place.created_at, place.id


def _no_cursor(field: str) -> InvalidRequestError:
    return InvalidRequestError(FieldError(field, "is no cursor of a page; take it from `pagination`"))
