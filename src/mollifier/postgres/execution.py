"""Executing one run for one job.

    QUEUED ──claim──> EXECUTING ──finish──> COMPLETED, FAILED, TIMED_OUT, CRASHED or SYSTEM_FAILURE
       ^                  │  │
       └──── try again ───┘  └── the job comes back: its worker died or was stopped; claimed anew

A claim writes the job's id into the run and counts the attempt; whoever writes the outcome must still hold both. So a run that was
cancelled meanwhile stays cancelled, and a worker that was taken for dead cannot overwrite its successor. The job itself lives
until its run has an outcome: it leaves the table after the last write to the run, never before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from sqlalchemy import TextClause, text

from mollifier.model import KEY_FREEING_STATUSES, Run, RunError, RunStatus, Snapshot
from mollifier.postgres.background import Sleep, through_outage
from mollifier.postgres.database import Database
from mollifier.postgres.invocation import OutputError, argument_of, invoke, output_of, run_error
from mollifier.postgres.jobs import defer_sql
from mollifier.postgres.rows import run_of
from mollifier.settings import variable
from mollifier.tasks import TaskContext, TaskFunction

COMEBACKS_MAX = 10
RETRY_DELAY_MIN_S = 1.0
RETRY_DELAY_MAX_S = 300.0

_log = logging.getLogger(__name__)
_propagator = TraceContextTextMapPropagator()

_CLAIM = text(
    """
    UPDATE runs
    SET status = 'EXECUTING', job_id = :job_id, attempt_count = attempt_count + 1, started_at = coalesce(started_at, :now),
        updated_at = :now, expires_at = NULL
    WHERE id = :id AND (
        status = 'QUEUED' AND (expires_at IS NULL OR expires_at > :now)
        OR status = 'EXECUTING' AND job_id = :job_id
    )
    RETURNING *
    """
)
_STILL_OURS = "id = :id AND status = 'EXECUTING' AND job_id = :job_id AND attempt_count = :attempt"
_FINISH = text(
    f"""
    UPDATE runs
    SET status = :status, output = :output, error = :error, finished_at = :now, updated_at = :now, job_id = NULL,
        idempotency_slot = CASE WHEN :frees_key THEN NULL ELSE idempotency_slot END
    WHERE {_STILL_OURS}
    RETURNING id
    """  # noqa: S608 - made of constants
)
_TRY_AGAIN = text(
    f"""
    WITH again AS (
        UPDATE runs SET status = 'QUEUED', job_id = NULL, updated_at = :now WHERE {_STILL_OURS}
        RETURNING id, queue, priority, created_at
    )
    SELECT {defer_sql(scheduled_at="CAST(:at AS timestamptz)")} FROM again
    """  # noqa: S608 - made of constants
)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended. `retryable`: another attempt may end better."""

    status: RunStatus
    output: bytes | None = None
    error: RunError | None = None
    retryable: bool = False


