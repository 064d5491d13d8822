"""Held triggers that are to be confirmed: unconfirmed, they are created directly, and the entry that is there too makes no second run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from mollifier import ids
from mollifier.errors import EngineUnavailableError
from mollifier.model import RunFilter, RunStatus
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.engine import utc_now
from mollifier.settings import Settings
from tests.core.support import until
from tests.divert.conftest import ENVIRONMENT, House
from tests.postgres.support import Outage
from tests.servers import Valkey, valkey


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Valkey]:
    """A server without an append-only file: it never confirms."""
    with valkey("--appendonly", "no") as server:
        yield server


def confirming(server: Valkey, database_url: str, accept_confirm_timeout_ms: int = 2_000) -> Settings:
    """What has every accept on this server confirmed."""
    return Settings(
        enabled=True,
        divert=True,
        redis_url=server.url,
        database_url=database_url,
        partitions=4,
        gate_deadline_ms=10_000,
        accept_deadline_ms=10_000,
        accept_confirm="aof",
        accept_confirm_timeout_ms=accept_confirm_timeout_ms,
    )


async def is_held(house: House) -> bool:
    return len(await house.buffer.list_entries(ENVIRONMENT.org_id, ENVIRONMENT.id)) > 0


@pytest.fixture
async def house(forgetful: Valkey, database_url: str) -> AsyncIterator[House]:
    settings = confirming(forgetful, database_url)
    async with Database(database_url, deadline_s=5) as database:
        await record_tasks(database, {"echo": "mollifier.demo_tasks"})
        house = House(settings, database)
        try:
            await house.trip()
            yield house
        finally:
            await house.mollifier.aclose()


def said(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [getattr(record, "fields", {})["run_id"] for record in caplog.records if record.message == name]


async def test_an_unconfirmed_trigger_is_created_directly_and_its_entry_makes_no_second_run(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run_id = await house.trigger()

        created = await house.created(run_id)
        assert created is not None
        assert await house.buffer.get_entry(ENVIRONMENT.org_id, run_id) is not None
        assert [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs] == [run_id]

        await house.drain()

    assert await house.created(run_id) == created
    assert [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs] == [run_id]
    # The books agree: what went into the buffer, and came out of it, was this one entry.
    assert said(caplog, "mollifier.buffered") == said(caplog, "mollifier.drained") == [run_id]


async def test_where_nothing_is_confirmed_triggers_soon_do_without_the_buffer(house: House) -> None:
    made = [await house.trigger() for _ in range(8)]

    held = await house.buffer.get_entries(ENVIRONMENT.org_id, made)
    assert [entry is not None for entry in held] == [True] * 5 + [False] * 3
    assert None not in [await house.created(run_id) for run_id in made]


async def test_a_change_of_the_run_meanwhile_is_not_undone_by_its_entry(house: House) -> None:
    run_id = await house.trigger()
    await house.runs.cancel(ENVIRONMENT, run_id)
    await house.drain()
    created = await house.created(run_id)
    assert created is not None
    assert created.status is RunStatus.CANCELED


async def test_a_key_of_an_unconfirmed_trigger_belongs_to_its_run(house: House) -> None:
    run_id, cached = await house.trigger_all(idempotency_key="key")
    again = await house.trigger_all(idempotency_key="key")
    await house.drain()
    later = await house.trigger_all(idempotency_key="key")
    assert (cached, again, later) == (False, (run_id, True), (run_id, True))


async def test_whoever_has_the_key_of_an_accept_that_still_waits_is_answered_no_sooner_than_its_run_is_safe(
    database_url: str,
) -> None:
    with valkey("--appendonly", "yes", "--appendfsync", "no") as server:
        async with Database(database_url, deadline_s=5) as database:
            await record_tasks(database, {"echo": "mollifier.demo_tasks"})
            house = House(confirming(server, database_url, accept_confirm_timeout_ms=4_000), database)
            try:
                await house.trip()
                first = asyncio.create_task(house.trigger_all(idempotency_key="key"))
                await until(lambda: is_held(house))

                run_id, cached = await house.trigger_all(idempotency_key="key")

                assert cached
                assert await house.created(run_id) is not None
                assert await first == (run_id, False)
            finally:
                await house.mollifier.aclose()


@pytest.mark.parametrize("again", [{"idempotency_key": "key"}, {"request_key": "key"}, {}], ids=str)
async def test_a_held_run_that_cannot_be_confirmed_to_whoever_it_answers_is_created_with_its_changes(
    house: House, again: dict[str, Any]
) -> None:
    confirmed, house.settings = house.settings, replace(house.settings, accept_confirm="none")
    run_id = ids.run_id(utc_now())
    assert await house.trigger(run_id=run_id, **again) == run_id
    await house.runs.add_tags(ENVIRONMENT, run_id, ["tagged"])
    assert await house.created(run_id) is None

    house.settings = confirmed
    other_id = ids.run_id(utc_now()) if again else run_id
    assert await house.trigger(run_id=other_id, **again) == run_id

    created = await house.created(run_id)
    assert created is not None
    assert created.snapshot.tags == ("tagged",)
    await house.drain()
    assert [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs] == [run_id]
    assert await house.created(run_id) == created


async def test_a_held_run_that_can_neither_be_confirmed_nor_created_is_nobodys_answer(
    house: House, database_url: str
) -> None:
    confirmed, house.settings = house.settings, replace(house.settings, accept_confirm="none")
    keyed, plain = await house.trigger(idempotency_key="key"), await house.trigger()
    house.settings = confirmed
    outage = Outage(database_url)
    await outage.begin()
    try:
        with pytest.raises(EngineUnavailableError):
            await house.trigger(idempotency_key="key")
        with pytest.raises(EngineUnavailableError):
            await house.trigger(run_id=plain)
    finally:
        await outage.end()
    assert await house.trigger(idempotency_key="key") == keyed
    await house.drain()
    assert None not in [await house.created(run_id) for run_id in (keyed, plain)]


async def test_creating_what_cannot_be_confirmed_is_given_up_in_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    run_id = await house.trigger(idempotency_key="k")
    monkeypatch.setattr("mollifier.admission.SAFE_DEADLINE_MS", 50)
    monkeypatch.setattr(house.runs, "make_safe", hang)

    with pytest.raises(EngineUnavailableError, match="within 50 ms"):
        await house.trigger(idempotency_key="k")

    monkeypatch.undo()
    assert await house.trigger_all(idempotency_key="k") == (run_id, True)
    await house.drain()


async def test_a_dead_letter_that_cannot_be_confirmed_is_nobodys_answer(house: House) -> None:
    confirmed, house.settings = house.settings, replace(house.settings, accept_confirm="none")
    await house.trigger(request_key="key")
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await house.buffer.fail(entry, "broken") == "held"
    house.settings = confirmed
    with pytest.raises(EngineUnavailableError, match="neither be confirmed"):
        await house.trigger(request_key="key")
    await house.buffer.discard_many([entry.run_id])


async def test_only_what_the_engine_has_in_the_end_was_made_safe(house: House) -> None:
    house.settings = replace(house.settings, accept_confirm="none")
    run_id = await house.trigger()
    assert await house.runs.make_safe(ENVIRONMENT.org_id, ENVIRONMENT.id, [run_id, "run_gone"]) == {run_id}
    assert await house.created(run_id) is not None
    await house.drain()


async def test_the_run_of_an_unconfirmed_entry_that_was_drained_first_is_the_answer(house: House) -> None:
    first = await house.trigger()
    drainer = house.mollifier.drainer()
    drainer.start()
    try:
        run_ids = [await house.trigger() for _ in range(20)]
    finally:
        await drainer.stop()
    await house.drain()
    runs = (await house.runs.list(ENVIRONMENT, RunFilter())).runs
    assert sorted(run.id for run in runs) == sorted([first, *run_ids])


async def test_unconfirmed_and_without_a_database_the_trigger_fails(house: House, database_url: str) -> None:
    await house.trigger()
    outage = Outage(database_url)
    await outage.begin()
    try:
        for _ in range(2):
            with pytest.raises(EngineUnavailableError):
                await house.trigger(idempotency_key="key")
    finally:
        await outage.end()
    # Whoever tries again with the same key gets that run: it is in the buffer all the same.
    run_id, cached = await house.trigger_all(idempotency_key="key")
    await house.drain()
    assert await house.created(run_id) is not None
    assert cached


async def test_without_confirmation_the_same_trigger_is_held(house: House) -> None:
    house.settings = replace(house.settings, accept_confirm="none")
    run_id = await house.trigger()
    assert await house.created(run_id) is None
    await house.drain()
    assert await house.created(run_id) is not None
