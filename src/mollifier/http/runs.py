"""The run API: everything that is done with a run after it was triggered."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.params import Parameter

from mollifier.errors import NotFoundError
from mollifier.fields import text_fault
from mollifier.http.auth import environment_of
from mollifier.http.raw_path import path_text
from mollifier.http.render import RunDetails, json_response, run_details
from mollifier.http.services import Services, services_of
from mollifier.model import Environment, Run
from mollifier.request import NAME_LENGTH_MAX

CHILDREN_SHOWN_MAX = 100
_READS_AT_ONCE = 8

RunId = Annotated[str, Parameter(description="The run's id")]


@get("/api/v3/runs/{runId:str}", tags=["Runs"], summary="Read a run")
async def get_run(request: Request[Any, Any, Any], runId: RunId) -> Response[RunDetails]:
    """Read a run, with the runs it came from and up to a hundred of those it led to."""
    environment = await environment_of(request)
    services = services_of(request)
    return json_response(await details(services, environment, await run_of(services, environment, runId)))


async def run_of(services: Services, environment: Environment, segment: str) -> Run:
    """Return the run that a segment of the path names. Raises NotFoundError."""
    run_id = path_text(segment, "runId")
    run = None if text_fault(run_id, NAME_LENGTH_MAX) else await services.engine.get_run(environment.id, run_id)
    if run is None:
        raise no_run(run_id)
    return run


def no_run(run_id: str) -> NotFoundError:
    """Return the error that says so."""
    return NotFoundError("run", run_id, "runId")


async def details(services: Services, environment: Environment, run: Run) -> RunDetails:
    """Return the run as it is read, its relatives read too."""
    snapshot = run.snapshot
    wanted = [snapshot.root_run_id, snapshot.parent_run_id, *run.children[:CHILDREN_SHOWN_MAX]]
    turns = asyncio.Semaphore(_READS_AT_ONCE)

    async def relative(run_id: str | None) -> Run | None:
        if run_id is None:
            return None
        async with turns:
            return await services.engine.get_run(environment.id, run_id)

    root, parent, *children = await asyncio.gather(*(relative(run_id) for run_id in wanted))
    return run_details(run, root, parent, [child for child in children if child is not None])
