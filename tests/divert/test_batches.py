"""Batches while runs are held: each item passes the gate by itself, for a handful of round trips, and every item is one run."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from mollifier.batches import BatchAdded
from mollifier.engine import Creation
from mollifier.errors import BufferUnavailableError, EngineUnavailableError, InvalidRequestError, NotFoundError
from mollifier.ids import item_run_id
from mollifier.keys import idempotency_digest
from mollifier.model import (
    Batch,
    BatchItem,
    BatchRequest,
    BatchStatus,
    Debounce,
    Environment,
    Run,
    RunFilter,
    RunStatus,
    TriggerRequest,
)
from mollifier.server import Command, Server, connect
from tests.core.support import execute, state_of, until
from tests.divert.conftest import ENVIRONMENT, STRANGER, House
from tests.postgres.support import Statements

pytestmark = pytest.mark.leaves_keys

# Exactly what is above the threshold is held, however busy this machine is.
EXACT = {
    "trip_window_ms": 3_600_000,
    "hold_ms": 3_600_000,
    "gate_deadline_ms": 30_000,
    "accept_deadline_ms": 30_000,
}


def strict(house: House, threshold: int = 100) -> House:
    house.settings = msgspec.structs.replace(house.settings, trip_threshold=threshold, **EXACT)
    return house


def requests(count: int, **options: Any) -> list[TriggerRequest]:
    return [TriggerRequest(task_id="echo", payload=b"%d" % n, **options) for n in range(count)]


async def trigger(
    house: House, items: Sequence[TriggerRequest], environment: Environment = ENVIRONMENT, **options: Any
) -> BatchAdded:
    request = BatchRequest(run_count=len(items), **options)
    return await house.mollifier.batches.trigger(environment, request, items)


async def announce(house: House, run_count: int, **options: Any) -> Batch:
    return (await house.mollifier.batches.create(ENVIRONMENT, BatchRequest(run_count=run_count, **options))).batch


async def add(house: House, batch: Batch, items: Mapping[int, TriggerRequest]) -> BatchAdded:
    return await house.mollifier.batches.add(ENVIRONMENT, batch, [BatchItem(i, item) for i, item in items.items()])


def numbered(items: Sequence[TriggerRequest], start: int = 0) -> dict[int, TriggerRequest]:
    return dict(enumerate(items, start))


async def find(house: House, batch_id: str) -> Batch:
    batch = await house.mollifier.batches.find(ENVIRONMENT, batch_id)
    assert batch is not None
    return batch


async def status(house: House, batch_id: str) -> BatchStatus:
    return (await house.mollifier.batches.view(ENVIRONMENT, await find(house, batch_id))).status


def runs_of(batch: Batch) -> list[str]:
    return [batch.runs[index] for index in sorted(batch.runs)]


async def created(house: House) -> list[Run]:
    """Everything the engine has of the environment, oldest first, without what the runs carry."""
    found: list[Run] = []
    query = RunFilter(page_size=100)
    while True:
        page = await house.engine.list_runs(ENVIRONMENT.id, query)
        found += page.runs
        if page.next is None:
            return found[::-1]
        query = RunFilter(page_size=100, after=page.next)


async def payloads(house: House, run_ids: Sequence[str]) -> list[bytes]:
    found = await house.engine.get_runs(ENVIRONMENT.id, run_ids)
    return [found[run_id].snapshot.payload for run_id in run_ids]


async def held_ids(house: House) -> list[str]:
    places = await house.buffer.held_places(ENVIRONMENT.org_id, ENVIRONMENT.id, newest_first=False, limit=10_000)
    return [place.run_id for place in places]


async def end(house: House, run_ids: Sequence[str]) -> None:
    for run_id in run_ids:
        assert await house.runs.cancel(ENVIRONMENT, run_id) is not None


# --- a thousand at once --------------------------------------------------------------------------------------------


async def test_of_a_thousand_items_exactly_those_above_the_threshold_are_held_and_all_become_one_run_each_in_order(
    house: House,
) -> None:
    batch = (await trigger(strict(house, 100), requests(1000))).batch

    ids = [item_run_id(batch.id, index) for index in range(1000)]
    assert runs_of(batch) == ids
    assert [run.id for run in await created(house)] == ids[:100]
    assert await held_ids(house) == ids[100:]
    assert await status(house, batch.id) is BatchStatus.PENDING

    await house.drain()

    runs = await created(house)
    assert [run.id for run in runs] == ids
    assert await payloads(house, ids) == [b"%d" % n for n in range(1000)]
    assert {(run.snapshot.batch_id, run.snapshot.trigger_function) for run in runs} == {(batch.id, "batchTrigger")}
    assert await find(house, batch.id) == batch


async def test_a_batch_that_tips_the_environment_over_has_the_triggers_after_it_held(house: House) -> None:
    strict(house, 10)
    await trigger(house, requests(11))
    single = await house.trigger()
    assert single in await held_ids(house)


async def test_the_runs_of_a_batch_are_listed_while_some_are_held(house: House) -> None:
    batch = (await trigger(strict(house, 3), requests(10))).batch
    await house.trigger()

    page = await house.runs.list(ENVIRONMENT, RunFilter(batch_id=batch.id))

    assert [run.id for run in page.runs] == runs_of(batch)[::-1]


class Talk:
    """Counts what is said to the two servers: statements to the database, pipelines to the buffer's server."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self._statements = Statements(house.database)
        self._pipelines = 0
        run_many = Server.run_many

        async def counted(server: Server, commands: Sequence[Command]) -> list[Any]:
            self._pipelines += 1
            return await run_many(server, commands)

        monkeypatch.setattr(Server, "run_many", counted)

    def take(self) -> tuple[int, int]:
        """Return the two counts and start anew."""
        said = len(self._statements.asked), self._pipelines
        self._statements.asked.clear()
        self._pipelines = 0
        return said


