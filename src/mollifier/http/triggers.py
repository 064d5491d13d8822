"""`POST /api/v1/tasks/{taskId}/trigger`: parse, trigger, answer."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, post
from litestar.background_tasks import BackgroundTask
from litestar.params import Parameter

from mollifier.http.auth import environment_of
from mollifier.http.bodies import json_body
from mollifier.http.openapi import documented, parameter
from mollifier.http.raw_path import path_text
from mollifier.http.render import json_response
from mollifier.http.schemas import TriggerBody
from mollifier.http.services import services_of
from mollifier.request import (
    HEADERS,
    IDEMPOTENCY_KEY,
    IDEMPOTENCY_KEY_TTL,
    REQUEST_KEY,
    TRACEPARENT,
    TRACESTATE,
    TRIGGER_SOURCE,
    parse_trigger,
)
from mollifier.telemetry import Emit

_HEADERS = {name.encode(): name for name in HEADERS}

ORIGIN_PARAMETERS = [
    parameter(TRACEPARENT, "The caller's trace (W3C Trace Context)", "header"),
    parameter(TRACESTATE, "The caller's trace (W3C Trace Context)", "header"),
    parameter(TRIGGER_SOURCE, "Where the trigger came from, in the caller's words", "header"),
]
_HEADER_PARAMETERS = [
    parameter(IDEMPOTENCY_KEY, "As `options.idempotencyKey`, which wins", "header"),
    parameter(IDEMPOTENCY_KEY_TTL, "As `options.idempotencyKeyTTL`, which wins", "header"),
    parameter(
        REQUEST_KEY, "Names this request: sent again within a day, it is answered with the run it made", "header"
    ),
    *ORIGIN_PARAMETERS,
]


class TriggerAnswer(msgspec.Struct, frozen=True, rename="camel"):
    """The run that stands for the trigger; `isCached` is true when an idempotency key answered."""

    id: str
    is_cached: bool


@post(
    "/api/v1/tasks/{taskId:str}/trigger",
    status_code=200,
    tags=["Trigger"],
    summary="Trigger a run of a task",
    operation_class=documented(
        HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=TriggerBody, parameters=_HEADER_PARAMETERS
    ),
)
async def trigger(
    request: Request[Any, Any, Any],
    taskId: Annotated[str, Parameter(description="The task's id, percent-encoded")],
) -> Response[TriggerAnswer]:
    """Make a run of the task, or answer with the run that an idempotency key is bound to."""
    environment = await environment_of(request)
    body = await json_body(request)
    triggered = await services_of(request).mollifier.triggers.trigger(
        environment, parse_trigger(path_text(taskId, "taskId"), body, headers_of(request))
    )
    result = triggered.result
    return json_response(TriggerAnswer(result.run_id, result.is_cached), after=emitting(triggered.after_answer))


def headers_of(request: Request[Any, Any, Any]) -> dict[str, str]:
    """Return the headers that a trigger reads; their text is UTF-8 where it can be, as clients send both."""
    found: dict[str, str] = {}
    for name, value in request.scope["headers"]:
        if (known := _HEADERS.get(name)) is not None:
            try:
                found[known] = value.decode()
            except UnicodeDecodeError:
                found[known] = value.decode("latin-1")
    return found


def emitting(emits: tuple[Emit, ...]) -> BackgroundTask | None:
    """Return what does what was left for after the answer."""
    return BackgroundTask(emit, emits) if emits else None


def emit(emits: tuple[Emit, ...]) -> None:
    """Do what was left for after the answer."""
    for emit in emits:
        emit()
