"""A run's metadata: reading it, and changing it by operations, for the run itself, its parent and its root."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any, cast, get_args, get_type_hints

import msgspec
from litestar import Request, Response, get, put
from msgspec import Meta

from mollifier.errors import FieldError, InvalidRequestError
from mollifier.fields import Fields
from mollifier.http.auth import environment_of
from mollifier.http.bodies import parsed
from mollifier.http.openapi import documented
from mollifier.http.render import json_response, value_of
from mollifier.http.runs import RunId, existing, run_of
from mollifier.http.schemas import MetadataBody
from mollifier.http.services import services_of
from mollifier.metadata import METADATA_BYTES_MAX, apply, check_growth
from mollifier.model import MetadataOperation, Run

OPERATIONS_MAX = 1000
_OPERATIONS = "operations"
_TYPES: tuple[str, ...] = get_args(get_type_hints(MetadataOperation)["type"])


class MetadataAnswer(msgspec.Struct, frozen=True):
    """The metadata as it stands."""

    metadata: Annotated[Any, Meta(description="A JSON object")]


class _Changes(msgspec.Struct, frozen=True):
    """What one request changes: the run itself, then its parent, then its root."""

    own: tuple[MetadataOperation, ...]
    parent: tuple[MetadataOperation, ...]
    root: tuple[MetadataOperation, ...]


@get(
    "/api/v1/runs/{runId:str}/metadata",
    tags=["Runs"],
    summary="Read a run's metadata",
    operation_class=documented(HTTPStatus.NOT_FOUND),
)
async def get_metadata(request: Request[Any, Any, Any], runId: RunId) -> Response[MetadataAnswer]:
    """Read the metadata; a run without any has an empty object."""
    environment = await environment_of(request)
    return _answer(await run_of(services_of(request), environment, runId))


@put(
    "/api/v1/runs/{runId:str}/metadata",
    tags=["Runs"],
    summary="Change a run's metadata",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=MetadataBody),
)
async def put_metadata(request: Request[Any, Any, Any], runId: RunId) -> Response[MetadataAnswer]:
    """Replace the metadata, or change it by operations; concurrent operations never lose one.

    A run without a parent is its own parent and its own root here.
    """
    environment = await environment_of(request)
    changes = await parsed(request, _changes)
    services = services_of(request)
    run = await run_of(services, environment, runId)
    snapshot = run.snapshot
    plan = [
        ("parentOperations", snapshot.parent_run_id or run.id, changes.parent),
        ("rootOperations", snapshot.root_run_id or run.id, changes.root),
        (_OPERATIONS, run.id, changes.own),
    ]
    plan = [(field, run_id, operations) for field, run_id, operations in plan if operations]
    if len(plan) > 1:
        # One that cannot be applied is found before any is, as each run changes in a transaction of its own.
        for field, run_id, operations in plan:
            target = existing(await services.mollifier.runs.get(environment, run_id), run_id)
            with _blaming(field):
                check_growth(target.snapshot.metadata, apply(target.snapshot.metadata, operations))
    for field, run_id, operations in plan:
        with _blaming(field):
            changed = await services.mollifier.runs.change_metadata(environment, run_id, operations)
        if run_id == run.id:
            run = existing(changed, run_id)
    return _answer(run)


@contextmanager
def _blaming(field: str) -> Generator[None]:
    """Name the member of the body that an operation came in."""
    try:
        yield
    except InvalidRequestError as error:
        named = [FieldError(e.field.replace(_OPERATIONS, field, 1), e.detail) for e in error.errors]
        raise InvalidRequestError(*named) from error


def _answer(run: Run) -> Response[MetadataAnswer]:
    document = run.snapshot.metadata
    if document is None or document == b"null":
        document = b"{}"
    return json_response(MetadataAnswer(value_of(document, run.snapshot.metadata_type)))


def _changes(body: Fields) -> _Changes:
    whole: Sequence[MetadataOperation] = ()
    if body.has("metadata") and body.object("metadata") is not None:
        if len(body.json("metadata") or b"") > METADATA_BYTES_MAX:
            body.blame("metadata", f"must be at most {METADATA_BYTES_MAX} bytes of JSON")
        whole = (MetadataOperation(type="update", value=body.json("metadata")),)
    return _Changes(
        own=(*whole, *_operations(body, _OPERATIONS)),
        parent=_operations(body, "parentOperations"),
        root=_operations(body, "rootOperations"),
    )


def _operations(body: Fields, name: str) -> tuple[MetadataOperation, ...]:
    found: list[MetadataOperation] = []
    for item in body.objects(name, OPERATIONS_MAX):
        kind = item.required("type", lambda name, item=item: item.choice(name, _TYPES))
        key, value = item.any_text("key"), item.json("value")
        if kind not in (None, "update") and key is None and not item.has("key"):
            item.blame("key", f"is required by {kind}")
        if kind not in (None, "delete") and value is None:
            item.blame("value", f"is required by {kind}")
        elif kind == "update":
            item.object("value")
        elif kind == "increment" and item.kind("value") != "a number":
            item.blame("value", f"expected a number, got {item.kind('value') or 'null'}")
        if kind is not None:
            found.append(MetadataOperation(type=cast("Any", kind), key=key, value=value))
    return tuple(found)
