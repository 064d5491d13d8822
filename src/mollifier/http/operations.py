"""Operations: is the process up, can it serve, what does it count."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Literal

import msgspec
from litestar import Request, Response, get
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mollifier.errors import MollifierError
from mollifier.http.openapi import documented
from mollifier.http.render import json_response
from mollifier.http.services import Services, services_of

PROBE_DEADLINE_S = 2.0
STALLED_MS = 30_000
"""A buffer whose oldest queued entry is older than this has nobody who drains it."""

State = Literal["ok", "degraded", "down", "off"]


class Health(msgspec.Struct, frozen=True):
    """The process answers."""

    status: Literal["ok"]


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Each part's state; `status` is `down` when triggers cannot be taken, `degraded` when they can and something is amiss."""

    status: State
    database: State
    buffer: State
    drainer: State


@get("/healthz", tags=["Operations"], summary="Is the process up?", operation_class=documented(key=None))
async def healthz() -> Health:
    """Answer, which is all there is to say."""
    return Health("ok")


@get("/readyz", tags=["Operations"], summary="Can it take triggers?", operation_class=documented(key=None))
async def readyz(request: Request[Any, Any, Any]) -> Response[Readiness]:
    """Ask the database and the buffer's server. 503 when the database does not answer; a missing buffer only degrades."""
    services = services_of(request)
    database, (buffer, drainer) = await asyncio.gather(_database(services), _buffer(services))
    status: State = "down" if database == "down" else "degraded" if "degraded" in (buffer, drainer) else "ok"
    ready = Readiness(status=status, database=database, buffer=buffer, drainer=drainer)
    return json_response(ready, 503 if status == "down" else 200)


@get(
    "/metrics",
    tags=["Operations"],
    summary="Metrics for Prometheus",
    media_type="text/plain",
    operation_class=documented(key=None),
)
async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Answer every metric of this process."""
    text = generate_latest(services_of(request).observability.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def _database(services: Services) -> State:
    return "ok" if await _answers(services.database.ping()) else "down"


async def _buffer(services: Services) -> tuple[State, State]:
    """Return the states of the buffer and of those who drain it."""
    settings, buffer = services.settings, services.mollifier.buffer
    if not settings.enabled:
        return "off", "off"
    drainer: State = "ok" if settings.drains else "off"
    if buffer is None:
        return "degraded", drainer
    counts = await _answers(buffer.counts())
    if counts is None:
        return "degraded", "degraded" if settings.drains else "off"
    if counts.oldest_ms is not None and counts.oldest_ms > STALLED_MS:
        return "ok", "degraded"
    return "ok", drainer


async def _answers(question: Awaitable[Any]) -> Any:
    """Return the answer, True for an empty one, and None where none comes in time."""
    try:
        async with asyncio.timeout(PROBE_DEADLINE_S):
            answer = await question
    except (MollifierError, TimeoutError):
        return None
    return True if answer is None else answer
