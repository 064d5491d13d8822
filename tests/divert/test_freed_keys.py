"""Which keys a held run lets go of when it ends before it has begun: those that a created one would have let go of, and no others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from mollifier import patches
from mollifier.engine import Creation
from mollifier.materialise import Materialiser
from mollifier.model import Entry, Run, RunStatus
from mollifier.postgres.engine import utc_now
from tests.core.support import expire_lease
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys

BOTH: dict[str, Any] = {"idempotency_key": "k", "request_key": "r"}


async def pop(house: House) -> Entry:
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    return entry


async def give_up(house: House) -> None:
    """Have the one held run be recorded as failed."""
    entry = await pop(house)
    materialiser = Materialiser(house.engine, house.mollifier.telemetry, utc_now)
    assert await materialiser.give_up(entry, RuntimeError("no room today"))
    assert await house.buffer.ack(entry) == "held"


async def fail(house: House) -> None:
    """Make a dead letter of the one held run."""
    assert await house.buffer.fail(await pop(house), "no room today") == "held"


async def come_back_too_often(house: House) -> None:
    house.settings = replace(house.settings, drain_max_reclaims=0)
    failed: Sequence[str] = ()
    for _ in range(house.settings.max_returns + 1):
        assert not failed
        entry = await pop(house)
        await expire_lease(house.client, house.buffer.keyspace.of(entry.org_id), entry.run_id)
        failed = (await house.buffer.reclaim_expired()).failed
    assert failed


async def read(house: House, run_id: str) -> Run:
    run = await house.runs.get(ENVIRONMENT, run_id)
    assert run is not None
    return run


async def rival(house: House, like: str, run_id: str, **without: None) -> None:
    """Have another run take the held run's keys, all but those, while nobody could know."""
    held = await read(house, like)
    await house.create(Creation(snapshot=replace(held.snapshot, run_id=run_id, **without)))


@pytest.mark.parametrize("end", [give_up, fail, come_back_too_often])
async def test_a_failure_frees_the_idempotency_key_and_not_the_request_key(
    holding: House, end: Callable[[House], Awaitable[None]]
) -> None:
    failed = await holding.trigger(**BOTH)

    await end(holding)

    assert (await read(holding, failed)).status is RunStatus.SYSTEM_FAILURE
    assert await holding.trigger_all(request_key="r") == (failed, False)
    second, cached = await holding.trigger_all(idempotency_key="k")
    assert (second != failed, cached) == (True, False)
    await holding.drain()
    assert (await read(holding, second)).status is RunStatus.QUEUED
    assert await holding.trigger_all(request_key="r") == (failed, False)


async def test_a_run_that_its_caller_cancelled_and_that_cannot_be_created_otherwise_keeps_its_keys(
    holding: House,
) -> None:
    run_id = await holding.trigger(**BOTH)
    held = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert held is not None
    at = (await read(holding, run_id)).snapshot.created_at
    assert await holding.buffer.patch(held, patches.encode(patches.Cancel(at))) == "held"

    await give_up(holding)

    assert (await read(holding, run_id)).status is RunStatus.CANCELED
    assert await holding.trigger_all(request_key="r") == (run_id, False)
    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)


async def test_a_run_that_lost_its_idempotency_key_keeps_its_request_key(holding: House) -> None:
    loser = await holding.trigger(**BOTH)
    await rival(holding, loser, "run_rival", request_key=None, request_key_expires_at=None)

    await holding.drain()

    assert (await read(holding, loser)).status is RunStatus.CANCELED
    assert await holding.trigger_all(request_key="r") == (loser, False)
    assert await holding.trigger_all(idempotency_key="k") == ("run_rival", True)


async def test_a_run_that_lost_its_request_key_keeps_its_idempotency_key(holding: House) -> None:
    loser = await holding.trigger(**BOTH)
    await rival(holding, loser, "run_rival", idempotency_key=None, idempotency_expires_at=None)

    await holding.drain()

    assert (await read(holding, loser)).status is RunStatus.CANCELED
    assert await holding.trigger_all(request_key="r") == ("run_rival", False)
    assert await holding.trigger_all(idempotency_key="k") == (loser, True)


@pytest.mark.parametrize("end", [House.drain, give_up])
async def test_a_run_whose_keys_are_two_other_runs_is_recorded_all_the_same(
    holding: House, end: Callable[[House], Awaitable[None]]
) -> None:
    loser = await holding.trigger(**BOTH)
    await rival(holding, loser, "run_a", request_key=None, request_key_expires_at=None)
    await rival(holding, loser, "run_b", idempotency_key=None, idempotency_expires_at=None)

    await end(holding)

    ended = await holding.created(loser)
    assert ended is not None
    assert ended.error is not None
    assert ended.status is (RunStatus.CANCELED if end is House.drain else RunStatus.SYSTEM_FAILURE)
    assert await holding.trigger_all(idempotency_key="k") == ("run_a", True)
    assert await holding.trigger_all(request_key="r") == ("run_b", False)
