"""Which keys a held run lets go of when it ends before it has begun: those that a created one would have let go of, and no others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import update

from mollifier import patches
from mollifier.engine import Creation
from mollifier.errors import EngineUnavailableError
from mollifier.facade import Mollifier
from mollifier.materialise import Materialiser
from mollifier.model import Entry, Run, RunProgress, RunStatus
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.engine import PostgresRunEngine, utc_now
from mollifier.postgres.tables import runs
from tests.core.support import execute, expire_lease
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


# --- a run that is in the engine while its entry is left ----------------------------------------------------------------


async def create(house: House) -> None:
    """Have a drainer create the one held run and die before it settles the entry."""
    assert await house.mollifier.drain_handler()([await pop(house)]) == [None]


async def create_by_a_change(house: House) -> None:
    """Have a change create the one held run, ahead of its turn."""
    entry = await pop(house)
    assert await house.buffer.requeue(entry, attempts=0) == "held"
    assert await house.runs.add_tags(ENVIRONMENT, entry.run_id, ["t"]) is not None


async def reach(house: House, run_id: str, status: RunStatus) -> None:
    """Bring about what only a worker does."""
    values: dict[str, Any] = {"status": status}
    if status is RunStatus.FAILED:
        values["idempotency_slot"] = None
    async with house.database.statement() as connection:
        changed = await connection.execute(update(runs).where(runs.c.id == run_id).values(**values))
    assert changed.rowcount == 1


async def put_back(house: House) -> None:
    """Have what a dead drainer left be taken up by another."""
    keys = house.buffer.keyspace.of(ENVIRONMENT.org_id)
    for run_id in await execute(house.client, "ZRANGE", keys.draining, 0, -1):
        await expire_lease(house.client, keys, run_id.decode())
    await house.buffer.reclaim_expired()


@pytest.mark.parametrize("come_to_be", [create, create_by_a_change])
async def test_a_run_that_failed_frees_its_idempotency_key_though_its_entry_is_left(
    holding: House, come_to_be: Callable[[House], Awaitable[None]]
) -> None:
    failed = await holding.trigger(**BOTH)
    await come_to_be(holding)
    await reach(holding, failed, RunStatus.FAILED)

    second, cached = await holding.trigger_all(idempotency_key="k")

    assert (second != failed, cached) == (True, False)
    assert await holding.created(second) is None
    assert await holding.trigger_all(request_key="r") == (failed, False)
    assert await holding.trigger_all(idempotency_key="k") == (second, True)
    await put_back(holding)
    await holding.drain()
    assert (await read(holding, failed)).status is RunStatus.FAILED
    assert (await read(holding, second)).status is RunStatus.QUEUED
    assert await holding.trigger_all(request_key="r") == (failed, False)
    assert await holding.trigger_all(idempotency_key="k") == (second, True)


@pytest.mark.parametrize("status", [RunStatus.QUEUED, RunStatus.EXECUTING, RunStatus.COMPLETED, RunStatus.CANCELED])
async def test_a_run_that_did_not_fail_keeps_its_key_while_its_entry_is_left(holding: House, status: RunStatus) -> None:
    run_id = await holding.trigger(**BOTH)
    await create(holding)
    await reach(holding, run_id, status)

    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)
    assert await holding.trigger_all(request_key="r") == (run_id, False)


async def test_of_triggers_that_come_together_each_gets_what_its_own_key_is_worth(holding: House) -> None:
    failed = await holding.trigger(idempotency_key="failed")
    await create(holding)
    await reach(holding, failed, RunStatus.FAILED)
    running = await holding.trigger(idempotency_key="running")
    await create(holding)
    held = await holding.trigger(idempotency_key="held")

    keys = ["new", "held", "failed", "running", "failed"]
    triggered = await holding.mollifier.triggers.trigger_many(
        ENVIRONMENT, [holding.request(idempotency_key=key) for key in keys]
    )

    new, *others = [(answer.result.run_id, answer.result.is_cached) for answer in triggered]
    again = others[1][0]
    assert others == [(held, True), (again, False), (running, True), (again, True)]
    assert len({new[0], again, held, running, failed}) == 5
    assert not new[1]


class Watched(PostgresRunEngine):
    """Notes which runs it is asked after, and answers unless it is `away`."""

    away = False

    def __init__(self, house: House) -> None:
        super().__init__(house.database)
        self.asked: list[str] = []

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        self.asked.extend(run_ids)
        if self.away:
            raise EngineUnavailableError("away")
        return await super().get_progress(env_id, run_ids)


async def trigger_with(engine: PostgresRunEngine, house: House) -> tuple[str, bool]:
    mollifier = Mollifier(house.settings, engine=engine, tasks=PostgresTaskCatalog(house.database))
    triggered = await mollifier.triggers.trigger(ENVIRONMENT, house.request(idempotency_key="k"))
    await mollifier.aclose()
    return triggered.result.run_id, triggered.result.is_cached


async def test_while_the_engine_is_away_the_held_run_answers(holding: House) -> None:
    failed = await holding.trigger(idempotency_key="k")
    await create(holding)
    await reach(holding, failed, RunStatus.FAILED)
    engine = Watched(holding)
    engine.away = True

    assert await trigger_with(engine, holding) == (failed, True)

    engine.away = False
    assert (await trigger_with(engine, holding))[0] != failed
    assert engine.asked == [failed, failed]


async def test_the_engine_is_not_asked_after_a_run_that_nobody_has_set_out_to_create(holding: House) -> None:
    run_id = await holding.trigger(idempotency_key="k")
    engine = Watched(holding)

    assert await trigger_with(engine, holding) == (run_id, True)

    assert engine.asked == []
