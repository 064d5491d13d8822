"""A run's metadata: reading it, and changing it by operations, for the run itself, its parent and its root."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
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
_INDEXED = re.compile(r"operations\[(\d+)\](.*)", re.DOTALL)
_TYPES: tuple[str, ...] = get_args(get_type_hints(MetadataOperation)["type"])


class MetadataAnswer(msgspec.Struct, frozen=True):
    """The metadata as it stands."""

    metadata: Annotated[Any, Meta(description="A JSON object")]


class _Named(msgspec.Struct, frozen=True):
    """An operation, and what the body calls it."""

    name: str
    operation: MetadataOperation


class _Changes(msgspec.Struct, frozen=True):
    """What one request changes: the run itself, its parent, its root."""

    own: tuple[_Named, ...]
    parent: tuple[_Named, ...]
    root: tuple[_Named, ...]


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
    plan = _plan(run, changes)
    if len(plan) > 1:
        # One that cannot be applied is found before any is, as each run changes in a transaction of its own.
        for run_id, named in plan.items():
            before = existing(await services.mollifier.runs.get(environment, run_id), run_id).snapshot.metadata
            with _blaming(named):
                check_growth(before, apply(before, [each.operation for each in named]))
    for run_id, named in plan.items():
        with _blaming(named):
            operations = [each.operation for each in named]
            changed = await services.mollifier.runs.change_metadata(environment, run_id, operations)
        changed = existing(changed, run_id)
        run = changed if run_id == run.id else run
    return _answer(run)


def _plan(run: Run, changes: _Changes) -> Mapping[str, Sequence[_Named]]:
    """Return what to change, by run: all that one run is to be changed by is one change, which is made or not made as a whole."""
    snapshot = run.snapshot
    plan: dict[str, list[_Named]] = {}
    for run_id, named in (
        (snapshot.parent_run_id or run.id, changes.parent),
        (snapshot.root_run_id or run.id, changes.root),
        (run.id, changes.own),
    ):
        if named:
            plan.setdefault(run_id, []).extend(named)
    return plan


@contextmanager
def _blaming(named: Sequence[_Named]) -> Generator[None]:
    """Name the operation that is at fault as the body does; what speaks of them all names the member that the last one came in."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(*(FieldError(_name(e.field, named), e.detail) for e in error.errors)) from error


def _name(field: str, named: Sequence[_Named]) -> str:
    found = _INDEXED.fullmatch(field)
    if found is None:
        return named[-1].name.partition("[")[0]
    return named[int(found[1])].name + found[2]


def _answer(run: Run) -> Response[MetadataAnswer]:
    document = run.snapshot.metadata
    if document is None or document == b"null":
        document = b"{}"
    return json_response(MetadataAnswer(value_of(document, run.snapshot.metadata_type)))


def _changes(body: Fields) -> _Changes:
    whole: tuple[_Named, ...] = ()
    if body.has("metadata") and body.object("metadata") is not None:
        if len(body.json("metadata") or b"") > METADATA_BYTES_MAX:
            body.blame("metadata", f"must be at most {METADATA_BYTES_MAX} bytes of JSON")
        whole = (_Named("metadata", MetadataOperation(type="update", value=body.json("metadata"))),)
    return _Changes(
        own=(*whole, *_operations(body, "operations")),
        parent=tuple(_operations(body, "parentOperations")),
        root=tuple(_operations(body, "rootOperations")),
    )


def _operations(body: Fields, name: str) -> Iterator[_Named]:
    for index, item in enumerate(body.objects(name, OPERATIONS_MAX)):
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
            operation = MetadataOperation(type=cast("Any", kind), key=key, value=value)
            yield _Named(f"{name}[{index}]", operation)
