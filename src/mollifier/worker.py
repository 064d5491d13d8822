"""The worker process: executes runs, and drains and sweeps the buffer where the settings say so.

Only this process drains, and sweeps. Contradictory settings stop it at boot with the setting's name; a server that is away at boot, or later,
is waited for. SIGTERM and SIGINT are handled once per process, from before anything starts: the drainer stops first, so that
nothing new is taken, then the executing runs finish, both within the shutdown deadline.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import msgspec
from opentelemetry import trace
from prometheus_client import REGISTRY, CollectorRegistry

from mollifier.backoff import Backoff
from mollifier.buffer import Buffer
from mollifier.doctor import Severity, diagnose
from mollifier.drainer import Drainer
from mollifier.errors import BufferUnavailableError, SettingsError
from mollifier.facade import Mollifier
from mollifier.observability import serving_metrics
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.worker import run_worker
from mollifier.server import Server, connect
from mollifier.settings import Settings, variable
from mollifier.tasks import discover
from mollifier.telemetry import Telemetry

log = logging.getLogger(__name__)

_LOGGED = {Severity.WARNING: logging.WARNING, Severity.CRITICAL: logging.ERROR}
"""What of the doctor's findings has a line of its own, and at which level."""
_EXAMINED_S = 2.0
"""How long a worker that stops lets the doctor finish."""


