"""A held run that cannot be created ends as a failure that everybody can see, and answers as one, wherever that is written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from mollifier import patches
from mollifier.engine import CreateOutcome, Creation, Ending
from mollifier.errors import ConflictError, InvalidRequestError
from mollifier.facade import Mollifier
from mollifier.materialise import Materialiser
from mollifier.model import EntryState, MetadataOperation, Run, RunError, RunFilter, RunStatus
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.engine import PostgresRunEngine
from tests.core.support import expire_lease
from tests.divert.conftest import ENVIRONMENT, House
from tests.postgres.support import execute

pytestmark = pytest.mark.leaves_keys

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SET = MetadataOperation(type="set", key="k", value=b"1")


async def die_of_it(house: House, run_id: str, times: int) -> None:
    """Have those who pop the entry die before they have settled it."""
    keys = house.buffer.keyspace.of(ENVIRONMENT.org_id)
    for _ in range(times):
        entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
        assert entry is not None
        await expire_lease(house.client, keys, run_id)
        await house.buffer.reclaim_expired()


async def created(house: House, run_id: str) -> Run:
    run = await house.created(run_id)
    assert run is not None
    return run


async def get(house: House, run_id: str) -> Run:
    run = await house.runs.get(ENVIRONMENT, run_id)
    assert run is not None
    return run


async def test_a_run_whose_handlers_keep_dying_is_created_in_system_failure_and_frees_its_key(holding: House) -> None:
    run_id = await holding.trigger(idempotency_key="k", tags=("a",))
    await die_of_it(holding, run_id, holding.settings.drain_max_reclaims + 1)

    await holding.drain()

    run = await created(holding, run_id)
    assert (run.status, run.snapshot.tags) == (RunStatus.SYSTEM_FAILURE, ("a",))
    assert run.error is not None
    assert "ran out 11 times" in run.error.message
    assert run.finished_at is not None
    assert (await holding.buffer.counts()).left == 0
    assert (await holding.trigger_all(idempotency_key="k"))[0] != run_id
    await holding.drain()


async def test_a_run_that_exists_stays_as_it_is_when_its_entry_is_given_up_and_has_its_changes(holding: House) -> None:
    run_id = await holding.trigger()
    entry = await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await holding.mollifier.drain_handler()([entry]) == [None]
    assert await holding.buffer.patch(entry, patches.encode(patches.AddTags(("late",)))) == "held"
    assert await holding.buffer.requeue(entry) == "held"
    await die_of_it(holding, run_id, holding.settings.drain_max_reclaims + 1)

    await holding.drain()

    run = await created(holding, run_id)
    assert (run.status, run.snapshot.tags) == (RunStatus.QUEUED, ("late",))
    assert (await holding.buffer.counts()).left == 0


async def test_a_change_after_the_failure_was_recorded_reaches_the_run_also_where_that_cannot_be_created_as_changed(
    holding: House,
) -> None:
    give_up = Materialiser(holding.engine, holding.mollifier.telemetry, lambda: datetime.now(UTC)).give_up
    run_id = await holding.trigger()
    entry = await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await give_up(entry, RuntimeError("boom"))
    for change in (patches.Cancel(datetime.now(UTC)), patches.AddTags(("late",))):
        assert await holding.buffer.patch(entry, patches.encode(change)) == "held"
        entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
        assert entry is not None
    await execute(holding.database, "ALTER TABLE runs ADD CONSTRAINT none_cancelled CHECK (status <> 'CANCELED')")

    assert await give_up(entry, RuntimeError("boom"))

    run = await created(holding, run_id)
    assert (run.status, run.snapshot.tags) == (RunStatus.SYSTEM_FAILURE, ("late",))
    assert await holding.buffer.ack(entry) == "held"


# --- where not even the failure can be written ---------------------------------------------------------------------


async def fail(house: House, run_id: str, error: str = "ValueError: boom") -> datetime:
    """Have the entry at the head of the queue fail as a dead letter."""
    before = datetime.now(UTC)
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert entry.run_id == run_id
    assert await house.buffer.fail(entry, error) == "held"
    return before


async def failed_in_both_stores(house: House, **options: Any) -> tuple[str, str]:
    """Trigger the same twice; one ends as a dead letter, the other as a run in SYSTEM_FAILURE. Return (held, created)."""
    held_id, created_id = await house.trigger(**options), await house.trigger(**options)
    await fail(house, held_id)
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    snapshot = (await get(house, created_id)).snapshot
    error = RunError(message="ValueError: boom", name="SystemFailure")
    ending = Ending(status=RunStatus.SYSTEM_FAILURE, at=datetime.now(UTC), error=error, frees=("idempotency_key",))
    await house.create(Creation(snapshot=snapshot, ending=ending))
    assert await house.buffer.ack(entry) == "held"
    return held_id, created_id


def what_shows(run: Run | None) -> object:
    """All that a caller sees of a run but for what names it and when things happened."""
    assert run is not None
    assert run.finished_at is not None
    assert run.updated_at >= run.finished_at - timedelta(milliseconds=1)
    snapshot = msgspec.structs.replace(run.snapshot, run_id="", created_at=EPOCH)
    return msgspec.structs.replace(run, snapshot=snapshot, updated_at=EPOCH, finished_at=EPOCH)


async def test_a_held_run_that_failed_reads_and_changes_as_a_created_one_in_system_failure(holding: House) -> None:
    both = await failed_in_both_stores(holding, ttl=timedelta(days=1), tags=("a",))
    runs = holding.runs
    changes: list[Callable[[str], Awaitable[Run | None]]] = [
        lambda run_id: runs.get(ENVIRONMENT, run_id),
        lambda run_id: runs.cancel(ENVIRONMENT, run_id),
        lambda run_id: runs.add_tags(ENVIRONMENT, run_id, ["b"]),
        lambda run_id: runs.change_metadata(ENVIRONMENT, run_id, [SET]),
        lambda run_id: runs.cancel(ENVIRONMENT, run_id),
        lambda run_id: runs.get(ENVIRONMENT, run_id),
    ]
    for number, change in enumerate(changes):
        held, made = [what_shows(await change(run_id)) for run_id in both]
        assert held == made, f"change {number}"
    for run_id in both:
        with pytest.raises(ConflictError, match="SYSTEM_FAILURE"):
            await runs.reschedule(ENVIRONMENT, run_id, timedelta(hours=1))
        with pytest.raises(InvalidRequestError):
            await runs.add_tags(ENVIRONMENT, run_id, [f"tag-{n}" for n in range(9)])
    last = await get(holding, both[0])
    assert (last.status, last.snapshot.tags) == (RunStatus.SYSTEM_FAILURE, ("a", "b"))
    assert msgspec.json.decode(last.snapshot.metadata or b"") == {"k": 1}
    listed = await runs.list(ENVIRONMENT, RunFilter(statuses=(RunStatus.SYSTEM_FAILURE,)))
    assert {run.id for run in listed.runs} == set(both)


async def test_a_held_run_that_failed_finished_when_it_failed_and_has_not_expired(holding: House) -> None:
    run_id = await holding.trigger(ttl=timedelta(seconds=1))
    before = await fail(holding, run_id)
    holding.clock = lambda: datetime.now(UTC) + timedelta(days=1)

    run = await get(holding, run_id)

    assert (run.status, run.expired_at) == (RunStatus.SYSTEM_FAILURE, None)
    assert run.finished_at is not None
    assert before - timedelta(milliseconds=1) <= run.finished_at <= datetime.now(UTC)


async def test_a_cancelled_held_run_that_failed_stays_cancelled(holding: House) -> None:
    run_id = await holding.trigger()

    class Refusing(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            raise RuntimeError("no room today")

    engine = Refusing(holding.database)
    mollifier = Mollifier(holding.settings, engine=engine, tasks=PostgresTaskCatalog(holding.database))
    assert await mollifier.runs.cancel(ENVIRONMENT, run_id) is not None
    await mollifier.aclose()
    await fail(holding, run_id)

    run = await get(holding, run_id)
    assert run.status is RunStatus.CANCELED
    assert run.error is not None


async def test_an_entry_that_kills_those_who_give_it_up_is_a_dead_letter_that_everybody_can_see(
    holding: House,
) -> None:
    run_id = await holding.trigger()
    await die_of_it(holding, run_id, holding.settings.max_returns + 1)

    entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry is not None
    assert entry.state is EntryState.FAILED
    assert await holding.created(run_id) is None
    run = await get(holding, run_id)
    assert run.status is RunStatus.SYSTEM_FAILURE
    assert run.error is not None
    assert "ran out 14 times" in run.error.message
    assert await holding.runs.add_tags(ENVIRONMENT, run_id, ["a"]) is not None
