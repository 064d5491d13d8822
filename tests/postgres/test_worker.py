"""The worker on a real database: it executes, cancels, stops, and outlives outages and its own death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mollifier.model import Run, RunFilter, RunStatus
from mollifier.postgres import worker as worker_module
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.execution import Executor
from mollifier.postgres.worker import run_worker
from mollifier.tasks import TaskContext, TaskFunction
from tests.postgres.slow_tasks import wait_for_second_attempt
from tests.postgres.support import ENV, Outage, create, jobs, read, rows, snapshot, until

ROOT = Path(__file__).parent.parent.parent


class Hanging:
    """A task that hangs until told to go on, and tells what happened to it."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, payload: Any) -> Any:
        self.entered.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return payload


@pytest.fixture
def hanging() -> Hanging:
    return Hanging()


@pytest.fixture
def tasks(hanging: Hanging) -> Mapping[str, TaskFunction]:
    async def echo(payload: Any) -> Any:
        return payload

    async def hang(payload: Any) -> Any:
        return await hanging(payload)

    def block(payload: Any) -> None:
        time.sleep(payload)

    async def second_time(_: Any, context: TaskContext) -> int:
        if context.attempt == 1:
            raise ValueError("not yet")
        return context.attempt

    return {"echo": echo, "hang": hang, "block": block, "second_time": second_time}


@pytest.fixture
def engine(database: Database) -> PostgresRunEngine:
    """An engine that goes by the same clock as the worker."""
    return PostgresRunEngine(database)


@pytest.fixture
def outage(database_url: str) -> Outage:
    return Outage(database_url)


@asynccontextmanager
async def working(
    database_url: str, tasks: Mapping[str, TaskFunction], shutdown_timeout_s: float = 10
) -> AsyncGenerator[asyncio.Event]:
    """A worker that runs in this process, with connections of its own; it stops when the event is set or the block ends."""
    stop = asyncio.Event()
    async with Database(database_url) as database:
        running = asyncio.create_task(run_worker(database, tasks, stop=stop, shutdown_timeout_s=shutdown_timeout_s))
        try:
            yield stop
        finally:
            stop.set()
            await asyncio.wait_for(running, shutdown_timeout_s + 10)


async def ended(engine: PostgresRunEngine, run_id: str, timeout_s: float = 30) -> Run:
    async def has_ended() -> bool:
        return (await read(engine, run_id)).finished_at is not None

    await until(has_ended, timeout_s)
    return await read(engine, run_id)


def now() -> datetime:
    return datetime.now(UTC)


async def test_queued_runs_are_executed_and_leave_no_job(
    database_url: str, database: Database, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction]
) -> None:
    async def are_done() -> bool:
        return len((await engine.list_runs(ENV, done)).runs) == len(snaps)

    snaps = [snapshot(payload=b"%d" % number, queue=f"queue {number % 3}") for number in range(30)]
    done = RunFilter(page_size=100, statuses=(RunStatus.COMPLETED,))
    await engine.create_runs(snaps[:15])
    async with working(database_url, tasks):
        await engine.create_runs(snaps[15:])
        await until(are_done)

    runs = (await engine.get_runs(ENV, [snap.run_id for snap in snaps])).values()
    assert {run.id: run.output for run in runs} == {snap.run_id: snap.payload for snap in snaps}
    assert {run.attempt_count for run in runs} == {1}
    assert await jobs(database) == []
    assert await rows(database, "SELECT id FROM procrastinate_workers") == []


async def test_a_worker_records_its_tasks(
    database_url: str, database: Database, tasks: Mapping[str, TaskFunction]
) -> None:
    async def is_known() -> bool:
        return await PostgresTaskCatalog(database).knows("second_time")

    async with working(database_url, tasks):
        await until(is_known)


async def test_a_delayed_run_is_executed_when_it_is_due(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction]
) -> None:
    due_at = now() + timedelta(seconds=1)
    run_id = await create(engine, created_at=now(), delayed_until=due_at)

    async with working(database_url, tasks):
        run = await ended(engine, run_id)

    assert run.started_at is not None
    assert run.started_at >= due_at


async def test_a_run_that_waits_too_long_expires_beside_a_worker(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction]
) -> None:
    async with working(database_url, tasks):
        # Delayed, so that no job starts it before its time is over.
        run_id = await create(engine, created_at=now(), ttl_s=0, delayed_until=now() + timedelta(milliseconds=200))

        assert (await ended(engine, run_id)).status is RunStatus.EXPIRED


async def test_a_failing_run_succeeds_on_its_second_attempt(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction]
) -> None:
    run_id = await create(engine, task_id="second_time", max_attempts=2)

    async with working(database_url, tasks):
        run = await ended(engine, run_id)

    assert (run.status, run.output, run.attempt_count) == (RunStatus.COMPLETED, b"2", 2)


async def test_cancelling_an_executing_run_cancels_its_task(
    database_url: str,
    database: Database,
    engine: PostgresRunEngine,
    tasks: Mapping[str, TaskFunction],
    hanging: Hanging,
) -> None:
    async def has_no_job() -> bool:
        return await jobs(database) == []

    run_id = await create(engine, task_id="hang")
    async with working(database_url, tasks):
        await hanging.entered.wait()
        await engine.cancel_run(ENV, run_id, now())
        await asyncio.wait_for(hanging.cancelled.wait(), 10)
        await until(has_no_job)

    run = await read(engine, run_id)
    assert (run.status, run.output) == (RunStatus.CANCELED, None)


