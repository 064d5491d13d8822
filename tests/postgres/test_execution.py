"""Executing one run for one job: claims, outcomes, retries, and who may write."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mollifier.engine import Existing
from mollifier.model import RunStatus
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.execution import COMEBACKS_MAX, Executor
from mollifier.tasks import TaskContext, TaskFunction
from tests.postgres.support import ENV, START, Clock, Outage, create, execute, read, rows, snapshot, until

Execute = Callable[..., Awaitable[None]]


def echo(payload: Any) -> Any:
    return payload


def fails(payload: Any) -> None:
    raise ValueError(f"cannot {payload}")


async def hangs(_: Any) -> None:
    await asyncio.sleep(60)


def hangs_in_a_thread(_: Any) -> None:
    time.sleep(0.2)


async def cancels_itself(_: Any) -> None:
    raise asyncio.CancelledError


async def exits(_: Any) -> None:
    sys.exit(1)


def returns_no_json(_: Any) -> object:
    return object()


async def tells(_: Any, context: TaskContext) -> Any:
    return context


TASKS: dict[str, TaskFunction] = {
    function.__name__: function
    for function in (echo, fails, hangs, hangs_in_a_thread, cancels_itself, exits, returns_no_json, tells)
}


@pytest.fixture
def executor(database: Database, clock: Clock) -> Executor:
    return Executor(database, TASKS, clock=clock)


async def test_a_run_completes_with_what_its_task_returns(
    engine: PostgresRunEngine, executor: Executor, clock: Clock
) -> None:
    run_id = await create(engine, payload=b'{"big": 9007199254740993}')
    clock.turn(seconds=5)

    await executor.execute(run_id, job_id=1)

    run = await read(engine, run_id)
    assert (run.status, run.output, run.output_type) == (
        RunStatus.COMPLETED,
        b'{"big":9007199254740993}',
        "application/json",
    )
    assert (run.started_at, run.finished_at, run.attempt_count, run.error) == (clock.now, clock.now, 1, None)


async def test_a_task_learns_of_the_run_that_it_executes(engine: PostgresRunEngine, executor: Executor) -> None:
    run_id = await create(engine, task_id="tells", tags=("a",), test=True)

    await executor.execute(run_id, job_id=1)

    output = (await read(engine, run_id)).output
    assert output is not None
    told = f'{{"run_id":"{run_id}","task_id":"tells","env_id":"{ENV}","attempt":1,"created_at":"2026-03-01T12:00:00Z",'
    assert output.decode() == told + '"tags":["a"],"is_test":true}'


@pytest.mark.parametrize(
    ("task_id", "fields", "status", "name", "message"),
    [
        ("fails", {}, RunStatus.FAILED, "ValueError", "cannot {'a': 1}"),
        ("echo", {"payload": b"{"}, RunStatus.FAILED, "JSONDecodeError", "Expecting property name"),
        ("returns_no_json", {}, RunStatus.FAILED, "OutputError", "returned a object that is not JSON"),
        ("cancels_itself", {}, RunStatus.FAILED, "CancelledError", ""),
        ("exits", {}, RunStatus.FAILED, "SystemExit", "1"),
        ("hangs", {"max_duration_s": 0}, RunStatus.TIMED_OUT, "TimedOut", "longer than its 0 s"),
        ("hangs_in_a_thread", {"max_duration_s": 0}, RunStatus.TIMED_OUT, "TimedOut", "longer than its 0 s"),
        ("unheard_of", {}, RunStatus.SYSTEM_FAILURE, "UnknownTask", "MOLLIFIER_TASKS"),
    ],
)
async def test_a_run_that_does_not_succeed_says_why_and_frees_its_key(  # noqa: PLR0917 - the columns of the table
    engine: PostgresRunEngine,
    executor: Executor,
    task_id: str,
    fields: dict[str, Any],
    status: RunStatus,
    name: str,
    message: str,
) -> None:
    run_id = await create(engine, task_id=task_id, idempotency_key="key", request_key="request", **fields)

    await executor.execute(run_id, job_id=1)

    run = await read(engine, run_id)
    assert run.error is not None
    assert (run.status, run.error.name) == (status, name)
    assert message in run.error.message
    assert await engine.find_by_keys(snapshot(task_id=task_id, idempotency_key="key")) is None
    assert await engine.find_by_keys(snapshot(request_key="request")) == Existing(run_id, by="request_key")


async def test_a_completed_run_keeps_its_key(engine: PostgresRunEngine, executor: Executor) -> None:
    run_id = await create(engine, idempotency_key="key")

    await executor.execute(run_id, job_id=1)

    assert await engine.find_by_keys(snapshot(idempotency_key="key")) == Existing(run_id, by="idempotency_key")


async def test_a_failing_run_is_tried_again_with_growing_pauses_and_keeps_its_key_until_the_last(
    engine: PostgresRunEngine, executor: Executor, database: Database, clock: Clock
) -> None:
    run_id = await create(engine, task_id="fails", max_attempts=3, idempotency_key="key", queue="mail", priority=2)
    await execute(database, "DELETE FROM procrastinate_jobs")

    scheduled: list[timedelta] = []
    for job_id in (1, 2):
        await executor.execute(run_id, job_id)
        run = await read(engine, run_id)
        assert (run.status, run.attempt_count, run.finished_at) == (RunStatus.QUEUED, job_id, None)
        (job,) = await rows(
            database, "DELETE FROM procrastinate_jobs RETURNING args, scheduled_at, queue_name, priority"
        )
        assert (job["args"], job["queue_name"], job["priority"]) == ({"run_id": run_id}, "mail", 2)
        scheduled.append(job["scheduled_at"] - clock.now)
        assert await engine.find_by_keys(snapshot(task_id="fails", idempotency_key="key")) is not None

    await executor.execute(run_id, job_id=3)

    assert scheduled == [timedelta(seconds=1), timedelta(seconds=2)]
    run = await read(engine, run_id)
    assert (run.status, run.attempt_count) == (RunStatus.FAILED, 3)
    assert await engine.find_by_keys(snapshot(task_id="fails", idempotency_key="key")) is None
    assert await rows(database, "SELECT id FROM procrastinate_jobs") == []


@pytest.mark.parametrize("status", ["COMPLETED", "CANCELED", "EXPIRED", "FAILED", "DELAYED", "EXECUTING"])
async def test_a_job_whose_run_is_not_its_to_execute_does_nothing(
    engine: PostgresRunEngine, executor: Executor, database: Database, status: str
) -> None:
    run_id = await create(engine)
    await execute(database, "UPDATE runs SET status = :status, job_id = 7, delayed_until = '3000-01-01'", status=status)
    before = await rows(database, "SELECT * FROM runs")

    await executor.execute(run_id, job_id=8)
    await executor.execute("run_none", job_id=8)

    assert await rows(database, "SELECT * FROM runs") == before


async def test_a_job_that_comes_back_resumes_its_run(
    engine: PostgresRunEngine, executor: Executor, database: Database, clock: Clock
) -> None:
    run_id = await create(engine)
    await execute(
        database, "UPDATE runs SET status = 'EXECUTING', job_id = 7, attempt_count = 1, started_at = :at", at=START
    )
    clock.turn(minutes=1)

    await executor.execute(run_id, job_id=7, comebacks=1)

    run = await read(engine, run_id)
    assert (run.status, run.attempt_count, run.started_at) == (RunStatus.COMPLETED, 2, START)


async def test_a_run_that_keeps_killing_its_worker_is_given_up_as_crashed(
    engine: PostgresRunEngine, executor: Executor
) -> None:
    run_id = await create(engine, idempotency_key="key")

    await executor.execute(run_id, job_id=1, comebacks=COMEBACKS_MAX + 1)

    run = await read(engine, run_id)
    assert run.error is not None
    assert (run.status, run.error.name, run.output) == (RunStatus.CRASHED, "WorkerCrashed", None)
    assert await engine.find_by_keys(snapshot(idempotency_key="key")) is None


async def test_a_run_whose_time_to_live_is_over_does_not_start(
    engine: PostgresRunEngine, executor: Executor, clock: Clock
) -> None:
    run_id = await create(engine, ttl_s=60)
    clock.turn(seconds=60)

    await executor.execute(run_id, job_id=1)

    assert (await read(engine, run_id)).attempt_count == 0


async def test_a_run_that_was_cancelled_while_it_executed_stays_cancelled(
    engine: PostgresRunEngine, database: Database, clock: Clock
) -> None:
    run_id = await create(engine, idempotency_key="key")

    async def is_cancelled(_: Any) -> str:
        await engine.cancel_run(ENV, run_id, clock.now)
        return "too late"

    await Executor(database, {"echo": is_cancelled}, clock=clock).execute(run_id, job_id=1)

    run = await read(engine, run_id)
    assert (run.status, run.output) == (RunStatus.CANCELED, None)
    assert await engine.find_by_keys(snapshot(idempotency_key="key")) is not None


@pytest.mark.parametrize("max_attempts", [1, 5])
async def test_a_worker_that_was_taken_for_dead_cannot_overwrite_its_successor(
    engine: PostgresRunEngine, database: Database, clock: Clock, max_attempts: int
) -> None:
    run_id = await create(engine, max_attempts=max_attempts)
    successor = Executor(database, {"echo": echo}, clock=clock)

    async def is_overtaken(_: Any) -> str:
        await successor.execute(run_id, job_id=1, comebacks=1)
        raise ValueError("late")

    await Executor(database, {"echo": is_overtaken}, clock=clock).execute(run_id, job_id=1)

    run = await read(engine, run_id)
    assert (run.status, run.output, run.attempt_count) == (RunStatus.COMPLETED, b'{"a":1}', 2)


async def test_cancelling_the_execution_leaves_the_run_to_its_job(
    engine: PostgresRunEngine, executor: Executor, database: Database
) -> None:
    async def is_executing() -> bool:
        return (await read(engine, run_id)).status is RunStatus.EXECUTING

    run_id = await create(engine, task_id="hangs")
    executing = asyncio.create_task(executor.execute(run_id, job_id=1))
    await until(is_executing)

    executing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await executing

    assert await rows(database, "SELECT status, job_id FROM runs") == [{"status": "EXECUTING", "job_id": 1}]


async def test_an_outcome_is_written_once_an_outage_is_over(
    engine: PostgresRunEngine, database: Database, clock: Clock, outage: Outage
) -> None:
    run_id = await create(engine)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            await outage.end()

    async def loses_the_database(payload: Any) -> Any:
        await outage.begin()
        return payload

    await Executor(database, {"echo": loses_the_database}, clock=clock, sleep=sleep).execute(run_id, job_id=1)

    assert (await read(engine, run_id)).status is RunStatus.COMPLETED
    assert pauses == [0.1, 0.2, 0.4]


@pytest.fixture
async def spans() -> AsyncIterator[tuple[TracerProvider, InMemorySpanExporter]]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider, exporter
    provider.shutdown()


async def test_the_execution_continues_the_triggers_trace(
    engine: PostgresRunEngine, database: Database, clock: Clock, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    traced = await create(engine, traceparent=f"00-{trace_id}-{parent_id}-01", tracestate="vendor=1", task_id="fails")
    untraced = await create(engine, traceparent="nonsense")
    executor = Executor(database, TASKS, clock=clock, tracer_provider=provider)

    await executor.execute(traced, job_id=1)
    await executor.execute(untraced, job_id=2)

    first, second = exporter.get_finished_spans()
    assert (first.name, second.name) == ("mollifier.run", "mollifier.run")
    assert first.context is not None
    assert first.parent is not None
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (trace_id, parent_id)
    assert first.attributes == {"mollifier.run_id": traced, "mollifier.task_id": "fails"}
    assert (first.status.is_ok, second.status.is_unset, second.parent) == (False, True, None)