async def run_worker_process(
    settings: Settings,
    *,
    telemetry: Telemetry | None = None,
    tracer_provider: trace.TracerProvider | None = None,
    registry: CollectorRegistry = REGISTRY,
    on_start: Callable[[Drainer | None], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Work until told to stop, by a signal or by `stop`. Raises SettingsError when the settings contradict each other.

    `telemetry` is the drainer's, `tracer_provider` that of the executed runs, `registry` what Prometheus is shown where the settings
    name a port for it. `on_start` is called with the drainer, if one runs here, once everything that is to run has been started.
    """
    database_url = checked(settings)
    tasks = discover(settings.tasks)
    stop = stop or asyncio.Event()
    _stop_on_signals(stop)
    async with AsyncExitStack() as stack:
        if settings.worker_metrics_port is not None:
            _serve_metrics(registry, settings.worker_metrics_port, stack)
        database = await stack.enter_async_context(Database(database_url))
        executing = asyncio.create_task(
            run_worker(
                database,
                tasks,
                stop=stop,
                shutdown_timeout_s=settings.drain_shutdown_timeout_ms / 1000,
                tracer_provider=tracer_provider,
            ),
            name="mollifier-execute",
        )
        # Beside the start, which waits for servers that are away: what is wrong with them is told meanwhile.
        stack.push_async_callback(_ended, asyncio.create_task(_examine(settings, database), name="mollifier-doctor"))
        drainer = await _start_drainer(settings, telemetry or Telemetry(), stop, database, stack)
        log.info(
            "mollifier.worker_started", extra={"fields": {"tasks": sorted(tasks), "draining": drainer is not None}}
        )
        on_start(drainer)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((executing, stopping), return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        stopping.cancel()
        if drainer is not None:
            await drainer.stop()
        await executing


def checked(settings: Settings) -> str:
    """Return the database's URL. Raises SettingsError for settings that no worker can follow."""
    if settings.database_url is None:
        raise SettingsError(variable("database_url"), "must be set: the worker executes the runs recorded there")
    if settings.drainer_enabled and settings.redis_url is None:
        detail = f"is on, but there is nothing to drain: set {variable('redis_url')}, or switch it off"
        raise SettingsError(variable("drainer_enabled"), detail)
    if settings.divert and settings.enabled and settings.redis_url is None:
        raise SettingsError(
            variable("divert"), f"is on, but there is no buffer to divert to: set {variable('redis_url')}"
        )
    return settings.database_url


def _serve_metrics(registry: CollectorRegistry, port: int, stack: AsyncExitStack) -> None:
    """Serve until the stack unwinds, which is after the work: the last counts can still be read. Raises SettingsError."""
    try:
        stack.enter_context(serving_metrics(registry, port))
    except OSError as error:
        detail = f"cannot listen on {port}: {error.strerror or error}; choose another port for this worker, or unset it"
        raise SettingsError(variable("worker_metrics_port"), detail) from error


async def _start_drainer(
    settings: Settings, telemetry: Telemetry, stop: asyncio.Event, database: Database, stack: AsyncExitStack
) -> Drainer | None:
    if settings.redis_url is None:
        return None
    if not settings.drains:
        await _warn_of_entries(settings, settings.redis_url)
        return None
    mollifier = Mollifier(
        settings, engine=PostgresRunEngine(database), tasks=PostgresTaskCatalog(database), telemetry=telemetry
    )
    stack.push_async_callback(mollifier.aclose)
    if mollifier.buffer is None or not await _claim_layout(mollifier.buffer, stop):
        return None
    drainer, sweeper = mollifier.drainer(), mollifier.sweeper()
    drainer.start()
    sweeper.start()
    stack.push_async_callback(sweeper.stop)
    return drainer


async def _warn_of_entries(settings: Settings, redis_url: str) -> None:
    """Say when the buffer holds something that this worker will not drain. Switched off, not even its server is asked."""
    if not settings.enabled:
        detail = (
            f"{variable('redis_url')} names a buffer that this worker does not drain: what it may still hold stays there "
            f"until {variable('drainer_enabled')}=1 drains it"
        )
        log.warning("mollifier.not_draining", extra={"fields": {"detail": detail}})
        return
    redis = connect(redis_url)
    try:
        left = (await Buffer(Server(redis), lambda: settings).counts()).left
        if left:
            detail = f"{left} entries are in the buffer and this worker does not drain them: set {variable('drainer_enabled')}=1"
            log.warning("mollifier.nobody_drains", extra={"fields": {"entries": left, "detail": detail}})
    except BufferUnavailableError as error:
        log.warning("mollifier.boot_fault", extra={"fields": {"operation": "count entries", "error": str(error)}})
    finally:
        await redis.aclose()


async def _examine(settings: Settings, database: Database) -> None:
    """Log what the doctor finds, warnings and worse one by one. Switched off, the buffer's server is not asked."""
    redis = connect(settings.redis_url) if settings.redis_url and (settings.enabled or settings.drains) else None
    try:
        server = Server(redis) if redis is not None else None
        findings = await diagnose(settings, server=server, database=database, starting=True)
        for finding in findings:
            if finding.severity in _LOGGED:
                log.log(
                    _LOGGED[finding.severity], "mollifier.finding", extra={"fields": msgspec.structs.asdict(finding)}
                )
        counts = Counter(finding.severity.value for finding in findings)
        log.info("mollifier.examined", extra={"fields": dict(counts)})
    except Exception:
        # The doctor is there to help: no defect of its own costs a worker.
        log.exception("mollifier.boot_fault", extra={"fields": {"operation": "examine"}})
    finally:
        if redis is not None:
            await redis.aclose()


async def _ended(task: asyncio.Task[None]) -> None:
    # It takes a moment where servers answer, and then has its say; whatever it has open is closed with the pool and the client.
    await asyncio.wait((task,), timeout=_EXAMINED_S)
    task.cancel()
    await asyncio.wait((task,))


async def _claim_layout(buffer: Buffer, stop: asyncio.Event) -> bool:
    """Check the buffer's layout, again and again while its server is away; False when told to stop before it was done."""
    backoff = Backoff()
    while not stop.is_set():
        try:
            await buffer.claim_layout()
        except BufferUnavailableError as error:
            log.warning("mollifier.boot_fault", extra={"fields": {"operation": "claim layout", "error": str(error)}})
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), backoff.next_ms() / 1000)
        else:
            return True
    return False


def _stop_on_signals(stop: asyncio.Event) -> None:
    """Set the event on SIGTERM and SIGINT; a second call replaces the first one's handlers, it adds none."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
