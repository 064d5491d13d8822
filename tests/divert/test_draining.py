"""Draining held entries into the engine: together, one poison entry alone, through outages, and without waiting for a poll."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from mollifier import patches, snapshots
from mollifier.embedded import Stack
from mollifier.engine import CreateOutcome, Creation
from mollifier.errors import EngineUnavailableError
from mollifier.facade import Mollifier
from mollifier.letters import Reason
from mollifier.model import Entry, EntryKind, Run, RunFilter, RunStatus, Snapshot
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from tests.core.observed import Observed, labels
from tests.core.support import until
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


class CountingEngine(PostgresRunEngine):
    """Notes how many runs each call was asked to create."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.sizes: list[int] = []

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        self.sizes.append(len(creations))
        return await super().create_held_runs(creations)


def counting(house: House) -> tuple[Mollifier, CountingEngine]:
    engine = CountingEngine(house.database)
    mollifier = Mollifier(house.settings, engine=engine, tasks=PostgresTaskCatalog(house.database))
    return mollifier, engine


async def hold_unstorable(house: House, run_id: str) -> None:
    """Hold what no engine can store: text with a NUL, which no request can contain."""
    snapshot = Snapshot(
        run_id=run_id,
        org_id=ENVIRONMENT.org_id,
        env_id=ENVIRONMENT.id,
        task_id="echo",
        created_at=datetime.now(UTC),
        machine="nul\x00",
    )
    await house.buffer.accept(
        run_id, ENVIRONMENT.id, ENVIRONMENT.org_id, snapshots.encode(snapshot), kind=EntryKind.HELD
    )


async def pop_held(house: House, tags: tuple[str, ...] = ()) -> Entry:
    """Hold a run and take its entry."""
    await house.trigger(tags=tags)
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    return entry


async def test_an_environments_entries_are_created_in_one_call(holding: House) -> None:
    made = [await holding.trigger() for _ in range(20)]
    mollifier, engine = counting(holding)
    entries = [await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id) for _ in made]

    outcomes = await mollifier.drain_handler()([entry for entry in entries if entry is not None])

    assert outcomes == [None] * 20
    assert engine.sizes == [20]
    await holding.buffer.ack_many([entry for entry in entries if entry is not None])
    await mollifier.aclose()


async def test_a_poison_entry_in_a_batch_fails_alone(holding: House) -> None:
    before = [await holding.trigger() for _ in range(5)]
    await hold_unstorable(holding, "run_poison")
    after = [await holding.trigger() for _ in range(5)]

    await holding.drain()

    created = await holding.engine.list_runs(ENVIRONMENT.id, RunFilter(page_size=100))
    assert {run.id for run in created.runs} == {*before, *after}
    counts = await holding.buffer.counts()
    assert (counts.left, counts.failed) == (1, 1)
    entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, "run_poison")
    assert entry is not None
    assert entry.error is not None
    # Not even its failure can be written to the engine, so the entry keeps it.
    run = await holding.runs.get(ENVIRONMENT, "run_poison")
    assert run is not None
    assert run.status is RunStatus.SYSTEM_FAILURE


async def test_a_held_run_with_a_change_that_cannot_be_read_is_a_visible_failure_and_frees_its_key(
    holding: House,
) -> None:
    run_id = await holding.trigger(idempotency_key="k")
    entry = await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    changes = [patches.encode(patches.AddTags((tag,))) for tag in ("before", "after")]
    for change in (changes[0], b"no patch", changes[1]):
        assert entry is not None
        assert await holding.buffer.patch(entry, change) == "held"
        entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry is not None
    await holding.buffer.requeue(entry)

    await holding.drain()

    run = await holding.created(run_id)
    assert run is not None
    assert (run.status, run.snapshot.tags) == (RunStatus.SYSTEM_FAILURE, ("before", "after"))
    assert run.error is not None
    assert "cannot be read" in run.error.message
    assert (await holding.buffer.counts()).failed == 0
    assert (await holding.runs.list(ENVIRONMENT, RunFilter(statuses=(RunStatus.SYSTEM_FAILURE,)))).runs == (
        replace(run, snapshot=replace(run.snapshot, payload=b"")),
    )
    again, cached = await holding.trigger_all(idempotency_key="k")
    assert (again != run_id, cached) == (True, False)
    await holding.drain()


