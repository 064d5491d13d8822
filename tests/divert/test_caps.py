"""Over a cap the policy applies: the run is created directly, or the trigger is rejected and has changed nothing.

And what is held when holding stops is drained all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from mollifier.buffer import Acceptance
from mollifier.caps import CAPS, Cap
from mollifier.errors import EngineUnavailableError, OverCapError
from mollifier.facade import Mollifier
from mollifier.ids import item_run_id
from mollifier.model import BatchItem, BatchRequest, Environment, RunFilter, RunStatus, TriggerRequest
from mollifier.postgres.catalog import PostgresTaskCatalog
from tests.core.observed import Observed, labels
from tests.core.support import state_of
from tests.divert.conftest import DEBOUNCED, ENVIRONMENT, STRANGER, House
from tests.postgres.support import Outage

pytestmark = pytest.mark.leaves_keys

CREATE, REJECT = "create", "reject"
SISTER = Environment(id="env_c", name="prod", project_id="proj_a", org_id="org_a", org_flags={"mollifierEnabled": True})
COUNTED = "mollifier.over_cap"


def capped(house: House, policy: str, **caps: int) -> House:
    """The house under these caps alone."""
    house.settings = replace(house.settings, held_over_cap=policy, **{**dict.fromkeys(CAPS, 0), **caps})
    return house


def observed(house: House) -> Observed:
    """Have the house's triggers counted where the test can see it."""
    seen = Observed()
    house.mollifier = Mollifier(
        lambda: house.settings,
        engine=house.engine,
        tasks=PostgresTaskCatalog(house.database),
        telemetry=seen.telemetry,
        redis=house.client,
    )
    return seen


def requests(count: int, **options: Any) -> list[TriggerRequest]:
    return [TriggerRequest(task_id="echo", payload=b"%d" % n, **options) for n in range(count)]


async def batch(house: House, items: Sequence[TriggerRequest], **options: Any) -> list[str]:
    added = await house.mollifier.batches.trigger(ENVIRONMENT, BatchRequest(run_count=len(items), **options), items)
    return [added.batch.runs[index] for index in sorted(added.batch.runs)]


async def created(house: House) -> list[str]:
    """Every run that the engine has of the environment."""
    page = await house.engine.list_runs(ENVIRONMENT.id, RunFilter(page_size=100))
    return sorted(run.id for run in page.runs)


async def held(house: House) -> list[str]:
    places = await house.buffer.held_places(ENVIRONMENT.org_id, ENVIRONMENT.id, limit=1_000)
    return sorted(place.run_id for place in places)


# --- created directly ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [cap for cap in CAPS if cap.endswith("entries")])
async def test_over_a_cap_runs_are_created_directly_and_counted_by_cap(holding: House, cap: Cap) -> None:
    seen = observed(capped(holding, CREATE, **{cap: 2}))

    made = [await holding.trigger() for _ in range(5)]

    assert await held(holding) == sorted(made[:2])
    assert await created(holding) == sorted(made[2:])
    assert seen.points(COUNTED) == {labels(cap=cap, outcome="create"): 3}
    await holding.drain()
    assert await created(holding) == sorted(made)


async def test_what_was_drained_leaves_room(holding: House) -> None:
    capped(holding, REJECT, held_env_max_entries=2)
    first = [await holding.trigger() for _ in range(2)]
    with pytest.raises(OverCapError):
        await holding.trigger()
    await holding.drain()
    second = [await holding.trigger() for _ in range(2)]
    assert await held(holding) == sorted(second)
    assert await created(holding) == sorted(first)


async def test_a_key_over_the_cap_belongs_to_the_run_that_was_created(holding: House) -> None:
    capped(holding, CREATE, held_env_max_entries=1)
    await holding.trigger()
    run_id, cached = await holding.trigger_all(idempotency_key="k")
    assert await created(holding) == [run_id]
    assert (cached, await holding.trigger_all(idempotency_key="k")) == (False, (run_id, True))


async def test_of_a_batch_what_does_not_fit_is_created(holding: House) -> None:
    capped(holding, CREATE, held_env_max_entries=7)
    runs = await batch(holding, requests(10))
    assert await held(holding) == runs[:7]
    assert await created(holding) == runs[7:]


@pytest.mark.parametrize("policy", [CREATE, REJECT])
async def test_a_neighbour_is_held_as_ever(holding: House, policy: str) -> None:
    capped(holding, policy, held_env_max_entries=1)
    await holding.trigger()
    other = replace(ENVIRONMENT, id="env_x", org_id="org_x")
    for neighbour in (SISTER, other):
        await holding.trip(neighbour)
        await holding.trigger(neighbour)
        places = await holding.buffer.held_places(neighbour.org_id, neighbour.id)
        assert len(places) == 1


