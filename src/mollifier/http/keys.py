"""Idempotency keys: freeing one before its time."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from litestar import Request, Response, post
from litestar.params import Parameter

from mollifier.errors import NotFoundError
from mollifier.fields import Fields
from mollifier.http.auth import environment_of
from mollifier.http.bodies import parsed
from mollifier.http.openapi import documented
from mollifier.http.raw_path import path_text
from mollifier.http.render import json_response
from mollifier.http.runs import RunName
from mollifier.http.schemas import ResetBody
from mollifier.http.services import services_of
from mollifier.request import TASK_ID_LENGTH_MAX, checked_key


@post(
    "/api/v1/idempotencyKeys/{key:str}/reset",
    status_code=200,
    tags=["Runs"],
    summary="Free an idempotency key",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=ResetBody),
)
async def reset_idempotency_key(
    request: Request[Any, Any, Any], key: Annotated[str, Parameter(description="The key, percent-encoded")]
) -> Response[RunName]:
    """Free a key, so that the next trigger with it makes a run; 404 when nothing held it."""
    environment = await environment_of(request)
    task_id = await parsed(request, _task_id)
    text = checked_key(path_text(key, "key"), "key")
    services = services_of(request)
    if not await services.mollifier.runs.reset_idempotency_key(environment, task_id, text):
        hint = f"No run of the task {task_id!r} holds it: it has expired, was freed, or was never given."
        raise NotFoundError("idempotency key", text, "key", hint)
    return json_response(RunName(text))


def _task_id(body: Fields) -> str:
    return body.required("taskIdentifier", lambda name: body.text(name, TASK_ID_LENGTH_MAX)) or ""
