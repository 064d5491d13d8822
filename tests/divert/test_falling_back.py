"""Whatever store is away, the other takes the run; callers that need a synchronous answer are never held."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from mollifier.buffer import Buffer
from mollifier.embedded import Stack
from mollifier.engine import Creation
from mollifier.errors import BufferUnavailableError, EngineUnavailableError
from mollifier.model import BatchRequest, Entry, RunFilter, RunStatus
from mollifier.patches import AddTags, Cancel
from mollifier.postgres.engine import utc_now
from mollifier.postgres.upkeep import Upkeep
from tests.core.support import execute
from tests.divert.conftest import DEBOUNCED, ENVIRONMENT, STRANGER, House

pytestmark = pytest.mark.leaves_keys


async def test_without_the_buffers_server_triggers_are_created_directly(own: tuple[Stack, House]) -> None:
    stack, house = own
    await house.trip()
    await stack.stop("valkey")

    run_id = await house.trigger()
    keyed, cached = await house.trigger_all(idempotency_key="k")

    assert await house.created(run_id) is not None
    assert cached is False
    assert await house.trigger_all(idempotency_key="k") == (keyed, True)


async def test_without_the_buffers_server_a_run_that_is_not_in_the_engine_may_be_held(own: tuple[Stack, House]) -> None:
    stack, house = own
    await stack.stop("valkey")

    with pytest.raises(BufferUnavailableError):
        await house.runs.get(ENVIRONMENT, "run_unknown")


async def test_only_when_neither_store_takes_the_run_does_the_trigger_fail(own: tuple[Stack, House]) -> None:
    stack, house = own
    await stack.stop("postgres")
    await stack.stop("valkey")

    with pytest.raises(EngineUnavailableError):
        await house.trigger()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"debounce": DEBOUNCED}, id="debounce"),
        pytest.param({"one_time_token": "token"}, id="one-time token"),
        pytest.param({"resume_parent_on_completion": True}, id="trigger and wait"),
    ],
)
async def test_a_caller_that_needs_a_synchronous_answer_passes_a_tripped_gate(
    holding: House, options: dict[str, Any]
) -> None:
    parent = await holding.trigger(STRANGER)
    run_id = await holding.trigger(**options)

    assert parent
    created = await holding.created(run_id)
    assert created is not None
    assert (await holding.buffer.counts()).left == 0


async def test_a_caller_that_needs_a_synchronous_answer_is_not_held_in_an_outage_either(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    await stack.stop("postgres")

    with pytest.raises(EngineUnavailableError):
        await house.trigger(debounce=DEBOUNCED)
    assert (await house.buffer.counts()).left == 0


async def test_in_an_outage_of_the_engine_a_child_is_held_where_its_parent_is_and_nothing_happens_to_one_whose_parent_was_created(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    created = await house.trigger()
    await house.trip()
    held = await house.trigger()
    await stack.stop("postgres")

    child = await house.trigger(parent_run_id=held)
    with pytest.raises(EngineUnavailableError):
        await house.trigger(parent_run_id=created)

    entries = await house.buffer.list_entries(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert {entry.run_id for entry in entries if isinstance(entry, Entry)} == {held, child}


async def test_in_an_outage_of_the_engine_a_batch_is_refused_before_anything_happens_to_its_items(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    await house.trip()
    await stack.stop("postgres")

    with pytest.raises(EngineUnavailableError):
        await house.mollifier.batches.trigger(
            ENVIRONMENT, BatchRequest(run_count=2), [house.request(), house.request()]
        )
    assert (await house.buffer.counts()).left == 0


async def test_in_an_outage_of_the_engine_a_run_is_cancelled_for_good_unless_it_may_have_been_created(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    await house.trip()
    maybe_created = await house.trigger()
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await house.mollifier.drain_handler()([entry]) == [None]
    assert await house.buffer.requeue(entry) == "held"
    waiting = await house.trigger(delay=timedelta(hours=1))
    await stack.stop("postgres")

    assert await house.runs.reschedule(ENVIRONMENT, waiting, timedelta(hours=2)) is not None
    run = await house.runs.cancel(ENVIRONMENT, waiting)
    assert run is not None
    assert run.status is RunStatus.CANCELED
    with pytest.raises(EngineUnavailableError):
        await house.runs.cancel(ENVIRONMENT, maybe_created)

    await stack.start("postgres")
    await house.drain()
    await Upkeep(house.database, lambda: utc_now() + timedelta(hours=3)).advance()
    runs = await house.engine.get_runs(ENVIRONMENT.id, [maybe_created, waiting])
    assert {run_id: run.status for run_id, run in runs.items()} == {
        maybe_created: RunStatus.QUEUED,
        waiting: RunStatus.CANCELED,
    }


async def test_without_the_engine_triggers_of_an_organization_that_is_not_enrolled_are_not_held(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    unenrolled = replace(ENVIRONMENT, org_flags={"mollifierEnabled": False})
    monkeypatch.setattr(house.engine, "create_runs", fail)

    for options in ({}, {"idempotency_key": "k"}):
        with pytest.raises(EngineUnavailableError):
            await house.trigger(unenrolled, **options)
    assert (await house.buffer.counts()).left == 0


async def test_without_the_engine_triggers_of_an_enrolled_organization_are_held_when_the_gate_fails_open_too(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    monkeypatch.setattr(house.engine, "create_runs", fail)
    keys = house.buffer.keyspace.of(ENVIRONMENT.org_id)
    await execute(house.client, "SET", keys.rate(ENVIRONMENT.id), "no counts", "PX", 60_000)

    run_id = await house.trigger()

    assert await house.runs.get(ENVIRONMENT, run_id) is not None
    assert (await house.buffer.counts()).left == 1


async def test_a_held_run_can_be_a_parent(holding: House) -> None:
    parent = await holding.trigger()
    child = await holding.trigger(parent_run_id=parent)
    await holding.drain()

    created = await holding.created(child)
    assert created is not None
    assert (created.snapshot.parent_run_id, created.snapshot.root_run_id, created.snapshot.depth) == (parent, parent, 1)


async def test_a_run_that_was_created_meanwhile_is_cancelled_there(holding: House) -> None:
    run_id = await holding.trigger()
    held = await holding.runs.get(ENVIRONMENT, run_id)
    assert held is not None
    await holding.create(Creation(snapshot=held.snapshot))

    cancelled = await holding.runs.cancel(ENVIRONMENT, run_id)
    await holding.drain()

    assert cancelled is not None
    assert cancelled.status is RunStatus.CANCELED


async def test_where_nothing_is_diverted_an_outage_of_the_buffer_shows_to_nobody_who_asks_for_what_is_created(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    house.settings = replace(house.settings, divert=False)
    parent, run_id = await house.trigger(), await house.trigger(idempotency_key="k")
    await stack.stop("valkey")

    assert (await house.runs.get_many(ENVIRONMENT, [parent, run_id])).keys() == {parent, run_id}
    assert await house.runs.add_tags(ENVIRONMENT, run_id, ["t"]) is not None
    assert run_id in [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs]
    assert await house.trigger_all(idempotency_key="k") == (run_id, True)
    assert await house.created(await house.trigger(parent_run_id=parent)) is not None
    assert await house.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")


async def test_where_nothing_is_diverted_any_more_a_run_that_was_held_before_is_no_absence_in_an_outage_of_the_buffer(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    await house.trip()
    held = await house.trigger(idempotency_key="k")
    house.settings = replace(house.settings, divert=False)
    assert await house.runs.get(ENVIRONMENT, held) is not None
    await stack.stop("valkey")

    for asked in (
        house.runs.get(ENVIRONMENT, held),
        house.runs.get_many(ENVIRONMENT, [held]),
        house.runs.cancel(ENVIRONMENT, held),
        house.trigger(parent_run_id=held),
        house.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k"),
    ):
        with pytest.raises(BufferUnavailableError):
            await asked
    assert await house.created(held) is None


async def test_where_nothing_is_ever_held_an_outage_of_the_buffer_shows_to_no_caller(own: tuple[Stack, House]) -> None:
    stack, house = own
    house.settings = replace(house.settings, enabled=False)
    await stack.stop("valkey")

    assert await house.runs.get(ENVIRONMENT, "run_unknown") is None
    assert not await house.runs.reset_idempotency_key(ENVIRONMENT, "echo", "unknown")


async def test_a_reset_that_cannot_ask_both_stores_changes_nothing_and_can_be_made_again(
    own: tuple[Stack, House],
) -> None:
    stack, house = own
    created = await house.trigger(idempotency_key="k")
    await stack.stop("valkey")

    with pytest.raises(BufferUnavailableError):
        await house.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")
    assert await house.trigger_all(idempotency_key="k") == (created, True)

    await stack.start("valkey")
    assert await house.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")
    assert (await house.trigger_all(idempotency_key="k"))[0] != created


async def test_a_reset_that_loses_the_buffer_half_way_frees_the_key_of_the_held_run_when_made_again(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key belongs to a run of each store: one was created while the buffer was away."""
    held = await holding.trigger(idempotency_key="k")
    run = await holding.runs.get(ENVIRONMENT, held)
    assert run is not None
    await holding.create(Creation(snapshot=replace(run.snapshot, run_id="run_rival")))

    async def fail(*_: Any, **__: Any) -> None:
        raise BufferUnavailableError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(Buffer, "patch", fail)
        with pytest.raises(BufferUnavailableError):
            await holding.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")

    assert await holding.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")
    assert (await holding.trigger_all(idempotency_key="k"))[0] not in (held, "run_rival")


async def test_a_cancellation_is_carried_over_together_with_its_count(holding: House) -> None:
    run_id = await holding.trigger()
    held = await holding.runs.get(ENVIRONMENT, run_id)
    assert held is not None
    await holding.create(Creation(snapshot=held.snapshot))
    at = held.snapshot.created_at

    for _ in range(2):
        run = await holding.engine.carry_over(ENVIRONMENT.id, run_id, [AddTags(("a",)), Cancel(at), AddTags(("b",))])
        assert run is not None
        assert (run.status, run.snapshot.tags) == (RunStatus.CANCELED, ("a", "b"))
    await holding.drain()
