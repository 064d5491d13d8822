"""Errors as answers: `{error, errors}` for people and clients, beside the members of RFC 9457."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException

from mollifier.caps import ENV_CAPS, ORG_CAPS
from mollifier.errors import (
    BufferUnavailableError,
    ConflictError,
    EngineUnavailableError,
    FieldError,
    InvalidRequestError,
    MalformedBodyError,
    MollifierError,
    NotFoundError,
    OverCapError,
)
from mollifier.http.services import services_of
from mollifier.settings import variable
from mollifier.telemetry import describe

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2
# The SDKs take a 409 for a lock that somebody holds, and would try again for ten seconds.
_FINAL = {"x-should-retry": "false"}

log = logging.getLogger(__name__)


class FieldProblem(msgspec.Struct, frozen=True):
    """One thing wrong with one field: its path as the caller wrote it, and what to change."""

    field: str
    detail: str


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong and what to do about it."""

    error: str
    errors: list[FieldProblem] = []
    type: str = "about:blank"
    title: str
    status: int
    detail: str


class RefusedError(MollifierError):
    """A request refused for what it is sent with rather than for what it says: its key, its type, its size.

    `field` is the header that is at fault, in lower case, or `body`; None where the request has nothing to mend.
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        headers: Mapping[str, str] | None = None,
        *,
        field: Literal["authorization", "body", "content-type"] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.field = field
        self.headers = headers or {}


def problem(
    status: HTTPStatus, detail: str, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
) -> Response[bytes]:
    """Return the answer that tells of an error."""
    body = problem_body(status, detail, errors)
    return Response(body, media_type=MEDIA_TYPE, status_code=status.value, headers=dict(headers or {}))


def problem_body(status: HTTPStatus, detail: str, errors: Sequence[FieldError] = ()) -> bytes:
    """Return what an answer that tells of an error says."""
    body = Problem(
        error=detail,
        errors=[FieldProblem(error.field, error.detail) for error in errors],
        title=status.phrase,
        status=status.value,
        detail=detail,
    )
    return msgspec.json.encode(body)


def of_ours(request: Request[Any, Any, Any], error: MollifierError) -> Response[bytes]:
    """Answer what Mollifier raises on purpose."""
    match error:
        case InvalidRequestError(errors=errors):
            return problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), errors)
        case MalformedBodyError(detail=detail):
            return problem(HTTPStatus.BAD_REQUEST, f"The body {detail}.", [FieldError("body", detail)])
        case NotFoundError(field=field):
            return problem(HTTPStatus.NOT_FOUND, str(error), [FieldError(field, str(error))])
        case ConflictError(field=field, detail=detail):
            return problem(HTTPStatus.CONFLICT, detail, [FieldError(field, detail)], _FINAL)
        case RefusedError(status=status, headers=headers, field=field):
            errors = [FieldError(field, str(error))] if field else []
            return problem(status, str(error), errors, headers)
        case OverCapError():
            return problem(HTTPStatus.TOO_MANY_REQUESTS, _too_many(error), headers={"Retry-After": str(RETRY_AFTER_S)})
        case EngineUnavailableError() | BufferUnavailableError():
            services_of(request).mollifier.telemetry.unavailable(error)
            detail = f"The store behind this API cannot be reached now; try again in {RETRY_AFTER_S} seconds."
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": str(RETRY_AFTER_S)})
        case _:
            return of_anything(request, error)


def _too_many(error: OverCapError) -> str:
    whose = (
        " of this environment" if error.cap in ENV_CAPS else " of this organization" if error.cap in ORG_CAPS else ""
    )
    cap = variable(error.cap)
    if not error.fits:
        return (
            f"This is more at once than may be held{whose} ({cap}); send less at a time, after {RETRY_AFTER_S} seconds."
        )
    return f"As many triggers{whose} are held as may be ({cap}); try again in {RETRY_AFTER_S} seconds."


def of_framework(_request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Answer what the framework refuses: no such route, no such method, a body over the limit."""
    status = HTTPStatus(error.status_code)
    match status:
        case HTTPStatus.NOT_FOUND:
            detail = "There is no such route; /docs lists them."
        case HTTPStatus.METHOD_NOT_ALLOWED:
            detail = "This route does not know this method; the Allow header lists those it knows."
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            detail = "The body is larger than this API takes (MOLLIFIER_BODY_LIMIT_BYTES)."
            return problem(status, detail, [FieldError("body", detail)], error.headers)
        case _:
            detail = error.detail
    return problem(status, detail, headers=error.headers)


def of_anything(_request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Answer what nobody expected; the log has it, the caller does not."""
    log.error("mollifier.unexpected", extra={"fields": {"error": describe(error)}}, exc_info=error)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong here; the log of the API has the details.")
