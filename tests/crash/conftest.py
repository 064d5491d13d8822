"""Servers whose data outlive them, one pair per test process, emptied for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mollifier.embedded import EmbeddedStack, Stack, create_database
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import migrate
from tests.conftest import TEMPLATE, passing_database, skipping_without_wheels
from tests.crash.ground import Ground, prepare


@pytest.fixture(scope="session")
def durable_stack() -> Iterator[Stack]:
    """A Valkey and a Postgres that sync what they answer."""
    with skipping_without_wheels(), EmbeddedStack(appendfsync="always") as stack:
        url = urlsplit(stack.database_url)._replace(path=f"/{TEMPLATE}").geturl()
        create_database(url)
        migrate(url)
        yield stack


@pytest.fixture
async def ground(durable_stack: Stack, tmp_path: Path) -> AsyncIterator[Ground]:
    for url in passing_database(durable_stack.database_url, TEMPLATE):
        async with Database(url) as database:
            ground = await prepare(durable_stack, tmp_path, url, database)
            await ground.empty()
            yield ground