async def test_an_entry_without_a_readable_trigger_has_no_run_to_show_and_is_a_letter_for_the_operator(
    holding: House,
) -> None:
    kind, run_id = EntryKind.HELD, "run_none"
    await holding.buffer.accept(run_id, ENVIRONMENT.id, ENVIRONMENT.org_id, b"no trigger", kind=kind)

    await holding.drain()

    assert await holding.created(run_id) is None
    assert await holding.runs.get(ENVIRONMENT, run_id) is None
    assert (await holding.runs.list(ENVIRONMENT, RunFilter())).runs == ()
    assert await holding.runs.add_tags(ENVIRONMENT, run_id, ["t"]) is None
    letter = await holding.buffer.get_letter(run_id)
    assert letter is not None
    assert (letter.reason, letter.payload) == (Reason.FAILED, b"no trigger")


async def test_attempts_exhausted_leave_a_run_in_system_failure_with_the_error(holding: House) -> None:
    run_id = await holding.trigger(idempotency_key="k")

    class Refusing(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            if creations[0].ending is None:
                raise RuntimeError("no room today")
            return await super().create_held_runs(creations)

    settings, observed = replace(holding.settings, drain_max_attempts=2), Observed()
    mollifier = Mollifier(
        settings,
        engine=Refusing(holding.database),
        tasks=PostgresTaskCatalog(holding.database),
        telemetry=observed.telemetry,
    )
    drainer = mollifier.drainer()
    drainer.start()

    async def is_recorded() -> bool:
        return await holding.created(run_id) is not None

    await until(is_recorded)
    await drainer.stop()
    await mollifier.aclose()

    run = await holding.created(run_id)
    assert run is not None
    assert run.status is RunStatus.SYSTEM_FAILURE
    assert run.error is not None
    assert "no room today" in run.error.message
    assert observed.points("mollifier.drain.entries") == {labels(outcome="requeued"): 1, labels(outcome="given_up"): 1}
    assert (await holding.buffer.counts()).failed == 0
    assert (await holding.trigger_all(idempotency_key="k"))[0] != run_id
    await holding.drain()


async def test_a_failure_that_the_engine_is_away_to_record_costs_no_attempt_and_is_recorded_and_told_once_it_is_back(
    holding: House, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = await holding.trigger()
    seen: list[int] = []

    class AwayAtTheEnd(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            if creations[0].ending is None:
                entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
                assert entry is not None
                seen.append(entry.attempts)
                raise RuntimeError("no room today")
            if len(seen) < 3:
                raise EngineUnavailableError("away")
            return await super().create_held_runs(creations)

    settings = replace(holding.settings, drain_max_attempts=1)
    mollifier = Mollifier(settings, engine=AwayAtTheEnd(holding.database), tasks=PostgresTaskCatalog(holding.database))
    drainer = mollifier.drainer()
    drainer.start()

    async def is_recorded() -> bool:
        return await holding.created(run_id) is not None

    await until(is_recorded)
    await drainer.stop()
    await mollifier.aclose()

    run = await holding.created(run_id)
    assert run is not None
    assert run.status is RunStatus.SYSTEM_FAILURE
    assert seen == [0, 0, 0]
    told = [record for record in caplog.records if record.message == "mollifier.entry_failed"]
    assert [vars(record)["fields"]["run_id"] for record in told] == [run_id]
    assert (await holding.buffer.counts()).failed == 0


async def test_a_run_that_was_cancelled_stays_cancelled_when_it_cannot_be_created(holding: House) -> None:
    run_id = await holding.trigger()
    entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry is not None
    assert await holding.buffer.patch(entry, patches.encode(patches.Cancel(datetime.now(UTC)))) == "held"

    class Refusing(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            if creations[0].ending is None or creations[0].ending.error is None:
                raise RuntimeError("no room today")
            return await super().create_held_runs(creations)

    settings = replace(holding.settings, drain_max_attempts=1)
    mollifier = Mollifier(settings, engine=Refusing(holding.database), tasks=PostgresTaskCatalog(holding.database))
    drainer = mollifier.drainer()
    drainer.start()

    async def is_recorded() -> bool:
        return await holding.created(run_id) is not None

    await until(is_recorded)
    await drainer.stop()
    await mollifier.aclose()

    run = await holding.created(run_id)
    assert run is not None
    assert run.status is RunStatus.CANCELED


async def test_an_outage_in_the_middle_of_a_batch_is_the_outcome_of_those_it_befell_alone(holding: House) -> None:
    entries = [await pop_held(holding) for _ in range(4)]

    class AwayForTheThird(PostgresRunEngine):
        async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
            if len(creations) == 4:
                raise RuntimeError("one of them is bad")
            if creations[0].snapshot.run_id == entries[2].run_id:
                raise EngineUnavailableError("away")
            return await super().create_held_runs(creations)

    mollifier = Mollifier(
        holding.settings, engine=AwayForTheThird(holding.database), tasks=PostgresTaskCatalog(holding.database)
    )
    outcomes = await mollifier.drain_handler()(entries)
    await mollifier.aclose()

    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), EngineUnavailableError, type(None)]


async def test_an_outage_while_a_change_is_carried_over_is_that_entrys_outcome_alone(holding: House) -> None:
    entries = [await pop_held(holding, tags=("a",)) for _ in range(3)]
    assert await holding.mollifier.drain_handler()(entries) == [None] * 3
    assert await holding.buffer.patch(entries[1], patches.encode(patches.AddTags(("b",)))) == "held"
    changed = await holding.buffer.get_entry(ENVIRONMENT.org_id, entries[1].run_id)
    assert changed is not None

    class AwayForChanges(PostgresRunEngine):
        async def carry_over(self, env_id: str, run_id: str, changes: Sequence[patches.Patch]) -> Run | None:
            raise EngineUnavailableError("away")

    mollifier = Mollifier(
        holding.settings, engine=AwayForChanges(holding.database), tasks=PostgresTaskCatalog(holding.database)
    )
    outcomes = await mollifier.drain_handler()([entries[0], changed, entries[2]])
    await mollifier.aclose()

    assert [type(outcome) for outcome in outcomes] == [type(None), EngineUnavailableError, type(None)]


async def test_a_held_trigger_on_an_idle_system_is_drained_without_waiting_for_a_poll(holding: House) -> None:
    holding.settings = replace(holding.settings, drain_poll_interval_ms=60_000)
    drainer = holding.mollifier.drainer()
    drainer.start()

    async def is_created(run_id: str) -> bool:
        return await holding.created(run_id) is not None

    for _ in range(3):
        run_id = await holding.trigger()
        await until(lambda run_id=run_id: is_created(run_id))
    await drainer.stop()


async def test_an_outage_of_the_database_loses_no_trigger_and_costs_no_attempt(own: tuple[Stack, House]) -> None:
    stack, house = own
    drainer = house.mollifier.drainer()
    drainer.start()

    await stack.stop("postgres")
    made = [await house.trigger(idempotency_key=f"k{number}") for number in range(5)]
    assert (await house.buffer.counts()).left == 5
    for run_id in made:
        run = await house.runs.get(ENVIRONMENT, run_id)
        assert run is not None
        assert run.status is RunStatus.QUEUED
    assert await house.runs.add_tags(ENVIRONMENT, made[0], ["during"]) is not None
    cancelled = await house.runs.cancel(ENVIRONMENT, made[1])
    assert cancelled is not None
    with pytest.raises(EngineUnavailableError):
        await house.runs.get(ENVIRONMENT, "run_unknown")
    await stack.start("postgres")

    async def is_drained() -> bool:
        return (await house.buffer.counts()).left == 0

    await until(is_drained, timeout_s=30)
    await drainer.stop()
    runs = [await house.created(run_id) for run_id in made]
    assert [run.status for run in runs if run is not None] == [
        RunStatus.QUEUED,
        RunStatus.CANCELED,
        *[RunStatus.QUEUED] * 3,
    ]
    assert runs[0] is not None
    assert runs[0].snapshot.tags == ("during",)
