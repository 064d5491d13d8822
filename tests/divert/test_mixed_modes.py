"""Replicas in different steps of the rollout, and steps taken back while something is held: an accepted trigger is one run all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from mollifier.batches import BatchAdded
from mollifier.embedded import Stack
from mollifier.errors import EngineUnavailableError
from mollifier.facade import Mollifier
from mollifier.model import BatchRequest, EntryKind, RunFilter, RunStatus
from mollifier.postgres.catalog import PostgresTaskCatalog
from tests.core.support import state_of
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


def diverting(house: House, *, is_on: bool) -> None:
    house.settings = replace(house.settings, divert=is_on)


@asynccontextmanager
async def beside(house: House, *, divert: bool) -> AsyncGenerator[Mollifier]:
    """Run another replica on the same servers."""
    settings = replace(house.settings, divert=divert)
    mollifier = Mollifier(settings, engine=house.engine, tasks=PostgresTaskCatalog(house.database))
    try:
        yield mollifier
    finally:
        await mollifier.aclose()


async def send(house: House) -> BatchAdded:
    """Send a batch of one item, the same one each time."""
    return await house.mollifier.batches.trigger(
        ENVIRONMENT, BatchRequest(run_count=1, request_key="rk"), [house.request()]
    )


async def copy_an_item_whose_run_cannot_be_created(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an audit copy of the batch's item behind, and no run."""

    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    diverting(house, is_on=False)
    with monkeypatch.context() as broken:
        broken.setattr(house.engine, "create_runs", fail)
        with pytest.raises(EngineUnavailableError):
            await send(house)
    diverting(house, is_on=True)


@pytest.mark.parametrize("becomes", ["queued", "taken", "settled", "given up"])
async def test_a_batch_item_that_meets_its_own_audit_copy_is_held_and_becomes_its_run(
    holding: House, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    await copy_an_item_whose_run_cannot_be_created(holding, monkeypatch)
    copy = await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id) if becomes != "queued" else None
    if copy is not None and becomes == "settled":
        assert await holding.buffer.ack(copy) == "held"
    elif copy is not None and becomes == "given up":
        assert await holding.buffer.fail(copy, "error") == "held"

    (run_id,) = (await send(holding)).batch.runs.values()

    held = await holding.runs.get(ENVIRONMENT, run_id)
    assert held is not None
    assert held.status is RunStatus.QUEUED
    if copy is not None:
        # Whoever had the copy has nothing to do with the entry.
        assert await holding.buffer.ack(copy) == "stale"
    await holding.drain()
    assert await holding.created(run_id) == held


async def test_an_audit_copy_of_a_run_that_is_held_changes_nothing(holding: House) -> None:
    (run_id,) = (await send(holding)).batch.runs.values()
    before = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    diverting(holding, is_on=False)

    await holding.mollifier.triggers.trigger(ENVIRONMENT, holding.request(run_id=run_id))

    entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry == before
    assert entry is not None
    assert entry.kind is EntryKind.HELD
    await holding.drain()
    assert await holding.created(run_id) is not None


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "cached"), [({"idempotency_key": "k"}, True), ({"request_key": "r"}, False)])
async def test_a_key_of_a_held_run_answers_where_nothing_is_diverted_any_more(
    holding: House, keys: dict[str, Any], cached: bool
) -> None:
    run_id = await holding.trigger(**keys)
    diverting(holding, is_on=False)

    assert await holding.trigger_all(**keys) == (run_id, cached)
    await holding.drain()
    assert await holding.trigger_all(**keys) == (run_id, cached)
    run = await holding.created(run_id)
    assert run is not None
    assert run.status is RunStatus.QUEUED


@pytest.mark.parametrize("flags", [{"mollifierEnabled": True}, {}], ids=["enrolled", "not enrolled"])
async def test_concurrent_triggers_of_replicas_that_divert_and_replicas_that_do_not_are_one_run_per_key(
    holding: House, flags: dict[str, bool]
) -> None:
    """Not enrolled: the flag was turned off, and one replica has not heard of it yet."""
    async with beside(holding, divert=False) as other:
        environment = replace(ENVIRONMENT, org_flags=flags)
        answers = await asyncio.gather(
            *(
                other.triggers.trigger(environment, holding.request(idempotency_key=f"k{number % 5}"))
                if number % 2
                else holding.mollifier.triggers.trigger(ENVIRONMENT, holding.request(idempotency_key=f"k{number % 5}"))
                for number in range(100)
            )
        )

    by_key = [{one.result.run_id for one in answers[key::5]} for key in range(5)]
    assert [len(ids) for ids in by_key] == [1] * 5
    assert sum(not one.result.is_cached for one in answers) == 5
    await holding.drain()
    runs = (await holding.runs.list(ENVIRONMENT, RunFilter(page_size=100))).runs
    assert {run.id for run in runs} == {run_id for ids in by_key for run_id in ids}
    assert {run.status for run in runs} == {RunStatus.QUEUED}


async def test_where_nothing_is_diverted_the_engine_alone_answers_while_the_buffers_server_is_away(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    diverting(house, is_on=False)
    await stack.stop("valkey")

    run_id, cached = await house.trigger_all(idempotency_key="k")

    assert not cached
    assert await house.trigger_all(idempotency_key="k") == (run_id, True)


async def test_where_nothing_is_diverted_an_engine_that_is_away_is_no_reason_to_ask_the_gate(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    held = await holding.trigger(idempotency_key="held")
    diverting(holding, is_on=False)
    before = await state_of(holding.client)
    monkeypatch.setattr(holding.engine, "find_by_keys_many", fail)

    with pytest.raises(EngineUnavailableError):
        await holding.trigger(idempotency_key="k")

    assert await state_of(holding.client) == before
    # What the buffer knows, it says.
    assert await holding.trigger_all(idempotency_key="held") == (held, True)
