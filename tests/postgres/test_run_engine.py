"""What is particular to the run engine on Postgres: rows, jobs, round trips, and what the database refuses."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import RowMapping, event, text

from mollifier.engine import Created, Creation, Existing
from mollifier.errors import EngineUnavailableError, InvalidRequestError
from mollifier.model import Debounce, RunFilter, RunStatus
from mollifier.postgres.bytea import ByteaArray
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.slots import slot
from tests.postgres.support import ENV, START, Clock, Statements, create, execute, jobs, read, rows, snapshot, until

HOUR = timedelta(hours=1)


async def test_every_queued_run_has_one_job_that_carries_its_id_alone(
    engine: PostgresRunEngine, database: Database
) -> None:
    first = snapshot(priority=5, queue="mail")
    second = snapshot(created_at=START + timedelta(seconds=1))

    await engine.create_runs([second, first, second])

    found = await rows(
        database, "SELECT args, queue_name, priority, task_name, scheduled_at FROM procrastinate_jobs ORDER BY id"
    )
    shared = {"task_name": "mollifier.execute", "scheduled_at": None}
    assert found == [
        {"args": {"run_id": first.run_id}, "queue_name": "mail", "priority": 5, **shared},
        {"args": {"run_id": second.run_id}, "queue_name": "default", "priority": 0, **shared},
    ]


@pytest.mark.parametrize("queue", ["", "q" * 40, "q" * 41, "\N{SNOWMAN}" * 13, "\N{SNOWMAN}" * 14, "q" * 2000])
async def test_a_queue_of_any_name_has_jobs(engine: PostgresRunEngine, database: Database, queue: str) -> None:
    run_id = await create(engine, queue=queue)

    (row,) = await rows(database, "SELECT queue_name FROM procrastinate_jobs")
    assert (row["queue_name"] == queue) == (len(queue.encode()) <= 40)
    assert (await read(engine, run_id)).snapshot.queue == queue


async def test_delayed_and_expired_runs_have_no_job(
    engine: PostgresRunEngine, database: Database, clock: Clock
) -> None:
    clock.turn(minutes=1)

    await engine.create_runs([snapshot(delayed_until=START + HOUR), snapshot(ttl_s=1)])

    assert await jobs(database) == []


async def test_only_inserted_runs_get_a_job(engine: PostgresRunEngine, database: Database) -> None:
    first = snapshot(idempotency_key="key")
    await engine.create_runs([first])

    await engine.create_runs([first])
    await engine.create_runs([snapshot(idempotency_key="key")])

    assert await jobs(database) == [first.run_id]


async def test_a_run_that_is_created_while_a_cancellation_looks_for_it_is_cancelled(
    engine: PostgresRunEngine, database: Database, clock: Clock
) -> None:
    late = snapshot()

    class Overtaken(PostgresRunEngine):
        """Sees the run only when it looks for the second time."""

        async def _read(self, *looking: Any, **how: Any) -> RowMapping | None:
            await engine.create_runs([late])
            return await super()._read(*looking, **how)

    run = await Overtaken(database, clock=clock).cancel_run(ENV, late.run_id, START)

    assert run is not None
    assert (run.status, (await read(engine, late.run_id)).status) == (RunStatus.CANCELED, RunStatus.CANCELED)


@pytest.mark.parametrize("number", [1, 3])
async def test_a_run_whose_job_cannot_be_made_is_not_made_either(
    engine: PostgresRunEngine, database: Database, number: int
) -> None:
    await execute(database, "ALTER TABLE procrastinate_jobs ADD CONSTRAINT no CHECK (queue_name <> 'refused')")

    with pytest.raises(Exception, match="no"):
        await engine.create_runs([snapshot(), snapshot(), snapshot(queue="refused")][-number:])

    assert await rows(database, "SELECT id FROM runs") == []
    assert await jobs(database) == []


async def test_a_held_run_whose_creation_was_given_up_does_not_appear_later(
    database: Database, database_url: str
) -> None:
    """Its connection is cut while the insert waits for a lock, which the server does not notice before it has inserted."""
    connections: list[Any] = []
    async with Database(database_url) as cut:
        pool = cut._engine.sync_engine  # pyright: ignore[reportPrivateUsage] - nothing else has the connections
        event.listen(pool, "checkout", lambda connection, *_: connections.append(connection))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType, reportUnknownMemberType]
        async with database.transaction() as locking:
            await locking.execute(text("LOCK TABLE runs IN SHARE MODE"))
            creation = Creation(snapshot=snapshot())
            creating = asyncio.create_task(PostgresRunEngine(cut).create_held_runs([creation]))
            await until(lambda: is_any(database, "wait_event_type = 'Lock'"))
            with socket.socket(fileno=os.dup(connections[-1].driver_connection.fileno())) as wire:
                wire.shutdown(socket.SHUT_RDWR)
            with pytest.raises(EngineUnavailableError):
                await creating
            assert await is_any(database, "wait_event_type = 'Lock'")

    async def is_over() -> bool:
        return not await is_any(database, "state <> 'idle'")

    await until(is_over)
    assert await rows(database, "SELECT id FROM runs") == []


async def is_any(database: Database, condition: str) -> bool:
    """Whether any other connection to this database is in this state."""
    query = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND "
    return bool(await rows(database, query + condition))


async def test_a_batch_of_which_one_cannot_be_stored_creates_nothing(
    engine: PostgresRunEngine, database: Database
) -> None:
    there = await create(engine, idempotency_key="key")

    with pytest.raises(InvalidRequestError):
        await engine.create_runs([snapshot(), snapshot(idempotency_key="key"), snapshot(machine="nul\x00")])

    assert [row["id"] for row in await rows(database, "SELECT id FROM runs")] == [there]


@pytest.mark.parametrize(
    "field",
    [
        {"machine": "\x00"},
        {"machine": "\ud800"},
        {"priority": 2**31},
        {"batch_id": random.Random(1).randbytes(9000).hex()},
        {"tags": ("\x00",)},
    ],
)
async def test_values_that_postgres_cannot_hold_are_the_callers_fault(
    engine: PostgresRunEngine, field: dict[str, object]
) -> None:
    with pytest.raises(InvalidRequestError):
        await engine.create_runs([snapshot(**field)])


@pytest.mark.parametrize("run_id", ["\x00", "\ud800"])
async def test_reading_by_an_id_that_postgres_cannot_hold_is_the_callers_fault(
    engine: PostgresRunEngine, run_id: str
) -> None:
    with pytest.raises(InvalidRequestError):
        await engine.get_run(ENV, run_id)


async def test_a_trigger_without_a_race_costs_one_statement(engine: PostgresRunEngine, database: Database) -> None:
    statements = Statements(database)

    await create(engine, idempotency_key="key", request_key="request")

    assert len(statements.asked) == 1


async def test_batches_cost_the_same_whatever_their_size(engine: PostgresRunEngine, database: Database) -> None:
    statements = Statements(database)

    await engine.create_runs([snapshot() for _ in range(100)])

    assert len(statements.asked) == 1


async def test_held_runs_cost_one_statement_however_many_they_are(
    engine: PostgresRunEngine, database: Database
) -> None:
    statements = Statements(database)

    await engine.create_held_runs([Creation(snapshot=snapshot()) for _ in range(100)])

    assert len(statements.asked) == 1


async def test_of_held_runs_each_is_answered_for_whatever_stands_in_its_way(
    engine: PostgresRunEngine, database: Database
) -> None:
    bound = await create(engine, idempotency_key="bound")
    overdue = snapshot(idempotency_key="overdue", idempotency_expires_at=START + timedelta(seconds=1))
    await engine.create_runs([overdue])
    free = snapshot()
    late = snapshot(idempotency_key="overdue", created_at=START + timedelta(seconds=2))
    held = [snapshot(idempotency_key="bound"), free, snapshot(idempotency_key="new"), free, late]

    outcomes = await engine.create_held_runs([Creation(snapshot=each) for each in held])

    assert outcomes == [
        Existing(bound, by="idempotency_key"),
        Created(free.run_id),
        Created(held[2].run_id),
        Existing(free.run_id, by="run_id"),
        Created(late.run_id),
    ]
    assert await jobs(database) == [bound, overdue.run_id, free.run_id, held[2].run_id, late.run_id]


async def test_no_held_runs_cost_nothing(engine: PostgresRunEngine, database: Database) -> None:
    statements = Statements(database)

    assert await engine.create_held_runs([]) == []
    assert await engine.create_runs([]) == []
    assert statements.asked == []


@pytest.mark.parametrize("array", [(), (b"",), (None,), (b'\x00\\"{},NULL', None, b"x" * 3_000_000, b"\xff", b"")])
async def test_an_array_of_bytes_arrives_as_it_was_sent(database: Database, array: tuple[bytes | None, ...]) -> None:
    async with database.statement() as connection:
        arrived = await connection.execute(text("SELECT CAST(:sent AS bytea[])"), {"sent": ByteaArray(array)})

    assert arrived.scalar_one() == list(array)


async def test_reading_and_listing_cost_one_statement_each(engine: PostgresRunEngine, database: Database) -> None:
    run_id = await create(engine, idempotency_key="key")
    statements = Statements(database)

    await engine.get_run(ENV, run_id)
    await engine.list_runs(ENV, RunFilter())
    await engine.find_by_keys(snapshot(idempotency_key="key"))
    await engine.find_by_keys(snapshot())

    assert len(statements.asked) == 3


async def test_rescheduling_moves_the_expiry_along(engine: PostgresRunEngine, database: Database) -> None:
    run_id = await create(engine, delayed_until=START + HOUR, ttl_s=60)

    await engine.reschedule_run(ENV, run_id, 2 * HOUR, START)

    (row,) = await rows(database, "SELECT expires_at, due_at FROM runs")
    assert row == {"expires_at": START + 2 * HOUR + timedelta(seconds=60), "due_at": START + 2 * HOUR}


async def test_debouncing_moves_the_expiry_along(engine: PostgresRunEngine, database: Database) -> None:
    debounce = Debounce(key="key", delay=HOUR)
    await create(engine, delayed_until=START + HOUR, debounce=debounce, ttl_s=60)
    pushing = snapshot(
        created_at=START + timedelta(minutes=1), delayed_until=START + HOUR + timedelta(minutes=1), debounce=debounce
    )
    await execute(database, "UPDATE runs SET debounce_max_delay = interval '1 day'")

    await engine.create_runs([pushing])

    (row,) = await rows(database, "SELECT expires_at, due_at FROM runs")
    assert row == {"expires_at": START + HOUR + timedelta(minutes=2), "due_at": START + HOUR + timedelta(minutes=1)}


async def test_cancelling_takes_a_run_out_of_upkeeps_sight(engine: PostgresRunEngine, database: Database) -> None:
    run_id = await create(engine, delayed_until=START + HOUR, ttl_s=60)

    await engine.cancel_run(ENV, run_id, START)

    assert await rows(database, "SELECT due_at, expires_at FROM runs") == [{"due_at": None, "expires_at": None}]


async def test_a_time_to_live_beyond_the_calendar_never_ends(engine: PostgresRunEngine) -> None:
    run_id = await create(engine, ttl_s=2**60)

    assert (await read(engine, run_id)).status is RunStatus.QUEUED


async def test_a_database_without_the_schema_says_what_to_run(empty_database_url: str) -> None:
    async with Database(empty_database_url) as database:
        with pytest.raises(EngineUnavailableError, match="mollifier migrate"):
            await PostgresRunEngine(database).create_runs([snapshot()])


async def test_hostile_keys_of_two_tasks_never_share_a_slot() -> None:
    assert slot("a", "bc") != slot("ab", "c")
    assert slot("a", "b") != slot("ab")
    assert slot("", "ab") != slot("ab", "")


async def test_the_engines_own_clock_decides_what_is_due_by_default(database: Database) -> None:
    engine = PostgresRunEngine(database)
    snap = snapshot(delayed_until=START)

    assert await engine.create_runs([snap]) == [Created(snap.run_id)]
    assert (await read(engine, snap.run_id)).status is RunStatus.QUEUED