async def test_stopping_lets_executing_runs_finish(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction], hanging: Hanging
) -> None:
    run_id = await create(engine, task_id="hang")
    async with working(database_url, tasks) as stop:
        await hanging.entered.wait()
        stop.set()
        await asyncio.sleep(0.1)
        later = await create(engine)
        hanging.go_on.set()

    assert (await read(engine, run_id)).status is RunStatus.COMPLETED
    assert (await read(engine, later)).status is RunStatus.QUEUED


async def test_what_is_not_finished_by_the_deadline_resumes_with_the_next_worker(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction], hanging: Hanging
) -> None:
    run_id = await create(engine, task_id="hang")
    async with working(database_url, tasks, shutdown_timeout_s=0.1):
        await hanging.entered.wait()
    assert hanging.cancelled.is_set()
    assert (await read(engine, run_id)).status is RunStatus.EXECUTING
    hanging.go_on.set()

    async with working(database_url, tasks):
        run = await ended(engine, run_id)

    assert (run.status, run.attempt_count) == (RunStatus.COMPLETED, 2)


async def test_a_thread_that_cannot_be_stopped_does_not_keep_the_worker(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction]
) -> None:
    async def is_executing() -> bool:
        return (await read(engine, run_id)).status is RunStatus.EXECUTING

    run_id = await create(engine, task_id="block", payload=b"3")
    async with working(database_url, tasks, shutdown_timeout_s=0.1) as stop:
        await until(is_executing)
        stop.set()

    assert (await read(engine, run_id)).status is RunStatus.EXECUTING


async def test_a_worker_outlives_an_outage_with_the_runs_that_it_executes(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction], hanging: Hanging, outage: Outage
) -> None:
    before = await create(engine, task_id="hang")
    async with working(database_url, tasks):
        await hanging.entered.wait()
        await outage.begin()
        hanging.go_on.set()
        await asyncio.sleep(0.5)
        await outage.end()
        first = await ended(engine, before)
        second = await ended(engine, await create(engine))

    assert not hanging.cancelled.is_set()
    assert (first.status, first.attempt_count) == (RunStatus.COMPLETED, 1)
    assert second.status is RunStatus.COMPLETED


async def test_a_worker_that_boots_in_an_outage_waits_for_its_end(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction], outage: Outage
) -> None:
    run_id = await create(engine)
    await outage.begin()
    async with working(database_url, tasks):
        await asyncio.sleep(0.5)
        await outage.end()

        assert (await ended(engine, run_id)).status is RunStatus.COMPLETED


async def test_a_worker_whose_registration_was_lost_registers_again(
    database_url: str, database: Database, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction]
) -> None:
    async with working(database_url, tasks):
        await ended(engine, await create(engine))
        await rows(database, "DELETE FROM procrastinate_workers RETURNING id")

        assert (await ended(engine, await create(engine))).status is RunStatus.COMPLETED


async def test_a_fault_of_the_workers_own_delays_a_run_and_loses_none(
    database_url: str, engine: PostgresRunEngine, tasks: Mapping[str, TaskFunction], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, faults = Executor._claim, [RuntimeError("a fault")]  # pyright: ignore[reportPrivateUsage]

    async def faulty_claim(executor: Executor, run_id: str, job_id: int) -> Run | None:
        if faults:
            raise faults.pop()
        return await claim(executor, run_id, job_id)

    monkeypatch.setattr(Executor, "_claim", faulty_claim)
    run_id = await create(engine)

    async with working(database_url, tasks):
        run = await ended(engine, run_id)

    assert (run.status, run.attempt_count) == (RunStatus.COMPLETED, 1)


@pytest.fixture
async def doomed_worker(database_url: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, to be killed."""
    command = [sys.executable, "-m", "tests.postgres.worker_process", database_url]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    yield process
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


async def test_a_run_whose_worker_was_killed_resumes_within_a_minute(
    database_url: str, engine: PostgresRunEngine, doomed_worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async def has_begun() -> bool:
        return attempts.exists() and attempts.read_text() == "1\n"

    attempts = tmp_path / "attempts"
    run_id = await create(engine, task_id="wait_for_second_attempt", payload=json.dumps(str(attempts)).encode())
    await until(has_begun)
    doomed_worker.kill()
    doomed_worker.wait()
    assert (await read(engine, run_id)).status is RunStatus.EXECUTING

    async with working(database_url, {"wait_for_second_attempt": wait_for_second_attempt}):
        run = await ended(engine, run_id, timeout_s=60)

    assert (run.status, run.output, run.attempt_count) == (RunStatus.COMPLETED, b"2", 2)
    assert attempts.read_text() == "1\n2\n"


def test_a_dead_workers_runs_are_looked_for_in_time() -> None:
    # Silent since its last heartbeat, looked for at the next turn, fetched at the next poll.
    worst_s = worker_module.SILENT_S + worker_module.RESCUE_INTERVAL_S + worker_module.POLL_INTERVAL_S
    booting_s = worker_module.SILENT_S
    assert worst_s + booting_s < 60
    assert worker_module.SILENT_S >= 2 * worker_module.HEARTBEAT_INTERVAL_S
