"""Which runs a list shows: the query of `GET /api/v1/runs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from litestar.datastructures import MultiDict

from mollifier.durations import MOMENT_FORMS, YEARS, parse_duration, parse_moment
from mollifier.errors import FieldError, InvalidRequestError
from mollifier.fields import text_fault
from mollifier.http.openapi import parameter
from mollifier.model import RunFilter, RunStatus
from mollifier.request import NAME_LENGTH_MAX

PAGE_SIZE = (1, 100)
PAGE_SIZE_DEFAULT = 25
VALUES_MAX = 100
_EPOCH_DIGITS_MAX = 15

QUERY_PARAMETERS = [
    parameter("page[size]", f"How many, {PAGE_SIZE[0]} to {PAGE_SIZE[1]}; {PAGE_SIZE_DEFAULT} by default"),
    parameter("page[after]", "The cursor `pagination.next` of the page before"),
    parameter("page[before]", "The cursor `pagination.previous` of the page after; wins over page[after]"),
    parameter("filter[status]", f"Of {', '.join(RunStatus)}; several with commas"),
    parameter("filter[taskIdentifier]", "Task ids, several with commas"),
    parameter("filter[tag]", "Tags, several with commas; a run has to have one of them"),
    parameter("filter[isTest]", "true or false"),
    parameter("filter[createdAt][from]", "A date, or milliseconds since 1970"),
    parameter("filter[createdAt][to]", "A date, or milliseconds since 1970"),
    parameter("filter[createdAt][period]", "A duration back from now, in place of from"),
    parameter("filter[batch]", "A batch's id"),
]

T = TypeVar("T")
Query = MultiDict[str]


def run_filter(query: Query, now: datetime) -> RunFilter:
    """Return the filter that a query asks for; unknown parameters are ignored. Raises InvalidRequestError naming each at fault.

    Several statuses, tasks or tags are given as one value with commas, or by repeating the parameter.
    """
    errors: list[FieldError] = []

    def one(name: str, read: Callable[[str], T]) -> T | None:
        text = query.get(name)
        if not text:
            return None
        fault = text_fault(text, NAME_LENGTH_MAX)
        try:
            if fault is None:
                return read(text)
        except ValueError as error:
            fault = str(error)
        errors.append(FieldError(name, fault))
        return None

    def many(name: str, read: Callable[[str], T]) -> tuple[T, ...]:
        found: list[T] = []
        for text in _values(query.getall(name, [])):
            fault = text_fault(text, NAME_LENGTH_MAX) if len(found) < VALUES_MAX else f"must be at most {VALUES_MAX}"
            try:
                if fault is None:
                    found.append(read(text))
                    continue
            except ValueError as error:
                fault = str(error)
            errors.append(FieldError(name, fault))
            break
        return tuple(found)

    before = one("page[before]", str)
    period = one("filter[createdAt][period]", parse_duration)
    created_from = one("filter[createdAt][from]", _moment)
    if period is not None and created_from is not None:
        errors.append(
            FieldError("filter[createdAt][period]", "goes without filter[createdAt][from]: give one of the two")
        )
    found = RunFilter(
        page_size=one("page[size]", _page_size) or PAGE_SIZE_DEFAULT,
        # A client that turns back repeats the query of the page it is on, and that names where that page came from.
        after=one("page[after]", str) if before is None else None,
        before=before,
        statuses=many("filter[status]", _status),
        task_ids=many("filter[taskIdentifier]", str),
        tags=many("filter[tag]", str),
        is_test=one("filter[isTest]", _boolean),
        created_from=created_from if period is None else now - period,
        created_to=one("filter[createdAt][to]", _moment),
        batch_id=one("filter[batch]", str),
    )
    if errors:
        raise InvalidRequestError(*errors)
    return found


def _values(texts: Sequence[str]) -> Iterator[str]:
    return (part for text in texts for part in text.split(",") if part)


def _page_size(text: str) -> int:
    low, high = PAGE_SIZE
    if text.isascii() and text.isdigit() and len(text) <= len(str(high)) and low <= int(text) <= high:
        return int(text)
    raise ValueError(f"must be a number from {low} to {high}, in digits alone")


def _status(text: str) -> RunStatus:
    try:
        return RunStatus(text)
    except ValueError:
        raise ValueError(f"must be of {', '.join(RunStatus)}") from None


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _moment(text: str) -> datetime:
    """Read a date, or the milliseconds since 1970 that clients make of one."""
    if text.isascii() and text.isdigit() and len(text) <= _EPOCH_DIGITS_MAX:
        moment = datetime.fromtimestamp(int(text) / 1000, UTC)
        if moment.year <= YEARS[1]:
            return moment
    try:
        return parse_moment(text)
    except ValueError:
        raise ValueError(f"expected milliseconds since 1970 or {MOMENT_FORMS}") from None