@pytest.mark.parametrize("policy", [CREATE, REJECT])
async def test_who_is_never_held_is_never_capped(holding: House, policy: str) -> None:
    capped(holding, policy, held_env_max_entries=1)
    parent = await holding.trigger()
    debounced = await holding.trigger(debounce=DEBOUNCED)
    waited_for = await holding.trigger(parent_run_id=parent, resume_parent_on_completion=True)
    with_token = await holding.trigger(one_time_token="token")
    stranger = await holding.trigger(STRANGER)
    assert await created(holding) == sorted([debounced, waited_for, with_token])
    assert await holding.engine.get_run(STRANGER.id, stranger) is not None


async def test_audit_copies_are_never_rejected(holding: House) -> None:
    capped(holding, REJECT, held_env_max_entries=1)
    holding.settings = replace(holding.settings, divert=False)
    made = [await holding.trigger() for _ in range(3)]
    assert await created(holding) == sorted(made)
    assert (await holding.buffer.counts()).queued == 3


# --- rejected ------------------------------------------------------------------------------------------------------


async def test_a_rejected_trigger_changes_nothing(holding: House) -> None:
    seen = observed(capped(holding, REJECT, held_env_max_entries=1))
    await holding.trigger()
    before = await state_of(holding.client)

    options: dict[str, Any]
    for options in ({}, {"idempotency_key": "k"}, {"request_key": "r"}):
        with pytest.raises(OverCapError) as rejected:
            await holding.trigger(**options)
        assert (rejected.value.cap, rejected.value.fits) == ("held_env_max_entries", True)

    after = await state_of(holding.client)
    assert {key: after[key] for key in after if ":rate:" not in key} == {
        key: before[key] for key in before if ":rate:" not in key
    }
    assert await created(holding) == []
    assert seen.points(COUNTED) == {labels(cap="held_env_max_entries", outcome="reject"): 3}


async def test_a_key_that_was_rejected_is_free_for_the_next_trigger(holding: House) -> None:
    capped(holding, REJECT, held_env_max_entries=1)
    first = await holding.trigger()
    with pytest.raises(OverCapError):
        await holding.trigger(idempotency_key="k", request_key="r")
    await holding.drain()
    run_id, cached = await holding.trigger_all(idempotency_key="k", request_key="r")
    assert (await held(holding), await created(holding), cached) == ([run_id], [first], False)


async def test_a_key_that_is_bound_to_a_held_run_answers_at_the_cap(holding: House) -> None:
    capped(holding, REJECT, held_env_max_entries=1)
    run_id = await holding.trigger(idempotency_key="k", request_key="r")
    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)
    assert await holding.trigger_all(request_key="r") == (run_id, False)


@pytest.mark.parametrize("calm", [False, True], ids=["all to be held", "some to be created"])
async def test_a_batch_is_rejected_as_a_whole_before_anything_has_happened(holding: House, calm: bool) -> None:
    capped(holding, REJECT, held_env_max_entries=9)
    # Of the eight in the batch two pass, where the gate is not tripped when they come.
    holding.settings = replace(holding.settings, trip_threshold=6, trip_window_ms=3_600_000, hold_ms=3_600_000)
    waiting = sorted([await holding.trigger() for _ in range(4)])
    if calm:
        await holding.calm()
    items = requests(8)
    items[3] = replace(items[3], idempotency_key="k")

    with pytest.raises(OverCapError) as rejected:
        await batch(holding, items, request_key="r")

    assert (rejected.value.cap, rejected.value.fits) == ("held_env_max_entries", True)
    assert (await held(holding), await created(holding)) == (waiting, [])

    # Once there is room, the same request makes each of its items once.
    await holding.drain()
    runs = await batch(holding, items, request_key="r")
    assert await holding.trigger_all(idempotency_key="k") == (runs[3], True)
    await holding.drain()
    assert await created(holding) == sorted([*waiting, *runs])


