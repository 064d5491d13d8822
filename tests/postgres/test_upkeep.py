"""Upkeep: what time brings to runs and jobs."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import text

from mollifier.engine import Created
from mollifier.model import FINAL_STATUSES, Debounce, RunStatus
from mollifier.patches import Cancel, Patch, Reschedule
from mollifier.postgres import upkeep as upkeep_module
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.execution import Executor
from mollifier.postgres.upkeep import Upkeep
from tests.postgres.support import ENV, START, Clock, create, execute, jobs, read, rows, snapshot

MINUTE = timedelta(minutes=1)


@pytest.fixture
def upkeep(database: Database, clock: Clock) -> Upkeep:
    return Upkeep(database, clock)


async def test_a_delayed_run_is_queued_with_its_job_when_it_is_due(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, clock: Clock
) -> None:
    run_id = await create(engine, delayed_until=START + MINUTE, queue="mail", priority=3)
    clock.turn(seconds=60, microseconds=-1)
    assert await upkeep.queue_due() == 0
    clock.turn(microseconds=1)

    assert await upkeep.queue_due() == 1

    assert (await read(engine, run_id)).snapshot.delayed_until == START + MINUTE
    assert await rows(database, "SELECT status, due_at FROM runs") == [{"status": "QUEUED", "due_at": None}]
    assert await rows(database, "SELECT args, queue_name, priority FROM procrastinate_jobs") == [
        {"args": {"run_id": run_id}, "queue_name": "mail", "priority": 3}
    ]
    assert await upkeep.queue_due() == 0


async def test_due_runs_are_queued_oldest_first_whatever_their_number(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    snaps = [snapshot(delayed_until=START + MINUTE) for _ in range(upkeep_module.BATCH_SIZE + 20)]
    await engine.create_runs(snaps)
    clock.turn(minutes=1)

    await asyncio.gather(*(upkeep.queue_due() for _ in range(3)))
    await upkeep.queue_due()

    assert sorted(await jobs(database)) == sorted(snap.run_id for snap in snaps)


async def test_a_queued_run_has_left_its_debounce_key(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, clock: Clock
) -> None:
    debounce = Debounce(key="key", delay=MINUTE)
    await create(engine, delayed_until=START + MINUTE, debounce=debounce)
    clock.turn(minutes=1)
    await upkeep.queue_due()

    assert await rows(database, "SELECT debounce_slot FROM runs") == [{"debounce_slot": None}]
    snap = snapshot(created_at=clock.now, delayed_until=clock.now + MINUTE, debounce=debounce)
    assert await engine.create_runs([snap]) == [Created(snap.run_id)]


async def test_a_run_that_did_not_start_in_time_expires_and_frees_its_key(
    engine: PostgresRunEngine, upkeep: Upkeep, clock: Clock
) -> None:
    run_id = await create(engine, ttl_s=60, idempotency_key="key")
    clock.turn(seconds=59)
    assert await upkeep.expire() == 0
    clock.turn(seconds=1)

    assert await upkeep.expire() == 1

    run = await read(engine, run_id)
    assert run.error is not None
    assert (run.status, run.expired_at, run.finished_at, run.error.name) == (
        RunStatus.EXPIRED,
        clock.now,
        clock.now,
        "Expired",
    )
    assert await engine.find_by_keys(snapshot(idempotency_key="key")) is None
    assert await upkeep.expire() == 0


async def test_a_delayed_run_expires_its_time_to_live_after_it_was_due(
    engine: PostgresRunEngine, upkeep: Upkeep, clock: Clock
) -> None:
    run_id = await create(engine, ttl_s=60, delayed_until=START + MINUTE)

    clock.turn(seconds=119)
    await upkeep.advance()
    assert (await read(engine, run_id)).status is RunStatus.QUEUED
    clock.turn(seconds=1)
    await upkeep.advance()
    assert (await read(engine, run_id)).status is RunStatus.EXPIRED


async def test_a_run_that_is_due_and_over_at_once_does_not_start(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, clock: Clock
) -> None:
    run_id = await create(engine, ttl_s=60, delayed_until=START + MINUTE)
    clock.turn(hours=1)

    await upkeep.advance()

    assert (await read(engine, run_id)).status is RunStatus.EXPIRED
    assert await jobs(database) == []


@pytest.mark.parametrize("ttl_s", [None, 60])
@pytest.mark.parametrize("comes_first", ["the new delay", "the cancellation"])
async def test_a_run_that_was_carried_its_cancellation_and_a_new_delay_is_neither_queued_nor_expired(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, clock: Clock, *, comes_first: str, ttl_s: int | None
) -> None:
    run_id = await create(engine, delayed_until=START + MINUTE, ttl_s=ttl_s, idempotency_key="key")
    moves: list[Patch] = [Reschedule(START + 2 * MINUTE, START), Cancel(START)]
    await engine.carry_over(ENV, run_id, moves if comes_first == "the new delay" else moves[::-1])

    assert await rows(database, "SELECT due_at, expires_at FROM runs") == [{"due_at": None, "expires_at": None}]
    clock.turn(hours=1)
    await upkeep.advance()

    assert (await read(engine, run_id)).status is RunStatus.CANCELED
    assert await jobs(database) == []


@pytest.mark.parametrize("status", sorted({*FINAL_STATUSES, RunStatus.EXECUTING}))
async def test_what_a_run_that_waits_no_more_has_left_of_its_moments_brings_nothing(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, clock: Clock, status: RunStatus
) -> None:
    run_id = await create(engine, delayed_until=START + MINUTE, ttl_s=60)
    async with database.statement() as connection:
        await connection.execute(text("UPDATE runs SET status = :status"), {"status": status})
    clock.turn(hours=1)

    assert (await upkeep.expire(), await upkeep.queue_due()) == (0, 0)

    assert (await read(engine, run_id)).status is status
    assert await jobs(database) == []


async def test_runs_that_have_started_or_ended_do_not_expire(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, clock: Clock
) -> None:
    executed, cancelled = await create(engine, ttl_s=60), await create(engine, ttl_s=60)
    await Executor(database, {"echo": repr}, clock=clock).execute(executed, job_id=1)
    await engine.cancel_run(ENV, cancelled, clock.now)
    clock.turn(hours=1)

    assert await upkeep.expire() == 0


async def arrange_job(database: Database, run_id: str, *, worker: int | None) -> None:
    await execute(database, "UPDATE procrastinate_jobs SET status = 'doing', worker_id = :worker", worker=worker)


@pytest.mark.parametrize(("silent_s", "rescued"), [(5, False), (60, True), (None, True)])
async def test_jobs_of_workers_that_are_gone_or_silent_go_back(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database, silent_s: int | None, rescued: bool
) -> None:
    run_id = await create(engine)
    worker = None
    if silent_s is not None:
        (row,) = await rows(
            database,
            "INSERT INTO procrastinate_workers (last_heartbeat) VALUES (now() - make_interval(secs => :s)) RETURNING id",
            s=silent_s,
        )
        worker = row["id"]
    await arrange_job(database, run_id, worker=worker)

    back = await upkeep.rescue(silent_s=15)

    (job,) = await rows(database, "SELECT id, status, attempts FROM procrastinate_jobs")
    assert back == ([job["id"]] if rescued else [])
    assert (job["status"], job["attempts"]) == (("todo", 1) if rescued else ("doing", 0))


async def test_a_stalled_job_goes_back_once_however_many_workers_look(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database
) -> None:
    await arrange_job(database, await create(engine), worker=None)

    found = await asyncio.gather(*(upkeep.rescue(silent_s=15) for _ in range(5)))

    assert sum(len(ids) for ids in found) == 1
    assert await rows(database, "SELECT attempts FROM procrastinate_jobs") == [{"attempts": 1}]


async def test_sweeping_takes_away_what_nothing_will_read(
    engine: PostgresRunEngine, upkeep: Upkeep, database: Database
) -> None:
    kept = [await create(engine), await create(engine)]
    swept = [await create(engine) for _ in range(3)]
    for run_id, status in zip([*kept, *swept], ["todo", "doing", "failed", "cancelled", "aborted"], strict=True):
        await execute(
            database,
            "UPDATE procrastinate_jobs SET status = CAST(:status AS procrastinate_job_status) WHERE args ->> 'run_id' = :run_id",
            run_id=run_id,
            status=status,
        )

    await upkeep.sweep()

    assert await jobs(database) == kept
