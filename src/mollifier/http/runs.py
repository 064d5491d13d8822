"""The run API: everything that is done with a run after it was triggered."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get, post
from litestar.params import Parameter

from mollifier.errors import NotFoundError
from mollifier.fields import Fields
from mollifier.http.auth import environment_of
from mollifier.http.bodies import nothing, parsed
from mollifier.http.listing import QUERY_PARAMETERS, run_filter
from mollifier.http.openapi import documented
from mollifier.http.raw_path import path_id
from mollifier.http.render import (
    ListedRun,
    RunDetails,
    RunResult,
    json_response,
    listed_run,
    run_details,
    run_result,
)
from mollifier.http.schemas import RescheduleBody, TagsBody
from mollifier.http.services import Services, services_of
from mollifier.model import FINAL_STATUSES, MAX_TAGS, Environment, Run
from mollifier.request import TAG_LENGTH_MAX

CHILDREN_SHOWN_MAX = 100

RunId = Annotated[str, Parameter(description="The run's id")]


class Pagination(msgspec.Struct, frozen=True, omit_defaults=True):
    """Cursors for `page[after]` (next) and `page[before]` (previous)."""

    next: str | None = None
    previous: str | None = None


class RunList(msgspec.Struct, frozen=True):
    """One page of runs, newest first."""

    data: tuple[ListedRun, ...]
    pagination: Pagination


class RunName(msgspec.Struct, frozen=True):
    """A run, by its id."""

    id: str


class Message(msgspec.Struct, frozen=True):
    """What was done."""

    message: str


@get("/api/v3/runs/{runId:str}", tags=["Runs"], summary="Read a run", operation_class=documented(HTTPStatus.NOT_FOUND))
async def get_run(request: Request[Any, Any, Any], runId: RunId) -> Response[RunDetails]:
    """Read a run, with the runs it came from and up to a hundred of those it led to."""
    environment = await environment_of(request)
    services = services_of(request)
    return json_response(await _details(services, environment, await run_of(services, environment, runId)))


@get(
    "/api/v1/runs",
    tags=["Runs"],
    summary="List runs",
    operation_class=documented(HTTPStatus.UNPROCESSABLE_ENTITY, parameters=QUERY_PARAMETERS),
)
async def list_runs(request: Request[Any, Any, Any]) -> Response[RunList]:
    """List the environment's runs, newest first, those that are still held included."""
    environment = await environment_of(request)
    services = services_of(request)
    page = await services.mollifier.runs.list(environment, run_filter(request.query_params, services.clock()))
    runs = tuple(listed_run(run, environment) for run in page.runs)
    return json_response(RunList(runs, Pagination(page.next, page.previous)))


@get(
    "/api/v1/runs/{runId:str}/result",
    tags=["Runs"],
    summary="Read what a run came to",
    operation_class=documented(HTTPStatus.NOT_FOUND),
)
async def get_result(request: Request[Any, Any, Any], runId: RunId) -> Response[RunResult]:
    """Read the result of a run that has ended; 404 before that."""
    environment = await environment_of(request)
    run = await run_of(services_of(request), environment, runId)
    if run.status not in FINAL_STATUSES:
        hint = f"The run is {run.status}; ask again when it has ended."
        raise NotFoundError("result of run", run.id, "runId", hint)
    return json_response(run_result(run))


@post(
    "/api/v2/runs/{runId:str}/cancel",
    status_code=200,
    tags=["Runs"],
    summary="Cancel a run",
    operation_class=documented(HTTPStatus.NOT_FOUND),
)
async def cancel(request: Request[Any, Any, Any], runId: RunId) -> Response[RunName]:
    """Cancel a run unless it has ended; cancelling twice is cancelling once."""
    environment = await environment_of(request)
    await nothing(request)
    services, run_id = services_of(request), run_id_of(runId)
    run = await services.mollifier.runs.cancel(environment, run_id)
    return json_response(RunName(existing(run, run_id).id))


@post(
    "/api/v1/runs/{runId:str}/tags",
    status_code=200,
    tags=["Runs"],
    summary="Add tags to a run",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=TagsBody),
)
async def add_tags(request: Request[Any, Any, Any], runId: RunId) -> Response[Message]:
    """Add tags; those it has already count once, and it has at most ten in all."""
    environment = await environment_of(request)
    tags = await parsed(request, _tags)
    run_id = run_id_of(runId)
    run = existing(await services_of(request).mollifier.runs.add_tags(environment, run_id, tags), run_id)
    return json_response(Message(f"The run has the tags {', '.join(run.snapshot.tags)}."))


@post(
    "/api/v1/runs/{runId:str}/reschedule",
    status_code=200,
    tags=["Runs"],
    summary="Reschedule a delayed run",
    operation_class=documented(
        HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY, body=RescheduleBody
    ),
)
async def reschedule(request: Request[Any, Any, Any], runId: RunId) -> Response[RunDetails]:
    """Give a delayed run another delay; 409 once it is queued."""
    environment = await environment_of(request)
    services, run_id = services_of(request), run_id_of(runId)
    now = services.clock()
    delay = await parsed(request, lambda body: body.required("delay", body.delay) or now)
    run = existing(await services.mollifier.runs.reschedule(environment, run_id, delay), run_id)
    return json_response(await _details(services, environment, run))


def run_id_of(segment: str) -> str:
    """Return the run id in a segment of the path. Raises NotFoundError for what no run can be called."""
    return path_id(segment, "run", "runId")


def existing(run: Run | None, run_id: str) -> Run:
    """Return the run. Raises NotFoundError where there is none."""
    if run is None:
        raise NotFoundError("run", run_id, "runId")
    return run


async def run_of(services: Services, environment: Environment, segment: str) -> Run:
    """Return the run that a segment of the path names. Raises NotFoundError."""
    run_id = run_id_of(segment)
    return existing(await services.mollifier.runs.get(environment, run_id), run_id)


async def _details(services: Services, environment: Environment, run: Run) -> RunDetails:
    snapshot = run.snapshot
    runs = services.mollifier.runs
    children = await runs.children(environment, run, CHILDREN_SHOWN_MAX)
    ancestors = [run_id for run_id in (snapshot.root_run_id, snapshot.parent_run_id) if run_id is not None]
    # A run is read through an outage of the other store, if need be without those of its family that are there.
    found = await runs.get_reachable(environment, tuple(dict.fromkeys(ancestors)))
    root, parent = (found.get(run_id or "") for run_id in (snapshot.root_run_id, snapshot.parent_run_id))
    return run_details(run, root, parent, children)


def _tags(body: Fields) -> tuple[str, ...]:
    return body.required("tags", lambda name: body.texts(name, TAG_LENGTH_MAX, MAX_TAGS)) or ()