async def test_a_batch_that_is_sent_again_while_its_items_are_held_is_not_rejected(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The items were held, the record was not written, and no answer came."""
    capped(holding, REJECT, held_env_max_entries=5)

    async def break_off(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(holding.engine, "add_batch_runs", break_off)
        with pytest.raises(EngineUnavailableError):
            await batch(holding, requests(5), request_key="r")
    assert len(await held(holding)) == 5

    assert await batch(holding, requests(5), request_key="r") == await held(holding)


async def test_what_is_too_much_at_once_is_told_apart_from_what_may_come_later(holding: House) -> None:
    capped(holding, REJECT, held_env_max_entries=5, held_env_max_bytes=100_000)
    for too_much in (batch(holding, requests(6)), holding.trigger(payload=b'"%s"' % (b"x" * 100_000))):
        with pytest.raises(OverCapError) as rejected:
            await too_much
        assert not rejected.value.fits
    assert (await held(holding), await created(holding)) == ([], [])


async def test_items_of_a_batch_whose_room_others_took_meanwhile_are_created(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    capped(holding, REJECT, held_env_max_entries=5)
    find_over_cap, others = holding.buffer.find_over_cap, list[str]()

    async def let_others_in(entries: Sequence[Acceptance]) -> Cap | None:
        found = await find_over_cap(entries)
        others.extend([await holding.trigger() for _ in range(3)])
        return found

    monkeypatch.setattr(holding.buffer, "find_over_cap", let_others_in)
    runs = await batch(holding, requests(4))

    assert await held(holding) == sorted([*others, *runs[:2]])
    assert await created(holding) == runs[2:]


async def test_a_stream_goes_on_where_it_was_rejected_once_there_is_room(holding: House) -> None:
    capped(holding, REJECT, held_env_max_entries=4)
    announced = (await holding.mollifier.batches.create(ENVIRONMENT, BatchRequest(run_count=6))).batch
    items = [BatchItem(index, request) for index, request in enumerate(requests(6))]

    first = (await holding.mollifier.batches.add(ENVIRONMENT, announced, items[:3])).batch
    with pytest.raises(OverCapError):
        await holding.mollifier.batches.add(ENVIRONMENT, first, items[3:])
    assert len(await held(holding)) == 3
    await holding.drain()
    added = await holding.mollifier.batches.add(ENVIRONMENT, first, items)

    assert (added.accepted, added.deduplicated, added.batch.sealed) == (3, 3, True)
    await holding.drain()
    assert await created(holding) == [item_run_id(announced.id, index) for index in range(6)]


async def test_however_many_triggers_come_at_once_no_more_are_held_than_the_cap_says(holding: House) -> None:
    capped(holding, REJECT, held_env_max_entries=10)
    outcomes = await asyncio.gather(*(holding.trigger() for _ in range(60)), return_exceptions=True)
    made = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert {type(outcome) for outcome in outcomes} == {str, OverCapError}
    assert await held(holding) == sorted(made)
    assert (len(made), await created(holding)) == (10, [])


# --- with the engine away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "error"), [(CREATE, EngineUnavailableError), (REJECT, OverCapError)])
async def test_over_a_cap_and_without_the_engine_nobody_takes_a_mollified_trigger(
    holding: House, database_url: str, policy: str, error: type[Exception]
) -> None:
    capped(holding, policy, held_env_max_entries=2)
    made = [await holding.trigger()]
    outage = Outage(database_url)
    await outage.begin()
    try:
        made.append(await holding.trigger())
        with pytest.raises(error):
            await holding.trigger()
    finally:
        await outage.end()
    assert await held(holding) == sorted(made)


@pytest.mark.parametrize("policy", [CREATE, REJECT])
async def test_caps_hold_for_what_is_held_because_its_engine_is_away_and_then_it_fails(
    house: House, database_url: str, policy: str
) -> None:
    """It is not rejected: its creation may have happened, and the caller is told that nothing is known of it."""
    seen = observed(capped(house, policy, held_env_max_entries=2))
    await house.trigger()
    outage = Outage(database_url)
    await outage.begin()
    try:
        made = [await house.trigger() for _ in range(2)]
        with pytest.raises(EngineUnavailableError):
            await house.trigger()
    finally:
        await outage.end()
    assert await held(house) == sorted(made)
    assert seen.points(COUNTED) == {labels(cap="held_env_max_entries", outcome="fail"): 1}


# --- holding stops, draining goes on -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param({"enabled": False, "drainer_enabled": True}, id="the kill switch, with drainers left on"),
        pytest.param({"divert": False}, id="diverting off"),
        pytest.param({}, id="the organization's flag off"),
    ],
)
async def test_when_holding_stops_what_is_held_is_drained_and_what_comes_is_created(
    holding: House, stop: dict[str, bool]
) -> None:
    waiting = [await holding.trigger(idempotency_key=f"k{n}") for n in range(3)]
    cancelled = await holding.runs.cancel(ENVIRONMENT, waiting[2])
    holding.settings = replace(holding.settings, **stop)
    environment = ENVIRONMENT if stop else replace(ENVIRONMENT, org_flags={})

    direct = await holding.trigger(environment)

    assert cancelled is not None
    assert direct in await created(holding)
    assert await held(holding) == sorted(waiting)
    await holding.drain()
    assert await held(holding) == []
    assert await created(holding) == sorted([*waiting, direct])
    runs = [await holding.created(run_id) for run_id in waiting]
    statuses = [run.status for run in runs if run is not None]
    assert statuses == [RunStatus.QUEUED, RunStatus.QUEUED, RunStatus.CANCELED]
    assert await holding.trigger_all(environment, idempotency_key="k0") == (waiting[0], True)
