"""The worker's client of procrastinate: what it does with answers that never arrive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import procrastinate
import psycopg
import psycopg_pool
import pytest
from procrastinate import exceptions, jobs
from psycopg.rows import TupleRow

from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.job_manager import LastingJobManager
from tests.postgres.support import create, rows


class Forgetful(procrastinate.PsycopgConnector):
    """A connector that may do what it is asked and lose the answer."""

    loses = False

    async def execute_query_one_async(self, query: LiteralString, **arguments: Any) -> dict[str, Any]:
        answer = await super().execute_query_one_async(query, **arguments)
        if self.loses:
            raise exceptions.ConnectorException from psycopg.OperationalError("the connection is lost")
        return answer


class Manager(LastingJobManager):
    """A manager that does not wait between its attempts."""

    @staticmethod
    async def _sleep(_: float) -> None:
        pass


@pytest.fixture
async def connector(database: Database) -> AsyncIterator[Forgetful]:
    pool = psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[TupleRow]](
        database.conninfo, min_size=1, max_size=2, open=False
    )
    async with pool:
        connector = Forgetful()
        await connector.open_async(pool)
        yield connector


@pytest.fixture
def manager(connector: Forgetful) -> Manager:
    return Manager(connector)


async def statuses(database: Database) -> dict[str, str]:
    found = await rows(database, "SELECT args, status FROM procrastinate_jobs")
    return {row["args"]["run_id"]: row["status"] for row in found}


async def fetch(manager: Manager, worker_id: int) -> str | None:
    job = await manager.fetch_job(None, worker_id)
    return None if job is None else job.task_kwargs["run_id"]  # pyright: ignore[reportReturnType] - JSON


async def test_a_job_whose_fetch_was_never_answered_is_fetched_again(
    manager: Manager, connector: Forgetful, database: Database, engine: PostgresRunEngine
) -> None:
    worker_id = await manager.register_worker()
    run_id = await create(engine)
    connector.loses = True
    assert await fetch(manager, worker_id) is None
    assert await statuses(database) == {run_id: "doing"}

    connector.loses = False
    assert await fetch(manager, worker_id) == run_id


async def test_what_a_worker_has_in_hand_stays_its_own_whatever_answers_are_lost(
    manager: Manager, connector: Forgetful, database: Database, engine: PostgresRunEngine
) -> None:
    worker_id = await manager.register_worker()
    other_id = await manager.register_worker()
    own, others, lost = [await create(engine) for _ in range(3)]
    assert await fetch(manager, worker_id) == own
    assert await fetch(Manager(connector), other_id) == others
    connector.loses = True
    assert await fetch(manager, worker_id) is None

    connector.loses = False
    assert await fetch(manager, worker_id) == lost
    assert await fetch(manager, worker_id) is None
    assert await statuses(database) == {own: "doing", others: "doing", lost: "doing"}


async def test_a_settled_job_is_no_longer_in_hand(
    manager: Manager, connector: Forgetful, database: Database, engine: PostgresRunEngine
) -> None:
    worker_id = await manager.register_worker()
    run_id = await create(engine)
    job = await manager.fetch_job(None, worker_id)
    assert job is not None
    await manager.retry_job(job)
    connector.loses = True
    assert await fetch(manager, worker_id) is None

    connector.loses = False
    again = await manager.fetch_job(None, worker_id)
    assert again is not None
    await manager.finish_job(again, jobs.Status.SUCCEEDED, delete_job=True)
    assert await statuses(database) == {}
    assert again.task_kwargs["run_id"] == run_id