@pytest.mark.parametrize("keyed", [False, True], ids=["without keys", "with keys"])
@pytest.mark.parametrize("threshold", [1, 1_000_000], ids=["held", "created"])
async def test_a_batch_costs_a_handful_of_round_trips_however_many_items_it_has(
    house: House, threshold: int, keyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict(house, threshold)
    parent = await house.trigger()
    talk = Talk(house, monkeypatch)
    numbers = itertools.count()

    async def cost(count: int) -> tuple[int, int]:
        items = [
            TriggerRequest(task_id="echo", idempotency_key=f"k{next(numbers)}" if keyed else None, parent_run_id=parent)
            for _ in range(count)
        ]
        talk.take()
        await trigger(house, items)
        return talk.take()

    # The server learns the scripts first.
    await cost(1)
    # Once a second one of them looks at what the other partitions hold, too.
    small = min([await cost(20) for _ in range(3)])
    large = min([await cost(400) for _ in range(3)])

    assert large == small
    statements, pipelines = large
    assert statements <= 5
    assert pipelines <= 5


async def test_the_gate_is_asked_once_for_a_batch(house: House) -> None:
    strict(house, 10)
    redis = connect(house.settings.redis_url or "")
    try:
        await execute(redis, "CONFIG", "RESETSTAT")
        await trigger(house, requests(200))
        stats = await execute(redis, "INFO", "commandstats")
    finally:
        await redis.aclose()
    assert stats["cmdstat_hincrby"]["calls"] == 1


# --- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "field"),
    [
        ({"task_id": "nobody's"}, NotFoundError, "items[3].task"),
        ({"parent_run_id": "run_nobodys"}, InvalidRequestError, "items[3].options.parentRunId"),
    ],
    ids=["unknown task", "unknown parent"],
)
async def test_one_bad_item_and_nothing_changes_anywhere(
    house: House, bad: dict[str, str], error: type[Exception], field: str
) -> None:
    strict(house, 2)
    items = requests(10)
    items[3] = msgspec.structs.replace(items[3], **bad)
    redis = connect(house.settings.redis_url or "")
    before = await state_of(redis)

    with pytest.raises(error) as caught:
        await trigger(house, items)

    match caught.value:
        case NotFoundError(field=blamed):
            assert blamed == field
        case InvalidRequestError(errors=errors):
            assert [error.field for error in errors] == [field]
        case other:
            raise other
    assert await state_of(redis) == before
    assert await created(house) == []
    await redis.aclose()


