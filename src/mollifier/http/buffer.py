"""The admin API's look into the buffer. Asking opens a connection to the buffer's server, also while Mollifier is off."""

from __future__ import annotations

from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get
from litestar.params import Parameter

from mollifier.buffer import Buffer
from mollifier.caps import ENV_CAPS, ORG_CAPS, CapUse, uses
from mollifier.cursors import from_ms
from mollifier.errors import FieldError, InvalidRequestError, MalformedEntryError
from mollifier.http.openapi import documented
from mollifier.http.problems import RefusedError
from mollifier.http.render import json_response
from mollifier.http.services import Services, services_of
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.settings import variable
from mollifier.sweeps import SweepReport

LIMIT = (1, 1000)
LIMIT_DEFAULT = 100
OFFSET_MAX = 10**9


class CapBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """A cap that is set: the most that may be held, and what is held of it by its fullest environment or organization, or in all."""

    setting: str
    most: int
    held: int
    env_id: str | None = None
    org_id: str | None = None


class SweepBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the last sweep found: `stale` entries were due for too long, and the tables count by place or kind, without zeros."""

    at: datetime | None
    stale: int
    oldest_ms: int
    entries: int
    held_bytes: int
    dead_letters: int
    orphans: dict[str, int]
    mismatches: dict[str, int]
    repaired: dict[str, int]


class BufferBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How much the buffer holds; `oldestMs` is the age of the longest-held queued entry, null when nothing is queued.

    Held are the entries that are the only copy of their run, failed ones too; what they carry takes `heldBytes`.
    `sweep` is null when there was none within a week.
    """

    queued: int
    waiting: int
    draining: int
    failed: int
    organizations: tuple[str, ...]
    oldest_ms: int | None
    held_entries: int
    held_bytes: int
    caps: tuple[CapBody, ...]
    sweep: SweepBody | None


class EntryBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """One entry; of one that does not parse, its run and the error."""

    run_id: str
    env_id: str | None = None
    org_id: str | None = None
    kind: EntryKind | None = None
    state: EntryState | None = None
    sequence: int | None = None
    attempts: int | None = None
    accepted_at: datetime | None = None
    not_before: datetime | None = None
    payload_bytes: int | None = None
    error: str | None = None


class EntryList(msgspec.Struct, frozen=True):
    """Entries of one environment, oldest first."""

    data: list[EntryBody]


@get(
    "/buffer", summary="Count what the buffer holds", operation_class=documented(HTTPStatus.NOT_FOUND, key="adminToken")
)
async def get_buffer(request: Request[Any, Any, Any]) -> Response[BufferBody]:
    """Count what the buffer holds: by state, how much of the caps it is, the oldest entry's age; and what the last sweep found."""
    services = services_of(request)
    buffer = buffer_of(services)
    counts, usage, sweep = await buffer.counts(), await buffer.usage(), await buffer.last_sweep()
    return json_response(
        BufferBody(
            queued=counts.queued,
            waiting=counts.waiting,
            draining=counts.draining,
            failed=counts.failed,
            organizations=counts.organizations,
            oldest_ms=counts.oldest_ms,
            held_entries=usage.total.entries,
            held_bytes=usage.total.bytes,
            caps=tuple(_cap(use) for use in uses(services.settings, usage)),
            sweep=None if sweep is None else _sweep(sweep),
        )
    )


@get(
    "/buffer/entries",
    summary="List queued entries",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, key="adminToken"),
)
async def list_entries(
    request: Request[Any, Any, Any],
    env: Annotated[str | None, Parameter(description="The environment's id, required")] = None,
    limit: Annotated[str | None, Parameter(description="How many, 1 to 1000; 100 by default")] = None,
    offset: Annotated[str | None, Parameter(description="How many to pass over")] = None,
) -> Response[EntryList]:
    """List the queued entries of one environment, oldest first."""
    if not env or "\0" in env:
        raise InvalidRequestError(FieldError("env", "is required: the id of the environment whose entries to list"))
    services = services_of(request)
    buffer = buffer_of(services)
    found = await buffer.list_entries(
        await services.tenants.organization_of(env),
        env,
        offset=query_number("offset", offset, 0, 0, OFFSET_MAX),
        limit=query_number("limit", limit, LIMIT_DEFAULT, *LIMIT),
    )
    return json_response(EntryList([_entry(entry) for entry in found]))


BUFFER_ROUTES = (get_buffer, list_entries)


def buffer_of(services: Services) -> Buffer:
    """Return the buffer. Raises RefusedError where none is configured."""
    buffer = services.mollifier.buffer
    if buffer is None:
        detail = f"No buffer is configured: set {variable('redis_url')} and restart the API."
        raise RefusedError(HTTPStatus.NOT_FOUND, detail)
    return buffer


def _cap(use: CapUse) -> CapBody:
    owner_id = use.owner_id or None
    return CapBody(
        setting=variable(use.cap),
        most=use.most,
        held=use.held,
        env_id=owner_id if use.cap in ENV_CAPS else None,
        org_id=owner_id if use.cap in ORG_CAPS else None,
    )


def _sweep(report: SweepReport) -> SweepBody:
    return SweepBody(
        at=from_ms(report.at_ms),
        stale=report.stale,
        oldest_ms=report.oldest_ms,
        entries=report.entries,
        held_bytes=report.held_bytes,
        dead_letters=report.dead_letters,
        orphans=dict(report.orphans),
        mismatches=dict(report.mismatches),
        repaired=dict(report.repaired),
    )


def _entry(entry: Entry | MalformedEntryError) -> EntryBody:
    if isinstance(entry, MalformedEntryError):
        return EntryBody(run_id=entry.run_id, error=str(entry))
    return EntryBody(
        run_id=entry.run_id,
        env_id=entry.env_id,
        org_id=entry.org_id,
        kind=entry.kind,
        state=entry.state,
        sequence=entry.sequence,
        attempts=entry.attempts,
        accepted_at=from_ms(entry.accepted_at_ms),
        not_before=from_ms(entry.not_before_ms),
        payload_bytes=len(entry.payload),
        error=entry.error,
    )


def query_number(name: str, text: str | None, default: int, low: int, high: int) -> int:
    """Return the number that a parameter of the query says. Raises InvalidRequestError where it says none within the range."""
    if not text:
        return default
    if text.isascii() and text.isdigit() and len(text) <= len(str(high)) and low <= int(text) <= high:
        return int(text)
    raise InvalidRequestError(FieldError(name, f"must be a number from {low} to {high}, in digits alone"))
