"""The worker: executes queued runs, and keeps the clock for all runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import procrastinate
import psycopg
import psycopg_pool
from opentelemetry import trace
from procrastinate.exceptions import ConnectorException
from procrastinate.job_context import AbortReason
from procrastinate.jobs import DeleteJobCondition, Job

from mollifier.postgres.background import keep, through_outage, wind_up
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import CONNECT_TIMEOUT_S, Database
from mollifier.postgres.engine import utc_now
from mollifier.postgres.execution import Executor
from mollifier.postgres.job_manager import LastingJobManager
from mollifier.postgres.jobs import EXECUTE
from mollifier.postgres.upkeep import Upkeep
from mollifier.tasks import TaskFunction

CONCURRENCY = 20
SHUTDOWN_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 5.0
SILENT_S = 15.0
"""A worker that is silent for so long is taken for dead: its runs go to others."""
PRUNE_AFTER_S = 600.0
UPKEEP_INTERVAL_S = 1.0
RESCUE_INTERVAL_S = 5.0
SWEEP_INTERVAL_S = 600.0
RESTART_PAUSE_S = 2.0
COMEBACK_PAUSE_MAX_S = 60
POOL_SIZE = 4

_log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - it is no error: the worker stops, another one goes on
    """The worker stops before the run has an outcome; the job goes back and the run resumes elsewhere."""


class _Comeback(procrastinate.BaseRetryStrategy):
    """A job comes back for as long as its run has no outcome: at once when its worker stops, later after a failure of our own."""

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> procrastinate.RetryDecision | None:
        """Decide; the cancellation of a job is the only way out without an outcome, for its run has one already."""
        if isinstance(exception, Interrupted):
            return procrastinate.RetryDecision(retry_at=datetime.now(UTC))
        if isinstance(exception, Exception):
            pause_s = min(2**job.attempts, COMEBACK_PAUSE_MAX_S)
            return procrastinate.RetryDecision(retry_at=datetime.now(UTC) + timedelta(seconds=pause_s))
        return None


async def run_worker(
    database: Database,
    tasks: Mapping[str, TaskFunction],
    *,
    stop: asyncio.Event,
    concurrency: int = CONCURRENCY,
    shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S,
    clock: Callable[[], datetime] = utc_now,
    tracer_provider: trace.TracerProvider | None = None,
) -> None:
    """Record the tasks and execute runs, `concurrency` at once, until `stop` is set; outages of the database are waited for.

    Once stopped, runs that execute have `shutdown_timeout_s` to finish; what then still runs is cancelled and resumes elsewhere.
    The caller handles signals and closes the database.
    """
    executor = Executor(database, tasks, clock=clock, tracer_provider=tracer_provider)
    working = asyncio.create_task(_work(database, tasks, executor, concurrency, shutdown_timeout_s))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        # Tasks are cancelled at their deadline; one that holds out against that is left behind a little later.
        timeout_s = shutdown_timeout_s + RESTART_PAUSE_S
        ended = await wind_up(working, busy=lambda: executor.executing > 0, timeout_s=timeout_s)
    if not ended:
        _log.warning("mollifier.task_left_behind", extra={"fields": {"detail": "a task ignores its cancellation"}})
    elif not working.cancelled():
        working.result()


async def _work(
    database: Database,
    tasks: Mapping[str, TaskFunction],
    executor: Executor,
    concurrency: int,
    shutdown_timeout_s: float,
) -> None:
    modules = {task_id: function.__module__ for task_id, function in tasks.items()}
    await through_outage(lambda: record_tasks(database, modules), what="record tasks")
    upkeep = Upkeep(database, executor.clock)
    async with asyncio.TaskGroup() as group:
        for loop in (
            keep(upkeep.advance, what="queue and expire runs", every_s=UPKEEP_INTERVAL_S),
            # After an outage every worker's heartbeat is old: time to send one comes first.
            keep(
                lambda: upkeep.rescue(SILENT_S),
                what="rescue runs of dead workers",
                every_s=RESCUE_INTERVAL_S,
                first_after_s=SILENT_S,
                after_failure_s=SILENT_S,
            ),
            keep(upkeep.sweep, what="sweep jobs", every_s=SWEEP_INTERVAL_S, first_after_s=SWEEP_INTERVAL_S),
        ):
            group.create_task(loop)
        while True:
            try:
                await _fetch_and_execute(database, executor, concurrency, shutdown_timeout_s)
            except (ConnectorException, psycopg.OperationalError) as error:
                fields = {"operation": "fetch jobs", "error": str(error.__cause__ or error)}
                _log.warning("mollifier.waiting_for_database", extra={"fields": fields})
            except Exception:  # noqa: BLE001 - a worker outlives every failure of its machinery
                _log.exception("mollifier.worker_starts_over")
            await asyncio.sleep(RESTART_PAUSE_S)


async def _fetch_and_execute(
    database: Database, executor: Executor, concurrency: int, shutdown_timeout_s: float
) -> None:
    """Run procrastinate's worker until it is cancelled or fails."""
    pool = psycopg_pool.AsyncConnectionPool(
        database.conninfo,
        configure=_commit_each_statement,
        min_size=1,
        max_size=POOL_SIZE,
        timeout=CONNECT_TIMEOUT_S,
        open=False,
    )
    async with pool:
        await pool.wait(CONNECT_TIMEOUT_S)
        app = _app(executor)
        await app.connector.open_async(pool)
        await app.run_worker_async(
            concurrency=concurrency,
            install_signal_handlers=False,
            fetch_job_polling_interval=POLL_INTERVAL_S,
            update_heartbeat_interval=HEARTBEAT_INTERVAL_S,
            stalled_worker_timeout=PRUNE_AFTER_S,
            shutdown_graceful_timeout=shutdown_timeout_s,
            delete_jobs=DeleteJobCondition.ALWAYS,
        )


async def _commit_each_statement(connection: psycopg.AsyncConnection[Any]) -> None:
    # Each of procrastinate's queries is one statement; a transaction around it would triple its round trips.
    await connection.set_autocommit(True)


def _app(executor: Executor) -> procrastinate.App:
    connector = procrastinate.PsycopgConnector()
    app = procrastinate.App(connector=connector)
    app.job_manager = LastingJobManager(connector)

    @app.task(name=EXECUTE, pass_context=True, retry=_Comeback())
    async def execute(context: procrastinate.JobContext, run_id: str) -> None:  # pyright: ignore[reportUnusedFunction]
        job = context.job
        if job.id is None:
            raise ValueError("a job that was fetched has an id")
        try:
            await executor.execute(run_id, job.id, comebacks=job.attempts)
        except asyncio.CancelledError:
            if context.abort_reason() is AbortReason.SHUTDOWN:
                raise Interrupted from None
            raise

    return app
