"""The composition root of the API: settings in, an ASGI application out."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

from litestar import Litestar
from litestar.exceptions import HTTPException
from litestar.types import LifeSpanReceive, LifeSpanScope, LifeSpanSend, Receive, Scope, Send

from mollifier.errors import MollifierError, SettingsError
from mollifier.http import batches, keys, metadata, operations, problems, replays, runs, triggers
from mollifier.http.admin import admin_api
from mollifier.http.docs import docs
from mollifier.http.openapi import openapi_config
from mollifier.http.rate_limit import telling_quota
from mollifier.http.raw_path import encoded_path
from mollifier.http.services import OnFatal, running
from mollifier.http.tracing import AsgiSend, RequestRecorder
from mollifier.observability import Observability, configure_telemetry
from mollifier.settings import Settings

SERVICE_NAME = "mollifier-api"

log = logging.getLogger(__name__)

ROUTES = [
    triggers.trigger,
    batches.trigger_batch,
    batches.create_batch,
    batches.add_batch_items,
    batches.get_batch,
    runs.get_run,
    runs.list_runs,
    runs.get_result,
    runs.cancel,
    runs.add_tags,
    runs.reschedule,
    metadata.get_metadata,
    metadata.put_metadata,
    replays.replay,
    keys.reset_idempotency_key,
    admin_api,
    operations.healthz,
    operations.readyz,
    operations.metrics,
    docs,
]


class Api(Litestar):
    """Records every request, routes on the path as it was sent, and answers HEAD as GET; the server leaves its body out."""

    recorder: RequestRecorder
    tells_quota: bool

    async def __call__(
        self, scope: Scope | LifeSpanScope, receive: Receive | LifeSpanReceive, send: Send | LifeSpanSend
    ) -> None:
        """Serve one request, or the life of the application."""
        call: Any = super().__call__
        if scope["type"] != "http":
            await call(scope, receive, send)
            return
        request = dict(cast("dict[str, Any]", scope))
        request["path"] = encoded_path(request)
        if request["method"] == "HEAD":
            request["method"] = "GET"
        if self.tells_quota:
            send = cast("Send", telling_quota(request, cast("AsgiSend", send)))
        await self.recorder.record(request, cast("AsgiSend", send), lambda send: call(request, receive, send))


def create_app(
    settings: Settings, *, observability: Observability | None = None, on_fatal: OnFatal | None = None
) -> Litestar:
    """Return the API. It reaches for its servers when it starts, and serves while they cannot be reached.

    `on_fatal` is told of settings that cannot be, found at the start or, where the buffer's server answers only later, after it.
    Without it the start raises SettingsError, and what is found later is logged.
    """
    observed = observability or configure_telemetry(SERVICE_NAME)

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None]:
        stack = AsyncExitStack()
        if observability is None:
            stack.callback(observed.shutdown)
        try:
            app.state.services = await stack.enter_async_context(running(settings, observed, on_fatal or _log_fatal))
        except SettingsError as error:
            if on_fatal is None:
                raise
            on_fatal(error)
        async with stack:
            yield

    api = Api(
        ROUTES,
        lifespan=[lifespan],
        request_max_body_size=settings.body_limit_bytes,
        exception_handlers=cast(
            "Any",
            {
                MollifierError: problems.of_ours,
                HTTPException: problems.of_framework,
                Exception: problems.of_anything,
            },
        ),
        logging_config=None,
        openapi_config=openapi_config(),
    )
    api.recorder = RequestRecorder(observed)
    api.tells_quota = settings.request_limit is not None
    return api


def _log_fatal(error: SettingsError) -> None:
    log.error("mollifier.contradiction", extra={"fields": {"detail": str(error)}})
