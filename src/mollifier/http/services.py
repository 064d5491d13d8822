"""What the routes call: every part of a running API, built once from the settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, cast

import msgspec
from litestar import Request

from mollifier.buffer import Buffer
from mollifier.errors import BufferUnavailableError, MollifierError, SettingsError
from mollifier.facade import Mollifier
from mollifier.observability import Observability
from mollifier.postgres.authentication import Authenticator
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine, utc_now
from mollifier.postgres.flags import GlobalFlags
from mollifier.postgres.migrate import schema_status
from mollifier.postgres.tenants import Tenants
from mollifier.settings import Settings, variable
from mollifier.telemetry import Telemetry, describe

CLAIM_RETRY_S = 1.0
BACKGROUND_RETRY_S = 1.0

log = logging.getLogger(__name__)

OnFatal = Callable[[SettingsError], None]


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of one running API."""

    settings: Settings
    observability: Observability
    clock: Callable[[], datetime]
    database: Database
    authenticator: Authenticator
    tenants: Tenants
    flags: GlobalFlags
    engine: PostgresRunEngine
    mollifier: Mollifier


def services_of(request: Request[Any, Any, Any]) -> Services:
    """Return the services of the application that serves this request."""
    return cast("Services", request.app.state.services)


@asynccontextmanager
async def running(settings: Settings, observability: Observability, on_fatal: OnFatal) -> AsyncGenerator[Services]:
    """Build the services and keep what they read in the background fresh.

    Raises SettingsError where no database is named, and where the buffer contradicts the settings. A server that cannot be reached
    is waited for in the background; should its buffer then contradict the settings, `on_fatal` is told.
    """
    if settings.database_url is None:
        raise SettingsError(variable("database_url"), "is required: name the Postgres that records runs")
    if settings.request_limit is not None and settings.redis_url is None:
        detail = f"is set, but there is no server to count requests on: set {variable('redis_url')}"
        raise SettingsError(variable("request_limit"), detail)
    database = Database(settings.database_url)
    flags = GlobalFlags(database)
    engine = PostgresRunEngine(database)
    mollifier = Mollifier(
        settings,
        engine=engine,
        tasks=PostgresTaskCatalog(database),
        global_flags=lambda: flags.current,
        telemetry=Telemetry(observability.meter_provider, observability.tracer_provider),
    )
    services = Services(
        settings=settings,
        observability=observability,
        clock=utc_now,
        database=database,
        authenticator=Authenticator(database),
        tenants=Tenants(database),
        flags=flags,
        engine=engine,
        mollifier=mollifier,
    )
    background: list[asyncio.Task[None]] = []
    try:
        await _greet_database(services)
        if settings.active and mollifier.buffer is not None and not await _claim(mollifier.buffer):
            background.append(asyncio.create_task(_keep_claiming(mollifier.buffer, on_fatal)))
        background.append(asyncio.create_task(_kept_up(flags.keep_refreshing)))
        background.append(asyncio.create_task(_kept_up(services.authenticator.keep_recording)))
        yield services
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await mollifier.aclose()
        await database.close()


async def _greet_database(services: Services) -> None:
    """Read the flags before the first trigger asks for them, and say what is wrong with the database; the API starts all the same."""
    try:
        status = await schema_status(services.database)
        if not status.is_current:
            _warn("mollifier.schema_behind", f"the database lacks {', '.join(status.pending)}: run `mollifier migrate`")
        await services.flags.refresh()
    except SettingsError:
        raise
    except MollifierError as error:
        _warn("mollifier.database_not_ready", describe(error))


async def _claim(buffer: Buffer) -> bool:
    """Compare the buffer's partitions with the settings; False when its server does not answer."""
    try:
        await buffer.claim_layout()
    except BufferUnavailableError as error:
        _warn(
            "mollifier.buffer_unavailable", f"every trigger passes until the buffer's server answers: {describe(error)}"
        )
        return False
    return True


async def _keep_claiming(buffer: Buffer, on_fatal: OnFatal) -> None:
    try:
        while True:
            await asyncio.sleep(CLAIM_RETRY_S)
            if await _claim(buffer):
                return
    except SettingsError as error:
        on_fatal(error)


async def _kept_up(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do background work again after whatever ended it."""
    while True:
        try:
            await work()
        except Exception as error:
            log.exception("mollifier.background_fault", extra={"fields": {"error": describe(error)}})
        await asyncio.sleep(BACKGROUND_RETRY_S)


def _warn(name: str, detail: str) -> None:
    log.warning(name, extra={"fields": {"detail": detail}})
