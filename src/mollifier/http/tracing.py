"""Every request measured, and traced where traces go anywhere: a server span in the caller's trace, around all that is done for it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mollifier.observability import Observability

_METHODS = {"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"}
_UNMATCHED = "(none)"
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_propagator = TraceContextTextMapPropagator()

AsgiScope = MutableMapping[str, Any]
AsgiSend = Callable[[Any], Awaitable[None]]


class RequestRecorder:
    """Records `http.server.request.duration` and, with a tracer, a span per request, both by route and never by path."""

    def __init__(self, observability: Observability) -> None:
        meter = observability.meter_provider.get_meter("mollifier.http")
        self._tracer = observability.tracer_provider.get_tracer("mollifier.http") if observability.traces else None
        self._duration = meter.create_histogram(
            "http.server.request.duration",
            unit="s",
            description="How long requests took",
            explicit_bucket_boundaries_advisory=_BUCKETS_S,
        )

    async def record(self, scope: AsgiScope, send: AsgiSend, serve: Callable[[AsgiSend], Awaitable[None]]) -> None:
        """Serve the request and record it; the route is known, in `scope`, once it has been served."""
        if self._tracer is None:
            await self._measured(scope, send, serve)
            return
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = _propagator.extract(carrier)
        with self._tracer.start_as_current_span(scope["method"], context, SpanKind.SERVER) as span:
            status = await self._measured(scope, send, serve)
            method, route = _method(scope), _route(scope)
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.request.method": method, "http.route": route})
            if status is not None:
                span.set_attribute("http.response.status_code", status)
            if status is None or status >= 500:  # noqa: PLR2004 - server errors
                span.set_status(StatusCode.ERROR)

    async def _measured(
        self, scope: AsgiScope, send: AsgiSend, serve: Callable[[AsgiSend], Awaitable[None]]
    ) -> int | None:
        """Return the status of the answer, None where there was none."""
        status: int | None = None
        started = time.perf_counter()

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                labels = {"http.request.method": _method(scope), "http.route": _route(scope)}
                labels["http.response.status_code"] = str(status)
                self._duration.record(time.perf_counter() - started, labels)
            await send(message)

        await serve(noting)
        return status


def _method(scope: AsgiScope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "_OTHER"


def _route(scope: AsgiScope) -> str:
    return scope.get("path_template") or _UNMATCHED
