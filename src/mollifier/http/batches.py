"""Batches: many triggers in one call, or announced and then streamed, and how far they are."""

from __future__ import annotations

import asyncio
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get, post
from litestar.params import Parameter

from mollifier.batch_request import parse_announcement, parse_batch, parse_line
from mollifier.batches import BatchAdded, BatchView
from mollifier.errors import NotFoundError
from mollifier.http.auth import environment_of
from mollifier.http.bodies import json_body
from mollifier.http.lines import lines
from mollifier.http.openapi import documented, parameter
from mollifier.http.raw_path import path_id
from mollifier.http.render import json_response
from mollifier.http.schemas import AnnouncementBody, BatchBody, BatchLineBody
from mollifier.http.services import Services, services_of
from mollifier.http.triggers import ORIGIN_PARAMETERS, emit, emitting, headers_of
from mollifier.model import Batch, BatchItem, BatchStatus, Environment
from mollifier.request import REQUEST_KEY
from mollifier.settings import Settings

ITEMS_PER_STEP = 500
"""So many items of a stream are triggered together, or fewer whose bytes come to one body's limit."""
CLAIMS_HEADER = "x-trigger-jwt-claims"

_REQUEST_KEY = parameter(
    REQUEST_KEY, "Names this request: sent again within a day, it is answered with the batch it made", "header"
)

BatchId = Annotated[str, Parameter(description="The batch's id")]


class BatchTriggered(msgspec.Struct, frozen=True, rename="camel"):
    """The batch, and how many items it has."""

    id: str
    run_count: int


