"""Fixtures of the Postgres tests: a database of the test's own, and what stands on it."""

from collections.abc import AsyncIterator

import pytest

from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.tenants import Tenants
from tests.postgres.support import Clock, Outage


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database(database_url) as database:
        yield database


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(database: Database, clock: Clock) -> PostgresRunEngine:
    return PostgresRunEngine(database, clock=clock)


@pytest.fixture
def tenants(database: Database) -> Tenants:
    return Tenants(database)


@pytest.fixture
async def outage(database_url: str) -> AsyncIterator[Outage]:
    """An outage for the test to begin; it is over when the test is."""
    outage = Outage(database_url)
    yield outage
    await outage.end()
