"""The task catalog: recorded by workers, remembered by whoever triggers."""

from __future__ import annotations

import asyncio

import pytest

from mollifier.errors import EngineUnavailableError
from mollifier.postgres.catalog import PostgresTaskCatalog, record_tasks
from mollifier.postgres.database import Database
from tests.postgres.support import Outage, Statements, cancelled_everywhere, rows


class Seconds:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_recorded_task_is_known_and_another_is_not(database: Database) -> None:
    await record_tasks(database, {"billing/refund ✓": "billing", "echo": "demo"})
    catalog = PostgresTaskCatalog(database)

    assert await catalog.knows("billing/refund ✓")
    assert await catalog.knows("echo")
    assert not await catalog.knows("other")


async def test_recording_again_keeps_one_row_and_the_latest_module(database: Database) -> None:
    await record_tasks(database, {"echo": "old"})
    await asyncio.gather(*(record_tasks(database, {"echo": "new", "a": "m"}) for _ in range(5)))
    await record_tasks(database, {})

    assert await rows(database, "SELECT id, module FROM tasks ORDER BY id") == [
        {"id": "a", "module": "m"},
        {"id": "echo", "module": "new"},
    ]


async def test_recording_that_is_cancelled_ends_cancelled_and_costs_nobody_else_a_connection(database_url: str) -> None:
    modules = {"echo": "demo", "other": "demo"}
    async with Database(database_url, pool_size=1) as database:
        await database.ping()

        async for _ in cancelled_everywhere(lambda: record_tasks(database, modules)):
            await database.ping()

        assert [row["id"] for row in await rows(database, "SELECT id FROM tasks ORDER BY id")] == ["echo", "other"]


async def test_a_known_task_costs_no_question_and_an_unknown_one_a_question_per_second(database: Database) -> None:
    seconds = Seconds()
    await record_tasks(database, {"echo": "demo"})
    catalog = PostgresTaskCatalog(database, clock=seconds)
    statements = Statements(database)

    answers = await asyncio.gather(*(catalog.knows(task_id) for task_id in ["echo", "unknown"] * 50))
    assert answers == [True, False] * 50
    assert len(statements.asked) == 1
    seconds.now += 1
    await asyncio.gather(*(catalog.knows("unknown") for _ in range(50)))
    assert len(statements.asked) == 2
    seconds.now += 100
    assert await catalog.knows("echo")
    assert len(statements.asked) == 2


async def test_a_task_recorded_later_is_known_within_a_second(database: Database) -> None:
    seconds = Seconds()
    catalog = PostgresTaskCatalog(database, clock=seconds)
    assert not await catalog.knows("echo")

    await record_tasks(database, {"echo": "demo"})
    seconds.now += 1

    assert await catalog.knows("echo")


async def test_known_tasks_stay_known_through_an_outage(database: Database, outage: Outage) -> None:
    seconds = Seconds()
    await record_tasks(database, {"echo": "demo"})
    catalog = PostgresTaskCatalog(database, clock=seconds)
    await catalog.knows("echo")
    await outage.begin()
    seconds.now += 10

    assert await catalog.knows("echo")
    with pytest.raises(EngineUnavailableError):
        await catalog.knows("unknown")