class BatchAnnounced(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """The batch to stream items to; `isCached` is true when its idempotency key answered, with the batch it was given to first."""

    id: str
    run_count: int
    is_cached: bool
    idempotency_key: str | None = None


class ItemsAdded(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """What became of the streamed items. Until the batch is `sealed` it lacks some; the counts then say how many it has of how many."""

    id: str
    items_accepted: int
    items_deduplicated: int
    sealed: bool
    enqueued_count: int | None = None
    expected_count: int | None = None


class BatchProcessing(msgspec.Struct, frozen=True):
    """How making the runs went: there are no errors, as an item that cannot be made is refused when it comes."""

    errors: tuple[str, ...]


class BatchDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """A batch; COMPLETED when all of its runs have ended. `runs` are in the order of the items, held ones included."""

    id: str
    status: BatchStatus
    created_at: datetime
    updated_at: datetime
    run_count: int
    runs: tuple[str, ...]
    processing: BatchProcessing
    idempotency_key: str | None = None


@post(
    "/api/v2/tasks/batch",
    status_code=200,
    tags=["Batches"],
    summary="Trigger many runs at once",
    operation_class=documented(
        HTTPStatus.NOT_FOUND,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        body=BatchBody,
        parameters=[_REQUEST_KEY, *ORIGIN_PARAMETERS],
    ),
)
async def trigger_batch(request: Request[Any, Any, Any]) -> Response[BatchTriggered]:
    """Trigger up to a thousand runs, of any tasks; one mistake anywhere, and none is triggered."""
    environment = await environment_of(request)
    batch_request, items = parse_batch(await json_body(request), headers_of(request))
    added = await services_of(request).mollifier.batches.trigger(environment, batch_request, items)
    answer = BatchTriggered(added.batch.id, added.batch.run_count)
    return json_response(answer, after=emitting(added.after_answer), headers=_claims(environment))


@post(
    "/api/v3/batches",
    status_code=200,
    tags=["Batches"],
    summary="Announce a batch",
    operation_class=documented(HTTPStatus.UNPROCESSABLE_ENTITY, body=AnnouncementBody, parameters=[_REQUEST_KEY]),
)
async def create_batch(request: Request[Any, Any, Any]) -> Response[BatchAnnounced]:
    """Make a batch without items; they are streamed to it next."""
    environment = await environment_of(request)
    batch_request = parse_announcement(await json_body(request), headers_of(request))
    created = await services_of(request).mollifier.batches.create(environment, batch_request)
    batch = created.batch
    answer = BatchAnnounced(batch.id, batch.run_count, created.is_cached, batch.idempotency_key)
    return json_response(answer, headers=_claims(environment))


@post(
    "/api/v3/batches/{batchId:str}/items",
    status_code=200,
    # The limit holds for each line; a stream may be as long as its batch.
    request_max_body_size=None,
    tags=["Batches"],
    summary="Stream items to a batch",
    operation_class=documented(
        HTTPStatus.NOT_FOUND,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        body=BatchLineBody,
        parameters=ORIGIN_PARAMETERS,
        media_type="application/x-ndjson",
    ),
)
async def add_batch_items(request: Request[Any, Any, Any], batchId: BatchId) -> Response[ItemsAdded]:
    """Trigger the items as they come, some hundred at a time. An item that the batch has already is passed over.

    After an error, or a connection that broke, the whole stream can be sent again.
    """
    environment = await environment_of(request)
    services = services_of(request)
    stream = _Stream(services, environment, await _batch(services, environment, batchId))
    headers = headers_of(request)
    async for number, line in lines(request, services.settings.body_limit_bytes):
        await stream.take(parse_line(line, number, stream.batch, headers), len(line))
    added = await stream.end()
    batch = added.batch
    answer = ItemsAdded(batch.id, stream.accepted, stream.deduplicated, batch.sealed)
    if not batch.sealed:
        answer = msgspec.structs.replace(answer, enqueued_count=len(batch.runs), expected_count=batch.run_count)
    return json_response(answer, after=emitting(added.after_answer))


@get(
    "/api/v2/batches/{batchId:str}",
    tags=["Batches"],
    summary="Read a batch",
    operation_class=documented(HTTPStatus.NOT_FOUND),
)
async def get_batch(request: Request[Any, Any, Any], batchId: BatchId) -> Response[BatchDetails]:
    """Read how far the batch is, and its runs."""
    environment = await environment_of(request)
    services = services_of(request)
    batch = await _batch(services, environment, batchId)
    return json_response(_details(await services.mollifier.batches.view(environment, batch)))


class _Stream:
    """Items on their way into a batch: gathered until there are enough for a step, then triggered together."""

    def __init__(self, services: Services, environment: Environment, batch: Batch) -> None:
        self._batches = services.mollifier.batches
        self._settings: Settings = services.settings
        self._environment = environment
        self._items: list[BatchItem] = []
        self._payload_bytes = 0
        self.batch = batch
        self.accepted = 0
        self.deduplicated = 0

    async def take(self, item: BatchItem, payload_bytes: int) -> None:
        """Take an item; trigger those gathered when they are enough."""
        self._items.append(item)
        self._payload_bytes += payload_bytes
        if len(self._items) >= ITEMS_PER_STEP or self._payload_bytes >= self._settings.body_limit_bytes:
            added = await self.end()
            # Their hashes take time, and their payloads space: neither waits for the end of the stream.
            await asyncio.to_thread(emit, added.after_answer)

    async def end(self) -> BatchAdded:
        """Trigger what is gathered."""
        items, self._items, self._payload_bytes = self._items, [], 0
        added = await self._batches.add(self._environment, self.batch, items)
        self.batch = added.batch
        self.accepted += added.accepted
        self.deduplicated += added.deduplicated
        return added


async def _batch(services: Services, environment: Environment, segment: str) -> Batch:
    batch_id = path_id(segment, "batch", "batchId")
    batch = await services.mollifier.batches.find(environment, batch_id)
    if batch is None:
        raise NotFoundError("batch", batch_id, "batchId")
    return batch


def _details(view: BatchView) -> BatchDetails:
    batch = view.batch
    return BatchDetails(
        id=batch.id,
        status=view.status,
        created_at=batch.created_at,
        updated_at=view.updated_at,
        run_count=batch.run_count,
        runs=tuple(batch.runs[index] for index in sorted(batch.runs)),
        processing=BatchProcessing(errors=()),
        idempotency_key=batch.idempotency_key,
    )


def _claims(environment: Environment) -> dict[str, str]:
    """Return what a client makes a public access token of, signed with its API key."""
    return {CLAIMS_HEADER: msgspec.json.encode({"sub": environment.id, "pub": True}).decode()}
