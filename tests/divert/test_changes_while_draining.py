"""A change that comes while the drainer has the run's entry in its hands is in effect from its answer on, in both stores."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import text

from mollifier.engine import CreateOutcome, Creation
from mollifier.errors import ConflictError, EngineUnavailableError, InvalidRequestError
from mollifier.facade import Mollifier
from mollifier.model import Entry, MetadataOperation, Run, RunFilter, RunStatus
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.runs import Runs
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys

LATER = datetime(2999, 1, 1, tzinfo=UTC)
INCREMENT = MetadataOperation(type="increment", key="n", value=b"1")
Ask = Callable[[House, str], Awaitable[Run | None]]


def tags_of(run: Run) -> Any:
    return run.snapshot.tags


def count_of(run: Run) -> Any:
    return msgspec.json.decode(run.snapshot.metadata or b"{}").get("n", 0)


CHANGES: dict[str, tuple[Ask, Callable[[Run], Any], Any]] = {
    "tags": (lambda house, run: house.runs.add_tags(ENVIRONMENT, run, ["late"]), tags_of, ("late",)),
    "metadata": (lambda house, run: house.runs.change_metadata(ENVIRONMENT, run, [INCREMENT]), count_of, 1),
    "reschedule": (
        lambda house, run: house.runs.reschedule(ENVIRONMENT, run, LATER),
        lambda run: run.snapshot.delayed_until,
        LATER,
    ),
    "cancel": (lambda house, run: house.runs.cancel(ENVIRONMENT, run), lambda run: run.status, RunStatus.CANCELED),
}


async def pop(house: House) -> Entry:
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    return entry


async def get(house: House, run_id: str) -> Run:
    run = await house.runs.get(ENVIRONMENT, run_id)
    assert run is not None
    return run


async def listed(house: House, run_id: str) -> Run:
    (run,) = [run for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs if run.id == run_id]
    return run


def with_engine(house: House, engine: type[PostgresRunEngine]) -> Runs:
    """Return what changes runs in a process of its own, with an engine of this kind."""
    return Runs(engine(house.database), house.buffer, lambda: house.settings, house.clock)


async def settle(house: House, entry: Entry) -> None:
    """Handle and ack the entry as a drainer does that popped it before anything changed."""
    assert await house.mollifier.drain_handler()([entry]) == [None]
    while await house.buffer.ack(entry) == "changed":
        current = await house.buffer.get_entry(entry.org_id, entry.run_id)
        assert current is not None
        assert await house.mollifier.drain_handler()([current]) == [None]
        entry = current


@pytest.mark.parametrize("moment", ["popped", "created", "put back", "created and put back"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_shows_from_its_answer_on_whenever_the_entry_was_popped(
    holding: House, change: str, moment: str
) -> None:
    ask, aspect, expected = CHANGES[change]
    run_id = await holding.trigger(delay=timedelta(hours=1))
    entry = await pop(holding)
    if "created" in moment:
        assert await holding.mollifier.drain_handler()([entry]) == [None]
    if "put back" in moment:
        assert await holding.buffer.requeue(entry) == "held"

    answer = await ask(holding, run_id)

    assert answer is not None
    assert aspect(answer) == expected
    assert aspect(await get(holding, run_id)) == expected
    assert aspect(await listed(holding, run_id)) == expected
    # A creation that was under way all the time comes late, and changes nothing.
    assert await holding.mollifier.drain_handler()([entry]) == [None]
    assert aspect(await get(holding, run_id)) == expected
    if "put back" not in moment:
        await settle(holding, entry)
    await holding.drain()
    assert aspect(await get(holding, run_id)) == expected
    assert (await holding.buffer.counts()).left == 0


@pytest.mark.parametrize("is_created", [False, True])
async def test_a_reset_while_the_entry_is_popped_frees_the_key_in_both_stores(holding: House, is_created: bool) -> None:
    run_id = await holding.trigger(idempotency_key="k")
    entry = await pop(holding)
    if is_created:
        assert await holding.mollifier.drain_handler()([entry]) == [None]

    assert await holding.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")

    other, cached = await holding.trigger_all(idempotency_key="k")
    assert (other != run_id, cached) == (True, False)
    await settle(holding, entry)
    await holding.drain()
    assert await holding.trigger_all(idempotency_key="k") == (other, True)
    statuses = [(await get(holding, one)).status for one in (run_id, other)]
    assert statuses == [RunStatus.QUEUED] * 2


async def test_a_key_that_is_being_reset_stays_its_runs_until_that_run_is_created_without_it(holding: House) -> None:
    run_id = await holding.trigger(idempotency_key="k")
    entry = await pop(holding)
    meanwhile: list[tuple[str, bool]] = []

    class Slow(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            meanwhile.append(await holding.trigger_all(idempotency_key="k"))
            return await super().create_held_runs(creations)

    assert await with_engine(holding, Slow).reset_idempotency_key(ENVIRONMENT, "echo", "k")

    assert meanwhile == [(run_id, True)]
    other, cached = await holding.trigger_all(idempotency_key="k")
    assert (other != run_id, cached) == (True, False)
    await settle(holding, entry)
    await holding.drain()
    assert [(await get(holding, one)).status for one in (run_id, other)] == [RunStatus.QUEUED] * 2


async def test_a_reset_that_meets_a_run_which_cannot_be_created_yet_changes_nothing_and_can_be_made_again(
    holding: House,
) -> None:
    run_id = await holding.trigger(idempotency_key="k")
    entry = await pop(holding)

    class Away(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            raise EngineUnavailableError("away")

    with pytest.raises(EngineUnavailableError, match=run_id):
        await with_engine(holding, Away).reset_idempotency_key(ENVIRONMENT, "echo", "k")

    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)
    assert await holding.buffer.get_entry(entry.org_id, run_id) == msgspec.structs.replace(entry, dwell_ms=0)
    await settle(holding, entry)
    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)
    assert await holding.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")
    assert (await holding.trigger_all(idempotency_key="k"))[0] != run_id


async def test_a_reset_frees_the_key_in_both_stores_of_a_run_that_was_held_and_created_while_it_looked(
    holding: House,
) -> None:
    held: list[tuple[str, Entry]] = []

    class Slow(PostgresRunEngine):
        async def reset_idempotency_key(
            self, env_id: str, task_id: str, key: str, at: datetime, *, run_id: str | None = None
        ) -> str | None:
            if not held:
                held.append((await holding.trigger(idempotency_key="k"), await pop(holding)))
                assert await holding.mollifier.drain_handler()([held[0][1]]) == [None]
            return await super().reset_idempotency_key(env_id, task_id, key, at, run_id=run_id)

    assert await with_engine(holding, Slow).reset_idempotency_key(ENVIRONMENT, "echo", "k")

    (run_id, entry), *_ = held
    other, cached = await holding.trigger_all(idempotency_key="k")
    assert (other != run_id, cached) == (True, False)
    await settle(holding, entry)
    assert await holding.trigger_all(idempotency_key="k") == (other, True)
    await holding.drain()
    assert await holding.trigger_all(idempotency_key="k") == (other, True)


async def test_a_reset_that_comes_late_frees_no_key_of_a_run_that_was_triggered_meanwhile(
    holding: House,
) -> None:
    """Its run has been created and let go of by its drainer, and freed by itself, before another run takes the key."""
    run_id = await holding.trigger(idempotency_key="k")
    entry = await pop(holding)
    assert await holding.mollifier.drain_handler()([entry]) == [None]
    others: list[tuple[str, bool]] = []

    class Slow(PostgresRunEngine):
        async def reset_idempotency_key(
            self, env_id: str, task_id: str, key: str, at: datetime, *, run_id: str | None = None
        ) -> str | None:
            freed = await super().reset_idempotency_key(env_id, task_id, key, at, run_id=run_id)
            if not others:
                assert await holding.buffer.ack(entry) == "held"
                await holding.calm()
                others.append(await holding.trigger_all(idempotency_key="k"))
            return freed

    assert await with_engine(holding, Slow).reset_idempotency_key(ENVIRONMENT, "echo", "k")

    (other, cached), *_ = others
    assert (other != run_id, cached) == (True, False)
    assert await holding.trigger_all(idempotency_key="k") == (other, True)


async def test_an_older_change_never_overwrites_a_newer_one(holding: House) -> None:
    run_id = await holding.trigger(delay=timedelta(hours=1))
    entry = await pop(holding)

    await holding.runs.reschedule(ENVIRONMENT, run_id, LATER)
    assert await holding.mollifier.drain_handler()([entry]) == [None]
    await holding.runs.reschedule(ENVIRONMENT, run_id, LATER + timedelta(days=1))
    await settle(holding, entry)

    assert (await get(holding, run_id)).snapshot.delayed_until == LATER + timedelta(days=1)


async def test_a_run_cancelled_while_its_entry_is_popped_never_gets_a_job(holding: House) -> None:
    run_id = await holding.trigger()
    entry = await pop(holding)

    await holding.runs.cancel(ENVIRONMENT, run_id)
    await settle(holding, entry)

    async with holding.database.statement() as connection:
        jobs = await connection.execute(text("SELECT count(*) FROM procrastinate_jobs"))
        assert jobs.scalar_one() == 0


async def test_a_change_that_the_run_cannot_take_is_refused_while_its_entry_is_popped(holding: House) -> None:
    run_id = await holding.trigger(tags=tuple("abcdefghij"))
    await pop(holding)

    with pytest.raises(InvalidRequestError):
        await holding.runs.add_tags(ENVIRONMENT, run_id, ["k"])
    with pytest.raises(ConflictError):
        await holding.runs.reschedule(ENVIRONMENT, run_id, LATER)

    assert len((await get(holding, run_id)).snapshot.tags) == 10


async def test_a_change_of_a_run_whose_key_another_took_creates_it_cancelled_naming_the_winner(holding: House) -> None:
    loser = await holding.trigger(idempotency_key="k")
    entry = await pop(holding)
    rival = msgspec.structs.replace((await get(holding, loser)).snapshot, run_id="run_rival")
    await holding.create(Creation(snapshot=rival))

    changed = await holding.runs.add_tags(ENVIRONMENT, loser, ["late"])

    assert changed is not None
    assert (changed.status, changed.snapshot.tags) == (RunStatus.CANCELED, ("late",))
    assert changed.error is not None
    assert "run_rival" in changed.error.message
    await settle(holding, entry)


async def test_a_change_made_while_a_cancellation_is_on_its_way_is_in_the_cancelled_run(holding: House) -> None:
    run_id = await holding.trigger()
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Slow(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            asked.set()
            await go_on.wait()
            return await super().create_held_runs(creations)

    mollifier = Mollifier(holding.settings, engine=Slow(holding.database), tasks=PostgresTaskCatalog(holding.database))
    cancelling = asyncio.create_task(mollifier.runs.cancel(ENVIRONMENT, run_id))
    await asked.wait()

    assert await holding.runs.add_tags(ENVIRONMENT, run_id, ["late"]) is not None
    go_on.set()
    await cancelling
    await mollifier.aclose()

    run = await get(holding, run_id)
    assert (run.status, run.snapshot.tags) == (RunStatus.CANCELED, ("late",))
    await holding.drain()


async def test_while_the_engine_cannot_create_it_a_popped_entry_takes_changes_and_they_reach_the_run(
    holding: House,
) -> None:
    run_id = await holding.trigger()
    entry = await pop(holding)

    class Away(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            raise EngineUnavailableError("away")

    mollifier = Mollifier(holding.settings, engine=Away(holding.database), tasks=PostgresTaskCatalog(holding.database))
    changed = await mollifier.runs.add_tags(ENVIRONMENT, run_id, ["late"])
    assert changed is not None
    assert changed.snapshot.tags == ("late",)
    assert (await get(holding, run_id)).snapshot.tags == ("late",)
    await mollifier.aclose()

    await settle(holding, entry)
    assert (await get(holding, run_id)).snapshot.tags == ("late",)