async def test_a_parent_of_another_environment_is_unknown_to_a_batch(house: House) -> None:
    theirs = await house.trigger(STRANGER)

    for act in (
        trigger(house, requests(2), parent_run_id=theirs),
        house.mollifier.batches.create(ENVIRONMENT, BatchRequest(run_count=2, parent_run_id=theirs)),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await act
        assert [error.field for error in caught.value.errors] == ["parentRunId"]


async def test_items_take_the_batchs_parent_unless_they_name_one_of_their_own(holding: House) -> None:
    parent, other = await holding.trigger(), await holding.trigger()
    items = requests(3)
    items[1] = msgspec.structs.replace(items[1], parent_run_id=other)

    batch = (await trigger(holding, items, parent_run_id=parent)).batch

    runs = await holding.runs.get_many(ENVIRONMENT, runs_of(batch))
    assert [runs[run_id].snapshot.parent_run_id for run_id in runs_of(batch)] == [parent, other, parent]
    assert {run.snapshot.depth for run in runs.values()} == {1}


async def test_a_batch_that_a_run_waits_for_passes_the_gate_by(holding: House) -> None:
    parent = await holding.trigger()

    batch = (await trigger(holding, requests(5), parent_run_id=parent, resume_parent_on_completion=True)).batch

    runs = await created(holding)
    assert [run.id for run in runs] == runs_of(batch)
    assert {run.snapshot.trigger_function for run in runs} == {"batchTriggerAndWait"}
    assert await held_ids(holding) == [parent]


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1, 1000], ids=["held", "created"])
async def test_items_that_share_a_key_are_one_run(house: House, threshold: int) -> None:
    strict(house, threshold)
    await house.trigger()
    items = [TriggerRequest(task_id="echo", idempotency_key=f"k{n % 3}") for n in range(9)]

    batch = (await trigger(house, items)).batch

    first = [item_run_id(batch.id, index) for index in range(3)]
    assert runs_of(batch) == first * 3
    assert runs_of(await find(house, batch.id)) == first * 3
    await house.drain()
    assert len(await created(house)) == 4


async def test_a_key_that_is_bound_already_answers_for_an_item_and_its_run_is_listed(house: House) -> None:
    direct = await house.trigger(idempotency_key="created")
    await house.trip()
    held = await house.trigger(idempotency_key="held")
    items = [
        TriggerRequest(task_id="echo", idempotency_key=key) for key in ("created", "new", "held", "created", "new")
    ]

    batch = (await trigger(house, items)).batch

    own = item_run_id(batch.id, 1)
    assert runs_of(await find(house, batch.id)) == [direct, own, held, direct, own]
    await house.drain()
    assert len(await created(house)) == 3


async def test_keys_are_shared_across_batches_before_and_after_the_runs_are_drained(holding: House) -> None:
    items = [TriggerRequest(task_id="echo", idempotency_key=f"k{n}") for n in range(20)]

    first = (await trigger(holding, items)).batch
    second = (await trigger(holding, items)).batch
    await holding.drain()
    third = (await trigger(holding, items)).batch

    assert runs_of(second) == runs_of(third) == runs_of(first)
    assert len({first.id, second.id, third.id}) == 3
    assert len(await created(holding)) == 20


async def test_batches_with_the_same_keys_in_any_order_that_come_at_once_make_each_run_once(house: House) -> None:
    strict(house, 30)
    keys = [f"k{n}" for n in range(40)]
    orders = [keys, keys[::-1], keys[20:] + keys[:20], keys[::3] + keys[1::3] + keys[2::3]]

    added = await asyncio.gather(
        *(trigger(house, [TriggerRequest(task_id="echo", idempotency_key=key) for key in order]) for order in orders)
    )
    await house.drain()

    by_key: dict[str, set[str]] = {}
    for order, one in zip(orders, added, strict=True):
        for key, run_id in zip(order, runs_of(one.batch), strict=True):
            by_key.setdefault(key, set()).add(run_id)
    assert {len(found) for found in by_key.values()} == {1}
    assert sorted(run.id for run in await created(house)) == sorted(run_id for (run_id,) in by_key.values())


async def test_a_batch_waits_for_a_key_that_somebody_has_claimed(holding: House) -> None:
    digest = idempotency_digest(ENVIRONMENT.id, "echo", "k5")
    await holding.buffer.claim(ENVIRONMENT.org_id, digest, "somebody", 200)
    items = [TriggerRequest(task_id="echo", idempotency_key=f"k{n}") for n in range(10)]

    batch = (await trigger(holding, items)).batch

    assert runs_of(batch) == [item_run_id(batch.id, index) for index in range(10)]


