"""Replaying a run: a new trigger of what the run was triggered with. It passes the gate like any other."""

from __future__ import annotations

from datetime import timedelta
from http import HTTPStatus
from typing import Any

from litestar import Request, Response, post
from litestar.background_tasks import BackgroundTask

from mollifier.http.auth import environment_of
from mollifier.http.bodies import nothing
from mollifier.http.openapi import documented
from mollifier.http.render import json_response
from mollifier.http.runs import RunId, RunName, run_of
from mollifier.http.services import services_of
from mollifier.http.triggers import emit, headers_of
from mollifier.model import Run, TriggerRequest
from mollifier.request import trace_of

SOURCE = "replay"


@post(
    "/api/v1/runs/{runId:str}/replay",
    status_code=200,
    tags=["Runs"],
    summary="Replay a run",
    operation_class=documented(HTTPStatus.NOT_FOUND),
)
async def replay(request: Request[Any, Any, Any], runId: RunId) -> Response[RunName]:
    """Trigger the run's task anew, with its payload and its options but without its keys, delay, parent or batch."""
    environment = await environment_of(request)
    await nothing(request)
    services = services_of(request)
    again = _again(await run_of(services, environment, runId), trace_of(headers_of(request)))
    triggered = await services.mollifier.triggers.trigger(environment, again)
    after = BackgroundTask(emit, triggered.after_answer) if triggered.after_answer else None
    return json_response(RunName(triggered.result.run_id), after=after)


def _again(run: Run, trace: dict[str, str]) -> TriggerRequest:
    snapshot = run.snapshot
    return TriggerRequest(
        task_id=snapshot.task_id,
        payload=snapshot.payload,
        payload_type=snapshot.payload_type,
        context=snapshot.context,
        metadata=snapshot.metadata,
        metadata_type=snapshot.metadata_type,
        tags=snapshot.tags,
        ttl=None if snapshot.ttl_s is None else timedelta(seconds=snapshot.ttl_s),
        queue=snapshot.queue,
        concurrency_key=snapshot.concurrency_key,
        priority=snapshot.priority,
        machine=snapshot.machine,
        region=snapshot.region,
        max_attempts=snapshot.max_attempts,
        max_duration_s=snapshot.max_duration_s,
        test=snapshot.test,
        lock_to_version=snapshot.lock_to_version,
        external_deployment_id=snapshot.external_deployment_id,
        trigger_source=SOURCE,
        replayed_from=run.id,
        traceparent=trace.get("traceparent"),
        tracestate=trace.get("tracestate"),
    )
