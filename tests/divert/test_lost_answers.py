"""What the engine did although its answer was lost, or does after it was given up: nothing is made twice, nothing is overwritten."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import msgspec
import pytest

from mollifier import handover, patches
from mollifier.engine import CreateOutcome, Creation
from mollifier.errors import EngineUnavailableError
from mollifier.facade import Mollifier
from mollifier.model import Entry, MetadataOperation, Run, RunStatus, Snapshot
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.engine import PostgresRunEngine
from tests.core.support import until
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys

INCREMENT = MetadataOperation(type="increment", key="n", value=b"1")


class Deaf(PostgresRunEngine):
    """Does what it is asked for, and its answers are lost; what it is to create is `on_its_way` until the test lets it arrive.

    Cancellations never get to it; `unsent`: and that is known.
    """

    on_its_way: Sequence[Snapshot] = ()
    unsent = False

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[CreateOutcome]:
        self.on_its_way = snapshots
        raise EngineUnavailableError("no answer")

    async def arrive(self) -> None:
        await super().create_runs(self.on_its_way)

    async def change_metadata(self, env_id: str, run_id: str, operations: Sequence[MetadataOperation]) -> Run | None:
        await super().change_metadata(env_id, run_id, operations)
        raise EngineUnavailableError("no answer")

    async def cancel_run(self, env_id: str, run_id: str, at: object) -> Run | None:
        raise EngineUnavailableError("never asked", unsent=self.unsent)


class NotCreating(PostgresRunEngine):
    """Creates no held run."""

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        raise EngineUnavailableError("no answer")


@pytest.fixture
def deaf(house: House) -> Deaf:
    return Deaf(house.database)


@pytest.fixture
async def unheard(house: House, deaf: Deaf) -> AsyncIterator[Mollifier]:
    """A process of the house that does not hear its engine's answers."""
    mollifier = Mollifier(house.settings, engine=deaf, tasks=PostgresTaskCatalog(house.database))
    yield mollifier
    await mollifier.aclose()


async def created(house: House, run_id: str) -> Run:
    run = await house.created(run_id)
    assert run is not None
    return run


async def pop(house: House) -> Entry:
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    return entry


async def created_unheard(house: House) -> None:
    """Create the run that waits, its drainer hearing no answer, and have its entry back in its place."""
    entry = await pop(house)
    assert await house.mollifier.drain_handler()([entry]) == [None]
    assert await house.buffer.requeue(entry) == "held"


async def test_a_creation_that_arrives_after_its_trigger_was_held_has_no_change_made_meanwhile_vanish(
    house: House, deaf: Deaf, unheard: Mollifier
) -> None:
    run_id = (await unheard.triggers.trigger(ENVIRONMENT, house.request())).result.run_id
    assert await house.created(run_id) is None

    assert await house.runs.add_tags(ENVIRONMENT, run_id, ["kept"]) is not None
    await deaf.arrive()

    read = await house.runs.get(ENVIRONMENT, run_id)
    assert read is not None
    assert read.snapshot.tags == ("kept",)
    await house.drain()
    assert (await created(house, run_id)).snapshot.tags == ("kept",)


@pytest.mark.parametrize("was_created", ["by its trigger", "by a drainer"])
async def test_a_change_that_was_made_without_an_answer_is_not_made_again(
    house: House, deaf: Deaf, unheard: Mollifier, was_created: str
) -> None:
    if was_created == "by its trigger":
        run_id = (await unheard.triggers.trigger(ENVIRONMENT, house.request())).result.run_id
        await deaf.arrive()
    else:
        await house.trip()
        run_id = await house.trigger()
        await created_unheard(house)

    with pytest.raises(EngineUnavailableError):
        await unheard.runs.change_metadata(ENVIRONMENT, run_id, [INCREMENT])

    await house.drain()
    assert msgspec.json.decode((await created(house, run_id)).snapshot.metadata or b"") == {"n": 1}


async def test_a_cancellation_that_the_engine_may_not_have_heard_of_is_not_answered(
    holding: House, unheard: Mollifier
) -> None:
    run_id = await holding.trigger()
    assert await holding.mollifier.drain_handler()([await pop(holding)]) == [None]

    with pytest.raises(EngineUnavailableError):
        await unheard.runs.cancel(ENVIRONMENT, run_id)

    assert (await created(holding, run_id)).status is RunStatus.QUEUED


