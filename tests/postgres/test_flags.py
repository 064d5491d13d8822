"""Global flags: rows, and the copy in memory that the trigger path reads."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mollifier.errors import EngineUnavailableError, InvalidRequestError
from mollifier.postgres.database import Database
from mollifier.postgres.flags import GlobalFlags
from tests.postgres.support import Outage, cancelled_everywhere, until


@pytest.fixture
def flags(database: Database) -> GlobalFlags:
    return GlobalFlags(database)


async def test_flags_are_set_replaced_and_unset_by_name(flags: GlobalFlags) -> None:
    assert await flags.set({"b": 1, "a": {"deep": [None]}}) == {"a": {"deep": [None]}, "b": 1}
    assert await flags.set({"b": None}) == {"a": {"deep": [None]}, "b": None}
    assert await flags.unset("a") == {"b": None}
    assert await flags.unset("a") == {"b": None}
    assert await flags.set({}) == {"b": None}


async def test_setting_flags_that_is_cancelled_ends_cancelled_and_costs_nobody_else_a_connection(
    database_url: str,
) -> None:
    async with Database(database_url, pool_size=1) as database:
        flags = GlobalFlags(database)
        await database.ping()

        async for _ in cancelled_everywhere(lambda: flags.set({"a": 1, "b": 2})):
            await database.ping()

        assert flags.current == {"a": 1, "b": 2}


async def test_a_name_that_cannot_be_stored_is_refused_and_nothing_is_set(flags: GlobalFlags) -> None:
    with pytest.raises(InvalidRequestError):
        await flags.set({"good": 1, "nul\x00": 1})

    assert await flags.refresh() == {}


async def test_another_process_sees_a_change_when_it_refreshes(flags: GlobalFlags, database: Database) -> None:
    elsewhere = GlobalFlags(database)
    await flags.set({"mollifierEnabled": True})

    assert elsewhere.current == {}
    await elsewhere.refresh()
    assert elsewhere.current == {"mollifierEnabled": True}


async def test_flags_stay_as_last_read_through_an_outage_that_is_logged_once(
    flags: GlobalFlags, database: Database, outage: Outage, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def has_failed() -> bool:
        return any(record.message == "mollifier.failing" for record in caplog.records)

    async def is_new() -> bool:
        return flags.current == {"a": 2}

    caplog.set_level(logging.INFO)
    await flags.set({"a": 1})
    await outage.begin()
    with pytest.raises(EngineUnavailableError):
        await flags.refresh()
    refreshing = asyncio.create_task(flags.keep_refreshing(every_s=0.01))
    await until(has_failed)
    assert flags.current == {"a": 1}
    await asyncio.sleep(0.1)
    await outage.end()
    async with Database(database_url) as elsewhere:
        await GlobalFlags(elsewhere).set({"a": 2})

    await until(is_new)
    refreshing.cancel()
    assert [r.message for r in caplog.records if r.message.startswith("mollifier.")] == [
        "mollifier.failing",
        "mollifier.recovered",
    ]
