"""Replayed letters on their way to the engine: one run each, one run per key, with every change that was made to them; and what is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from mollifier import dead_letters, snapshots
from mollifier.dead_letters import Outcome, Refused
from mollifier.engine import Creation
from mollifier.letters import Letter
from mollifier.model import RunFilter, RunStatus
from mollifier.telemetry import EVENTS_LOGGER
from tests.core.support import execute
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


async def dying(house: House, **options: Any) -> str:
    """Have a run held, and its entry given up."""
    run_id = await house.trigger(**options)
    await give_up(house)
    return run_id


async def give_up(house: House) -> None:
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await house.buffer.fail(entry, "ValueError: no room") == "held"


async def replay(house: House, run_id: str) -> None:
    (outcome,) = await dead_letters.replay_many(house.buffer, [run_id])
    assert isinstance(outcome, Letter)


async def ends(house: House, *run_ids: str) -> list[tuple[RunStatus, str]]:
    """Each run's status and what its error says."""
    runs = [await house.created(run_id) for run_id in run_ids]
    return [(run.status, run.error.message if run.error else "") for run in runs if run is not None]


async def test_a_replayed_run_is_created_with_the_changes_that_were_made_before_it_died(holding: House) -> None:
    run_id = await holding.trigger(tags=("a",))
    await holding.runs.add_tags(ENVIRONMENT, run_id, ["b"])
    await give_up(holding)
    await replay(holding, run_id)
    run = await holding.runs.get(ENVIRONMENT, run_id)
    assert (run and run.status, run and run.error, run and run.snapshot.tags) == (RunStatus.QUEUED, None, ("a", "b"))
    await holding.drain()
    created = await holding.created(run_id)
    assert created is not None
    assert (created.status, created.snapshot.tags) == (RunStatus.QUEUED, ("a", "b"))
    assert (await holding.buffer.counts()).left == 0


async def test_a_run_can_be_changed_before_and_after_its_replay(holding: House) -> None:
    run_id = await dying(holding)
    assert await holding.runs.add_tags(ENVIRONMENT, run_id, ["b"]) is not None
    await replay(holding, run_id)
    assert await holding.runs.add_tags(ENVIRONMENT, run_id, ["c"]) is not None
    await holding.drain()
    created = await holding.created(run_id)
    assert created is not None
    assert created.snapshot.tags == ("b", "c")


async def test_a_replayed_run_that_exists_already_makes_no_second_one(holding: House) -> None:
    run_id = await holding.trigger()
    entry = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert entry is not None
    await give_up(holding)
    await holding.create(Creation(snapshot=snapshots.decode(entry.payload)))
    await replay(holding, run_id)
    await holding.drain()
    runs = await holding.engine.list_runs(ENVIRONMENT.id, RunFilter())
    assert [run.id for run in runs.runs] == [run_id]
    assert (await holding.buffer.counts()).left == 0


async def test_a_replayed_run_whose_key_is_anothers_by_now_is_created_cancelled_and_names_that_one(
    holding: House,
) -> None:
    run_id = await dying(holding, idempotency_key="k")
    other, is_cached = await holding.trigger_all(idempotency_key="k")
    assert (other != run_id, is_cached) == (True, False)
    await holding.drain()
    await replay(holding, run_id)
    await holding.drain()
    first, second = await ends(holding, run_id, other)
    assert (first[0], other in first[1]) == (RunStatus.CANCELED, True)
    assert second == (RunStatus.QUEUED, "")
    assert await holding.trigger_all(idempotency_key="k") == (other, True)


async def test_of_a_replayed_run_and_a_held_one_with_its_key_the_first_to_be_created_has_it(holding: House) -> None:
    run_id = await dying(holding, idempotency_key="k")
    other = await holding.trigger(idempotency_key="k")
    await replay(holding, run_id)
    await holding.drain()
    first, second = await ends(holding, run_id, other)
    assert first == (RunStatus.QUEUED, "")
    assert (second[0], run_id in second[1]) == (RunStatus.CANCELED, True)


async def test_a_deleted_letter_is_no_run_any_more_and_its_key_is_free(holding: House) -> None:
    run_id = await dying(holding, idempotency_key="k")
    assert [run.id for run in (await holding.runs.list(ENVIRONMENT, RunFilter())).runs] == [run_id]
    (outcome,) = await dead_letters.delete_many(holding.buffer, [run_id])
    assert isinstance(outcome, Letter)
    assert await holding.runs.get(ENVIRONMENT, run_id) is None
    assert (await holding.runs.list(ENVIRONMENT, RunFilter())).runs == ()
    other = await holding.trigger(idempotency_key="k")
    await holding.drain()
    assert await ends(holding, other) == [(RunStatus.QUEUED, "")]


async def test_a_request_key_answers_with_a_dead_run_and_a_replayed_one_until_the_letter_is_deleted(
    holding: House,
) -> None:
    run_id = await dying(holding, request_key="r")
    assert await holding.trigger(request_key="r") == run_id
    await replay(holding, run_id)
    assert await holding.trigger(request_key="r") == run_id
    await give_up(holding)
    assert await holding.trigger(request_key="r") == run_id
    await dead_letters.delete_many(holding.buffer, [run_id])
    other = await holding.trigger(request_key="r")
    assert other != run_id
    await holding.drain()
    assert await ends(holding, other) == [(RunStatus.QUEUED, "")]


async def test_what_is_done_about_dead_letters_is_told_without_their_payloads(
    holding: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    run_ids = [await dying(holding, payload=b'"a secret"') for _ in range(3)]
    keys = holding.buffer.keyspace.of(ENVIRONMENT.org_id)
    await execute(holding.client, "DEL", keys.entry(run_ids[2]))
    outcomes: list[Outcome] = await dead_letters.replay_many(holding.buffer, [run_ids[0], run_ids[0], run_ids[2]])
    outcomes += await dead_letters.delete_many(holding.buffer, [*run_ids, "nobody"])
    assert [isinstance(outcome, Letter) for outcome in outcomes] == [True, False, False, True, True, False]
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    assert [(each.run_id, each.is_missing) for each in refused] == [
        (run_ids[2], False),
        (run_ids[0], True),
        ("nobody", True),
    ]
    told: list[tuple[str, dict[str, Any]]] = [
        (record.message, vars(record)["fields"]) for record in caplog.records if "dead_letter" in record.message
    ]
    whose = {"env_id": ENVIRONMENT.id, "org_id": ENVIRONMENT.org_id}
    assert told == [
        ("mollifier.dead_letter_replayed", {"run_id": run_ids[0], **whose, "reason": "failed"}),
        ("mollifier.dead_letter_deleted", {"run_id": run_ids[1], **whose, "reason": "failed"}),
        ("mollifier.dead_letter_deleted", {"run_id": run_ids[2], **whose, "reason": "evicted"}),
    ]
    await holding.drain()