class Executor:
    """Executes runs of the given tasks. `clock` returns the current moment in UTC."""

    def __init__(
        self,
        database: Database,
        tasks: Mapping[str, TaskFunction],
        *,
        clock: Callable[[], datetime],
        sleep: Sleep = asyncio.sleep,
        tracer_provider: trace.TracerProvider | None = None,
    ) -> None:
        self._database = database
        self._tasks = tasks
        self.clock = clock
        self._sleep = sleep
        self._tracer = (tracer_provider or trace.get_tracer_provider()).get_tracer("mollifier")
        self._executing = 0

    @property
    def executing(self) -> int:
        """How many jobs are being executed, from their claim to their written outcome."""
        return self._executing

    async def execute(self, run_id: str, job_id: int, comebacks: int = 0) -> None:
        """Execute the run for the job that came back `comebacks` times; do nothing when the run is not the job's to execute.

        Returns once the outcome is written, through outages of the database. Cancelling leaves the run claimed by the job.
        """
        self._executing += 1
        try:
            await self._execute(run_id, job_id, comebacks)
        finally:
            self._executing -= 1

    async def _execute(self, run_id: str, job_id: int, comebacks: int) -> None:
        run = await self._persist(lambda: self._claim(run_id, job_id), run_id)
        if run is None:
            return
        outcome = self._given_up(comebacks) or await self._attempt(run)
        again_at = self._again_at(run, outcome)
        if again_at is not None:
            written = await self._persist(lambda: self._try_again(run, job_id, again_at), run_id)
        else:
            written = await self._persist(lambda: self._finish(run, job_id, outcome), run_id)
        if not written:
            # Cancelled meanwhile, or taken over by another worker.
            fields = {"run_id": run_id, "status": outcome.status.value}
            _log.info("mollifier.outcome_dropped", extra={"fields": fields})

    async def _persist(self, operation: Any, run_id: str) -> Any:
        return await through_outage(operation, what=f"execute {run_id}", sleep=self._sleep)

    async def _claim(self, run_id: str, job_id: int) -> Run | None:
        now = self.clock()
        async with self._database.statement() as connection:
            parameters = {"id": run_id, "job_id": job_id, "now": now}
            row = (await connection.execute(_CLAIM, parameters)).mappings().one_or_none()
        return None if row is None else run_of(row, now)

    def _given_up(self, comebacks: int) -> Outcome | None:
        if comebacks <= COMEBACKS_MAX:
            return None
        message = f"Its worker died or was stopped {comebacks} times while it executed this run."
        return Outcome(status=RunStatus.CRASHED, error=RunError(message=message, name="WorkerCrashed"))

    async def _attempt(self, run: Run) -> Outcome:
        snapshot = run.snapshot
        function = self._tasks.get(snapshot.task_id)
        if function is None:
            message = (
                f"This worker has no task {snapshot.task_id!r}. "
                f"Name the module that defines it in {variable('tasks')} of every worker."
            )
            return Outcome(status=RunStatus.SYSTEM_FAILURE, error=RunError(message=message, name="UnknownTask"))
        with self._tracer.start_as_current_span(
            "mollifier.run",
            context=_propagator.extract(_trace_headers(snapshot)),
            kind=trace.SpanKind.CONSUMER,
            attributes={"mollifier.run_id": snapshot.run_id, "mollifier.task_id": snapshot.task_id},
        ) as span:
            outcome = await _call(function, run)
            if outcome.error is not None:
                span.set_status(trace.StatusCode.ERROR, outcome.error.message)
            return outcome

    def _again_at(self, run: Run, outcome: Outcome) -> datetime | None:
        """Return when to try once more, or None when this outcome is the last word."""
        if not outcome.retryable or run.attempt_count >= (run.snapshot.max_attempts or 1):
            return None
        delay_s = min(RETRY_DELAY_MIN_S * 2.0 ** min(run.attempt_count - 1, 30), RETRY_DELAY_MAX_S)
        return self.clock() + timedelta(seconds=delay_s)

    async def _try_again(self, run: Run, job_id: int, at: datetime) -> bool:
        return await self._write(_TRY_AGAIN, run, job_id, at=at)

    async def _finish(self, run: Run, job_id: int, outcome: Outcome) -> bool:
        return await self._write(
            _FINISH,
            run,
            job_id,
            status=outcome.status.value,
            output=outcome.output,
            error=None if outcome.error is None else msgspec.json.encode(outcome.error),
            frees_key=outcome.status in KEY_FREEING_STATUSES,
        )

    async def _write(self, statement: TextClause, run: Run, job_id: int, **parameters: Any) -> bool:
        """Write if the run is still ours, and tell whether it was."""
        ours = {"id": run.id, "job_id": job_id, "attempt": run.attempt_count, "now": self.clock()}
        async with self._database.statement() as connection:
            return (await connection.execute(statement, {**ours, **parameters})).scalar() is not None


async def _call(function: TaskFunction, run: Run) -> Outcome:
    """Call the task. Everything it may raise is an outcome, but for the cancellation of the call itself."""
    snapshot = run.snapshot
    context = TaskContext(
        run_id=run.id,
        task_id=snapshot.task_id,
        env_id=snapshot.env_id,
        attempt=run.attempt_count,
        created_at=snapshot.created_at,
        tags=snapshot.tags,
        is_test=snapshot.test,
    )
    calling = asyncio.current_task()
    deadline = asyncio.timeout(snapshot.max_duration_s)
    try:
        async with deadline:
            output = output_of(await invoke(function, argument_of(snapshot), context))
        return Outcome(status=RunStatus.COMPLETED, output=output)
    except OutputError as error:
        return Outcome(status=RunStatus.FAILED, error=RunError(message=str(error), name="OutputError"))
    except asyncio.CancelledError as error:
        if calling is not None and calling.cancelling():
            raise
        # The task itself raised it.
        return Outcome(status=RunStatus.FAILED, error=run_error(error), retryable=True)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a task may raise anything
        if deadline.expired():
            message = f"The run took longer than its {snapshot.max_duration_s} s."
            return Outcome(status=RunStatus.TIMED_OUT, error=RunError(message=message, name="TimedOut"))
        return Outcome(status=RunStatus.FAILED, error=run_error(error), retryable=True)


def _trace_headers(snapshot: Snapshot) -> dict[str, str]:
    headers = {"traceparent": snapshot.traceparent, "tracestate": snapshot.tracestate}
    return {name: value for name, value in headers.items() if value is not None}