async def test_where_the_engine_cannot_be_asked_at_all_a_held_run_is_cancelled_once_and_for_all(
    holding: House, deaf: Deaf, unheard: Mollifier
) -> None:
    run_id = await holding.trigger(delay=timedelta(hours=1))
    deaf.unsent = True

    for _ in range(2):
        run = await unheard.runs.cancel(ENVIRONMENT, run_id)
        assert run is not None
        assert run.status is RunStatus.CANCELED

    await holding.drain()
    assert (await created(holding, run_id)).status is RunStatus.CANCELED


@pytest.mark.parametrize("unsent", [True, False])
async def test_a_run_that_may_have_been_created_is_not_cancelled_behind_the_engines_back(
    holding: House, deaf: Deaf, unheard: Mollifier, *, unsent: bool
) -> None:
    run_id = await holding.trigger()
    await created_unheard(holding)
    deaf.unsent = unsent

    with pytest.raises(EngineUnavailableError):
        await unheard.runs.cancel(ENVIRONMENT, run_id)

    assert (await created(holding, run_id)).status is RunStatus.QUEUED
    entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry is not None
    assert entry.patches == ()
    run = await holding.runs.cancel(ENVIRONMENT, run_id)
    assert run is not None
    assert run.status is RunStatus.CANCELED


@pytest.mark.parametrize(
    "error", [EngineUnavailableError("gone", unsent=True), EngineUnavailableError("no answer"), RuntimeError("locked")]
)
async def test_a_cancellation_that_cannot_create_the_run_is_not_answered_while_somebody_else_may(
    holding: House, error: Exception
) -> None:
    run_id = await holding.trigger()
    popped = await pop(holding)

    class Falling(PostgresRunEngine):
        """Tells that the run is not there, and then that it cannot be created, while the drainer's creation arrives."""

        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            assert await holding.mollifier.drain_handler()([popped]) == [None]
            raise error

    mollifier = Mollifier(
        holding.settings, engine=Falling(holding.database), tasks=PostgresTaskCatalog(holding.database)
    )
    with pytest.raises(EngineUnavailableError):
        await mollifier.runs.cancel(ENVIRONMENT, run_id)
    await mollifier.aclose()

    entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry is not None
    assert entry.patches == ()
    assert (await created(holding, run_id)).status is RunStatus.QUEUED


@pytest.mark.parametrize("changes", [0, handover.CHANGES_MANY])
async def test_a_run_that_nobody_has_set_out_to_create_is_cancelled_whatever_becomes_of_its_creation(
    holding: House, changes: int
) -> None:
    run_id = await holding.trigger()
    for _ in range(changes):
        entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
        assert entry is not None
        assert await holding.buffer.patch(entry, patches.encode(patches.AddTags(("tag",)))) == "held"
    mollifier = Mollifier(
        holding.settings, engine=NotCreating(holding.database), tasks=PostgresTaskCatalog(holding.database)
    )

    for _ in range(2):
        run = await mollifier.runs.cancel(ENVIRONMENT, run_id)
        assert run is not None
        assert run.status is RunStatus.CANCELED
    await mollifier.aclose()

    await holding.hand_over()
    assert (await created(holding, run_id)).status is RunStatus.CANCELED


async def test_a_change_made_while_the_runs_failure_is_recorded_is_in_the_failed_run(holding: House) -> None:
    run_id = await holding.trigger()

    class Refusing(PostgresRunEngine):
        """Cannot create the run but as failed, and a change arrives in that moment."""

        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            (creation,) = creations
            if creation.ending is None:
                raise RuntimeError("the row cannot be written")
            outcomes = await super().create_held_runs(creations)
            if not creation.patch_count:
                entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
                assert entry is not None
                assert await holding.buffer.patch(entry, patches.encode(patches.AddTags(("late",)))) == "held"
            return outcomes

    once = msgspec.structs.replace(holding.settings, drain_max_attempts=1)
    mollifier = Mollifier(once, engine=Refusing(holding.database), tasks=PostgresTaskCatalog(holding.database))
    drainer = mollifier.drainer()
    drainer.start()

    async def is_settled() -> bool:
        return (await holding.buffer.counts()).left == 0

    await until(is_settled)
    await drainer.stop()
    await mollifier.aclose()
    run = await created(holding, run_id)
    assert (run.status, run.snapshot.tags) == (RunStatus.SYSTEM_FAILURE, ("late",))
