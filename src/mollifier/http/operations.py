"""Operations: is the process up, can it serve, what does it count."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Literal, TypeVar

import msgspec
from litestar import Request, Response, get
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mollifier.errors import MollifierError
from mollifier.http.openapi import documented
from mollifier.http.render import json_response
from mollifier.http.services import Services, services_of
from mollifier.inspection import STALLED_MS, Counts
from mollifier.postgres.presence import count_workers

PROBE_DEADLINE_S = 2.0

T = TypeVar("T")
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
    """Ask the database and the buffer's server. 503 when the database does not answer; a missing buffer only degrades.

    The drainer is `down` when no worker is alive, and `degraded` when entries wait too long, or a worker finds that runs cannot be
    created and takes no entries until they can.
    """
    services = services_of(request)
    workers, buffer, away = await asyncio.gather(_workers(services), _buffer(services), _engine_away(services))
    ready = _readiness(services, workers, buffer, engine_away=away)
    return json_response(ready, 503 if ready.status == "down" else 200)


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


def _readiness(services: Services, workers: int | None, counts: Counts | State, *, engine_away: bool) -> Readiness:
    """Judge what was found: how many workers are alive, None without an answer, what the buffer holds, what workers told there."""
    database: State = "down" if workers is None else "ok"
    buffer: State = "ok" if isinstance(counts, Counts) else counts
    drainer = _drainer(services, workers, counts, engine_away=engine_away)
    status: State = "down" if database == "down" else "ok" if {buffer, drainer} <= {"ok", "off"} else "degraded"
    return Readiness(status=status, database=database, buffer=buffer, drainer=drainer)


def _drainer(services: Services, workers: int | None, counts: Counts | State, *, engine_away: bool) -> State:
    if not services.settings.drains:
        return "off"
    if workers == 0:
        return "down"
    if workers is None or counts == "degraded" or engine_away:
        return "degraded"
    stalled = isinstance(counts, Counts) and counts.oldest_ms is not None and counts.oldest_ms > STALLED_MS
    return "degraded" if stalled else "ok"


async def _workers(services: Services) -> int | None:
    return await _answer(count_workers(services.database))


async def _buffer(services: Services) -> Counts | State:
    """Return what the buffer holds; switched off, its server is not asked."""
    if not services.settings.enabled:
        return "off"
    buffer = services.mollifier.buffer
    return "degraded" if buffer is None else await _answer(buffer.counts()) or "degraded"


async def _engine_away(services: Services) -> bool:
    """Return whether a worker's breaker in front of the engine is open; False where nobody can tell."""
    buffer = services.mollifier.buffer
    if buffer is None or not services.settings.enabled:
        return False
    return await _answer(buffer.is_engine_away()) or False


async def _answer(question: Awaitable[T]) -> T | None:
    """Return the answer, None where none comes in time."""
    try:
        async with asyncio.timeout(PROBE_DEADLINE_S):
            return await question
    except (MollifierError, TimeoutError):
        return None
