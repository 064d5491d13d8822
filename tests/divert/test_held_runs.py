"""A held run answers like a created one, takes changes like one, and becomes the run that would have been created."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from mollifier.errors import ConflictError, InvalidRequestError
from mollifier.model import MetadataOperation, Run, RunFilter, RunStatus
from tests.divert.conftest import ENVIRONMENT, STRANGER, House

pytestmark = pytest.mark.leaves_keys


def set_metadata(key: str, value: bytes) -> MetadataOperation:
    return MetadataOperation(type="set", key=key, value=value)


def increment(key: str) -> MetadataOperation:
    return MetadataOperation(type="increment", key=key, value=b"1")


async def get(house: House, run_id: str) -> Run:
    run = await house.runs.get(ENVIRONMENT, run_id)
    assert run is not None
    return run


async def test_a_mollified_trigger_is_held_and_not_created(holding: House) -> None:
    run_id = await holding.trigger()

    assert await holding.created(run_id) is None
    assert (await holding.buffer.counts()).queued == 1


async def test_a_held_run_reads_as_it_will_once_created(holding: House) -> None:
    run_id = await holding.trigger(tags=("a", "b"), metadata=b'{"x":1}', ttl=timedelta(hours=1))
    before = await get(holding, run_id)

    await holding.drain()

    after = await get(holding, run_id)
    assert after == await holding.created(run_id)
    assert msgspec.structs.replace(after, updated_at=before.updated_at) == before


async def test_a_held_run_does_not_exist_for_another_environment(holding: House) -> None:
    run_id = await holding.trigger()

    assert await holding.runs.get(STRANGER, run_id) is None
    assert await holding.runs.cancel(STRANGER, run_id) is None
    assert await holding.runs.add_tags(STRANGER, run_id, ["x"]) is None
    assert await holding.runs.change_metadata(STRANGER, run_id, [set_metadata("k", b"1")]) is None
    assert (await holding.runs.list(STRANGER, RunFilter())).runs == ()
    assert (await get(holding, run_id)).snapshot.tags == ()


async def test_a_run_cancelled_while_held_is_created_cancelled_and_has_no_job(holding: House) -> None:
    run_id = await holding.trigger(idempotency_key="k")

    cancelled = await holding.runs.cancel(ENVIRONMENT, run_id)

    assert cancelled is not None
    assert cancelled.status is RunStatus.CANCELED
    await holding.drain()
    created = await holding.created(run_id)
    assert created is not None
    assert created.status is RunStatus.CANCELED
    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)


async def test_changes_to_a_held_run_are_in_the_created_one(holding: House) -> None:
    until = datetime.now(UTC) + timedelta(days=3)
    run_id = await holding.trigger(delay=timedelta(hours=1), tags=("a",), metadata=b'{"n":1}')

    await holding.runs.add_tags(ENVIRONMENT, run_id, ["b"])
    await holding.runs.change_metadata(ENVIRONMENT, run_id, [increment("n"), set_metadata("s", b'"x"')])
    await holding.runs.reschedule(ENVIRONMENT, run_id, until)
    seen = await get(holding, run_id)
    await holding.drain()

    created = await holding.created(run_id)
    assert created is not None
    assert created.snapshot == seen.snapshot
    assert created.snapshot.tags == ("a", "b")
    assert msgspec.json.decode(created.snapshot.metadata or b"") == {"n": 2, "s": "x"}
    assert created.snapshot.delayed_until == until
    assert created.status is RunStatus.DELAYED


async def test_a_run_that_is_not_delayed_cannot_be_rescheduled_while_held(holding: House) -> None:
    run_id = await holding.trigger()

    with pytest.raises(ConflictError):
        await holding.runs.reschedule(ENVIRONMENT, run_id, timedelta(hours=1))


async def test_an_eleventh_tag_of_a_held_run_is_refused_and_changes_nothing(holding: House) -> None:
    run_id = await holding.trigger(tags=tuple("abcdefghij"))

    with pytest.raises(InvalidRequestError):
        await holding.runs.add_tags(ENVIRONMENT, run_id, ["k"])

    assert len((await get(holding, run_id)).snapshot.tags) == 10


async def test_concurrent_metadata_operations_on_a_held_run_lose_none_while_it_is_drained(holding: House) -> None:
    run_id = await holding.trigger()
    drainer = holding.mollifier.drainer()

    async def change() -> None:
        assert await holding.runs.change_metadata(ENVIRONMENT, run_id, [increment("n")]) is not None

    changing = [asyncio.create_task(change()) for _ in range(20)]
    drainer.start()
    await asyncio.gather(*changing)
    more = [asyncio.create_task(change()) for _ in range(20)]
    await asyncio.gather(*more)
    await holding.drain()
    await drainer.stop()

    created = await holding.created(run_id)
    assert created is not None
    assert msgspec.json.decode(created.snapshot.metadata or b"") == {"n": 40}


async def test_a_change_that_arrives_after_the_pop_is_carried_to_the_created_run(holding: House) -> None:
    run_id = await holding.trigger()
    entry = await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    handler = holding.mollifier.drain_handler()
    assert await handler([entry]) == [None]

    # The engine has the run, yet this change was made to the entry as it was read before.
    from mollifier import patches

    assert await holding.buffer.patch(entry, patches.encode(patches.AddTags(("late",)))) == "held"

    assert await holding.buffer.ack(entry) == "changed"
    current = await holding.buffer.get_entry(ENVIRONMENT.org_id, run_id)
    assert current is not None
    assert await handler([current]) == [None]
    assert await handler([current]) == [None]
    assert await holding.buffer.ack(current) == "held"
    created = await holding.created(run_id)
    assert created is not None
    assert created.snapshot.tags == ("late",)


async def test_an_entry_handed_over_twice_makes_one_run(holding: House) -> None:
    run_id = await holding.trigger()
    entry = await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    handler = holding.mollifier.drain_handler()

    assert await handler([entry]) == [None]
    assert await handler([entry]) == [None]

    assert [run.id for run in (await holding.engine.list_runs(ENVIRONMENT.id, RunFilter())).runs] == [run_id]
    await holding.buffer.ack(entry)


async def test_a_held_run_whose_time_to_live_is_over_is_created_expired(holding: House) -> None:
    run_id = await holding.trigger(ttl=timedelta(seconds=1))

    async def is_expired() -> bool:
        return (await get(holding, run_id)).status is RunStatus.EXPIRED

    from tests.core.support import until

    await until(is_expired)
    await holding.drain()

    created = await holding.created(run_id)
    assert created is not None
    assert created.status is RunStatus.EXPIRED


async def test_lists_show_held_and_created_runs_together_newest_first_in_stable_pages(house: House) -> None:
    made: list[str] = []
    for number in range(12):
        if number == 6:
            await house.trip()
        made.append(await house.trigger())
    assert (await house.buffer.counts()).queued == 6

    first = await house.runs.list(ENVIRONMENT, RunFilter(page_size=4))
    await house.drain()
    second = await house.runs.list(ENVIRONMENT, RunFilter(page_size=4, after=first.next))
    third = await house.runs.list(ENVIRONMENT, RunFilter(page_size=4, after=second.next))
    back = await house.runs.list(ENVIRONMENT, RunFilter(page_size=4, before=third.previous))

    assert [run.id for page in (first, second, third) for run in page.runs] == made[::-1]
    assert third.next is None
    assert back.runs == second.runs


async def test_filters_apply_to_held_runs(holding: House) -> None:
    tagged = await holding.trigger(tags=("x",))
    delayed = await holding.trigger(delay=timedelta(hours=1))

    async def ids(query: RunFilter) -> list[str]:
        return [run.id for run in (await holding.runs.list(ENVIRONMENT, query)).runs]

    assert await ids(RunFilter(tags=("x", "y"))) == [tagged]
    assert await ids(RunFilter(statuses=(RunStatus.DELAYED,))) == [delayed]
    assert await ids(RunFilter(statuses=(RunStatus.QUEUED,))) == [tagged]
    assert await ids(RunFilter(task_ids=("other",))) == []


async def test_a_run_that_is_created_but_not_settled_yet_is_listed_as_the_engine_has_it(holding: House) -> None:
    run_id = await holding.trigger()
    entry = await holding.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await holding.mollifier.drain_handler()([entry]) == [None]
    await holding.engine.cancel_run(ENVIRONMENT.id, run_id, datetime.now(UTC))

    async def ids(status: RunStatus) -> list[str]:
        return [run.id for run in (await holding.runs.list(ENVIRONMENT, RunFilter(statuses=(status,)))).runs]

    assert await ids(RunStatus.QUEUED) == []
    assert await ids(RunStatus.CANCELED) == [run_id]
    await holding.buffer.ack(entry)