async def test_debounced_items_share_the_run_that_is_delayed(holding: House) -> None:
    debounce = Debounce(key="d", delay=timedelta(hours=1))

    batch = (await trigger(holding, requests(3, debounce=debounce))).batch

    assert set(runs_of(batch)) == {item_run_id(batch.id, 0)}
    assert await status(holding, batch.id) is BatchStatus.PENDING


# --- sending again -------------------------------------------------------------------------------------------------


async def test_a_request_that_is_sent_again_gets_the_batch_it_made(house: House) -> None:
    strict(house, 4)
    first = await trigger(house, requests(10), request_key="r")
    again = await trigger(house, requests(10), request_key="r")

    assert (again.batch, again.accepted, again.deduplicated) == (first.batch, 0, 10)
    await house.drain()
    assert len(await created(house)) == 10


async def test_a_batch_that_broke_off_before_it_was_recorded_is_completed_when_sent_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs were held and created, the record was not written, and no answer came."""
    strict(house, 4)
    recording = house.engine.add_batch_runs

    async def break_off(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    monkeypatch.setattr(house.engine, "add_batch_runs", break_off)
    with pytest.raises(EngineUnavailableError):
        await trigger(house, requests(10), request_key="r")
    monkeypatch.setattr(house.engine, "add_batch_runs", recording)
    assert len(await created(house)) == 4

    batch = (await trigger(house, requests(10), request_key="r")).batch
    await house.drain()

    assert runs_of(batch) == [item_run_id(batch.id, index) for index in range(10)]
    assert [run.id for run in await created(house)] == runs_of(batch)


async def test_an_item_that_was_held_and_comes_again_after_it_was_created_is_one_run(house: House) -> None:
    strict(house, 1)
    await house.trigger()
    batch = await announce(house, 2)
    await add(house, batch, numbered(requests(2)))
    await house.drain()

    # This caller does not know that the batch has them.
    added = await add(house, batch, numbered(requests(2)))

    assert added.batch.sealed
    await house.drain()
    assert len(await created(house)) == 3


# --- announced and streamed ----------------------------------------------------------------------------------------


async def test_items_come_in_any_order_and_the_batch_is_sealed_with_the_last(house: House) -> None:
    strict(house, 3)
    batch = await announce(house, 6)

    late = await add(house, batch, numbered(requests(3), start=3))
    assert (late.batch.sealed, late.accepted, sorted(late.batch.runs)) == (False, 3, [3, 4, 5])
    early = await add(house, late.batch, numbered(requests(3)))

    assert early.batch.sealed
    assert runs_of(early.batch) == [item_run_id(batch.id, index) for index in range(6)]
    assert await find(house, batch.id) == early.batch


async def test_repeating_an_index_is_harmless(house: House) -> None:
    batch = await announce(house, 4)
    first = await add(house, batch, numbered(requests(2)))

    again = await add(house, first.batch, numbered(requests(4)))
    twice = await house.mollifier.batches.add(
        ENVIRONMENT, again.batch, [BatchItem(0, requests(1)[0]), BatchItem(0, requests(1)[0])]
    )

    assert (again.accepted, again.deduplicated, again.batch.sealed) == (2, 2, True)
    assert (twice.accepted, twice.deduplicated) == (0, 2)
    assert len(await created(house)) == 4


async def test_of_items_with_one_index_in_one_call_the_first_counts(house: House) -> None:
    batch = await announce(house, 1)
    first, second = requests(2)

    added = await house.mollifier.batches.add(ENVIRONMENT, batch, [BatchItem(0, first), BatchItem(0, second)])

    assert (added.accepted, added.deduplicated) == (1, 1)
    (run,) = await created(house)
    assert await payloads(house, [run.id]) == [first.payload]


async def test_the_same_items_streamed_several_times_at_once_make_each_run_once(house: House) -> None:
    strict(house, 20)
    batch = await announce(house, 50)
    halves = [numbered(requests(50)), dict(list(numbered(requests(50)).items())[::-1])]

    await asyncio.gather(*(add(house, batch, items) for items in halves * 3))
    await house.drain()

    stored = await find(house, batch.id)
    assert stored.sealed
    assert sorted(run.id for run in await created(house)) == runs_of(stored)


async def test_a_batch_is_cached_under_its_idempotency_key(house: House) -> None:
    request = BatchRequest(run_count=3, idempotency_key="k")

    first = await house.mollifier.batches.create(ENVIRONMENT, request)
    again = await house.mollifier.batches.create(ENVIRONMENT, BatchRequest(run_count=5, idempotency_key="k"))
    theirs = await house.mollifier.batches.create(STRANGER, request)

    assert (first.is_cached, again.is_cached, theirs.is_cached) == (False, True, False)
    assert again.batch == first.batch
    assert theirs.batch.id != first.batch.id


async def test_a_batch_does_not_exist_for_another_environment(house: House) -> None:
    batch = (await trigger(house, requests(2))).batch
    assert await house.mollifier.batches.find(STRANGER, batch.id) is None


# --- status --------------------------------------------------------------------------------------------------------


async def test_a_batch_is_completed_once_all_of_its_runs_have_ended(house: House) -> None:
    strict(house, 2)
    batch = (await trigger(house, requests(4))).batch
    ids = runs_of(batch)

    await end(house, ids[:2])
    assert await status(house, batch.id) is BatchStatus.PENDING
    await end(house, ids[2:])
    assert await status(house, batch.id) is BatchStatus.COMPLETED
    await house.drain()
    view = await house.mollifier.batches.view(ENVIRONMENT, await find(house, batch.id))
    assert view.status is BatchStatus.COMPLETED
    assert view.updated_at > batch.created_at
    assert {run.status for run in await created(house)} == {RunStatus.CANCELED}


async def test_a_batch_whose_items_are_not_all_there_is_pending_whatever_its_runs(house: House) -> None:
    batch = (await add(house, await announce(house, 3), numbered(requests(2)))).batch
    await end(house, runs_of(batch))
    assert await status(house, batch.id) is BatchStatus.PENDING


async def test_held_runs_whose_time_to_live_is_over_have_ended(holding: House) -> None:
    batch = (await trigger(holding, requests(2, ttl=timedelta(seconds=1)))).batch

    async def is_completed() -> bool:
        return await status(holding, batch.id) is BatchStatus.COMPLETED

    assert not await is_completed()
    await until(is_completed)
    assert await created(holding) == []


async def test_runs_are_read_together_wherever_they_are(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    strict(house, 2)
    direct = await house.trigger()
    theirs = await house.trigger(STRANGER)
    held = await house.trigger(), await house.trigger()
    wanted = [held[1], direct, theirs, "run_none", held[0]]

    found = await house.runs.get_many(ENVIRONMENT, wanted)

    assert set(found) == {direct, *held}
    assert found[held[1]] == await house.runs.get(ENVIRONMENT, held[1])

    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    monkeypatch.setattr(house.engine, "get_runs", fail)
    assert set(await house.runs.get_many(ENVIRONMENT, [held[1]])) == {held[1]}
    with pytest.raises(EngineUnavailableError):
        await house.runs.get_many(ENVIRONMENT, wanted)


# --- outages -------------------------------------------------------------------------------------------------------


async def test_when_the_buffer_takes_nothing_all_items_are_created(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise BufferUnavailableError("gone")

    monkeypatch.setattr(holding.buffer, "accept_many", fail)
    batch = (await trigger(holding, requests(20))).batch
    assert [run.id for run in await created(holding)] == runs_of(batch)


async def test_when_the_engine_cannot_create_all_items_are_held(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(house.engine, "create_runs", fail)
        batch = (await trigger(strict(house, 5), requests(20))).batch
    assert await created(house) == []
    assert await held_ids(house) == runs_of(batch)
    await house.drain()
    assert [run.id for run in await created(house)] == runs_of(batch)


async def test_a_rival_that_took_an_items_key_meanwhile_is_met_when_the_item_is_drained(holding: House) -> None:
    batch = (await trigger(holding, [TriggerRequest(task_id="echo", idempotency_key="k")])).batch
    (run_id,) = runs_of(batch)
    held = await holding.runs.get(ENVIRONMENT, run_id)
    assert held is not None
    await holding.create(Creation(snapshot=msgspec.structs.replace(held.snapshot, run_id="run_rival")))

    await holding.drain()

    run = await holding.created(run_id)
    assert run is not None
    assert run.status is RunStatus.CANCELED
    assert await status(holding, batch.id) is BatchStatus.COMPLETED
