"""Replicas in different steps of the rollout, and steps taken back while something is held: an accepted trigger is one run all the same."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from mollifier.batches import BatchAdded
from mollifier.errors import EngineUnavailableError
from mollifier.model import BatchRequest, EntryKind, RunStatus
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


def diverting(house: House, *, is_on: bool) -> None:
    house.settings = replace(house.settings, divert=is_on)


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
