"""What every run engine must do: tests over the `engine` fixture, a `RunEngine`, and `clock`, which it goes by.

A module of tests for one engine provides the two fixtures and takes everything from here:

    from tests.engine_conformance import *
"""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from mollifier.engine import Created, Existing, RunEngine
from mollifier.errors import ConflictError, InvalidRequestError
from mollifier.expiry import EXPIRED_ERROR
from mollifier.ids import batch_id, item_run_id
from mollifier.model import Batch, Debounce, MetadataOperation, RunFilter, RunProgress, RunStatus, Snapshot
from mollifier.patches import Cancel, Patch, Reschedule
from tests.postgres.support import ENV, OTHER_ENV, START, Clock, create, read, snapshot

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


# --- creating ------------------------------------------------------------------------------------------------------


async def test_a_created_run_reads_as_queued_with_its_snapshot(engine: RunEngine) -> None:
    snap = snapshot(payload=b'{"big": 9007199254740993, "nul": "\\u0000"}', tags=("a", 'q"uo\\te', "{,}"))

    assert await engine.create_runs([snap]) == [Created(snap.run_id)]

    run = await read(engine, snap.run_id)
    assert (run.snapshot, run.status, run.attempt_count) == (snap, RunStatus.QUEUED, 0)


async def test_creating_nothing_creates_nothing(engine: RunEngine) -> None:
    assert await engine.create_runs([]) == []


async def test_a_batch_answers_one_outcome_per_snapshot_in_order(engine: RunEngine) -> None:
    there = await create(engine, idempotency_key="key", idempotency_expires_at=START + HOUR)
    first, second = snapshot(), snapshot()
    cached = snapshot(idempotency_key="key", idempotency_expires_at=START + HOUR)

    outcomes = await engine.create_runs([second, cached, first])

    assert outcomes == [Created(second.run_id), Existing(there, by="idempotency_key"), Created(first.run_id)]


async def test_a_snapshot_that_is_handed_over_twice_makes_one_run(engine: RunEngine) -> None:
    snap = snapshot(idempotency_key="key", request_key="request")
    await engine.create_runs([snap])

    assert await engine.create_runs([snap]) == [Existing(snap.run_id, by="run_id")]


async def test_duplicates_within_a_batch_are_settled_too(engine: RunEngine) -> None:
    twice = snapshot()
    keyed, same_key = snapshot(idempotency_key="key"), snapshot(idempotency_key="key")

    outcomes = await engine.create_runs([twice, twice, keyed, same_key])

    assert outcomes == [
        Created(twice.run_id),
        Existing(twice.run_id, by="run_id"),
        Created(keyed.run_id),
        Existing(keyed.run_id, by="idempotency_key"),
    ]


async def test_one_hundred_concurrent_triggers_of_one_key_make_one_run(engine: RunEngine) -> None:
    snaps = [snapshot(idempotency_key="key", idempotency_expires_at=START + HOUR) for _ in range(100)]

    outcomes = [outcome for (outcome,) in await asyncio.gather(*(engine.create_runs([snap]) for snap in snaps))]

    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Created)]
    cached = [outcome for outcome in outcomes if isinstance(outcome, Existing)]
    assert cached == [Existing(winner.run_id, by="idempotency_key")] * 99
    assert len((await engine.list_runs(ENV, RunFilter(page_size=100))).runs) == 1


async def test_concurrent_batches_with_the_same_keys_in_any_order_make_each_run_once(engine: RunEngine) -> None:
    keys = [f"key {number}" for number in range(20)]
    batches = [
        [snapshot(idempotency_key=key, request_key=f"{key}!") for key in order]
        for order in (keys, keys[::-1], keys[10:] + keys[:10], keys[::3] + keys[1::3] + keys[2::3])
    ]

    outcomes = await asyncio.gather(*(engine.create_runs(batch) for batch in batches))

    assert Counter(type(outcome) for batch in outcomes for outcome in batch) == {Created: 20, Existing: 60}
    runs = (await engine.list_runs(ENV, RunFilter(page_size=100))).runs
    assert sorted(run.snapshot.idempotency_key or "" for run in runs) == sorted(keys)


async def test_a_run_whose_time_to_live_is_over_is_created_expired(engine: RunEngine, clock: Clock) -> None:
    clock.turn(minutes=2)

    run_id = await create(engine, ttl_s=60, idempotency_key="key")

    run = await read(engine, run_id)
    over = START + MINUTE
    assert (run.status, run.expired_at, run.finished_at, run.updated_at) == (RunStatus.EXPIRED, over, over, over)
    assert run.error == EXPIRED_ERROR
    assert await engine.find_by_keys(snapshot(idempotency_key="key")) is None


# --- keys ----------------------------------------------------------------------------------------------------------


async def test_a_key_of_2048_characters_is_bound_like_any_other(engine: RunEngine) -> None:
    key = "\N{SNOWMAN}" * 2048
    run_id = await create(engine, idempotency_key=key, request_key=key)

    assert await engine.find_by_keys(snapshot(idempotency_key=key)) == Existing(run_id, by="idempotency_key")
    assert await engine.find_by_keys(snapshot(request_key=key)) == Existing(run_id, by="request_key")


@pytest.mark.parametrize(
    "asked",
    [
        {"idempotency_key": "other"},
        {"task_id": "other"},
        {"env_id": OTHER_ENV},
        {"task_id": "ech", "idempotency_key": "okey"},
    ],
)
async def test_an_idempotency_key_belongs_to_its_environment_and_task(engine: RunEngine, asked: dict[str, str]) -> None:
    await create(engine, idempotency_key="key")
    snap = snapshot(**{"idempotency_key": "key", **asked})

    assert await engine.find_by_keys(snap) is None
    assert await engine.create_runs([snap]) == [Created(snap.run_id)]


async def test_a_request_key_belongs_to_its_environment_whatever_the_task(engine: RunEngine) -> None:
    run_id = await create(engine, request_key="key")

    same = snapshot(request_key="key", task_id="other")
    assert await engine.find_by_keys(same) == Existing(run_id, by="request_key")
    assert await engine.create_runs([same]) == [Existing(run_id, by="request_key")]
    theirs = snapshot(request_key="key", env_id=OTHER_ENV)
    assert await engine.find_by_keys(theirs) is None
    assert await engine.create_runs([theirs]) == [Created(theirs.run_id)]


@pytest.mark.parametrize("kind", ["idempotency_key", "request_key"])
async def test_a_key_is_free_from_the_moment_its_lifetime_is_over(engine: RunEngine, kind: str) -> None:
    expires = {"idempotency_key": "idempotency_expires_at", "request_key": "request_key_expires_at"}[kind]
    first = await create(engine, **{kind: "key", expires: START + HOUR})
    late = {kind: "key", expires: START + 3 * HOUR}

    in_time = snapshot(created_at=START + HOUR - timedelta(microseconds=1), **late)
    assert await engine.find_by_keys(in_time) == Existing(first, by=kind)  # pyright: ignore[reportArgumentType]
    after = snapshot(created_at=START + HOUR, **late)
    assert await engine.find_by_keys(after) is None
    assert await engine.create_runs([after]) == [Created(after.run_id)]
    assert await engine.find_by_keys(after) == Existing(after.run_id, by=kind)  # pyright: ignore[reportArgumentType]


async def test_one_hundred_concurrent_triggers_of_an_expired_key_make_one_run(engine: RunEngine) -> None:
    await create(engine, idempotency_key="key", idempotency_expires_at=START + HOUR)
    late = {"created_at": START + 2 * HOUR, "idempotency_expires_at": START + 3 * HOUR}
    snaps = [snapshot(idempotency_key="key", **late) for _ in range(100)]

    outcomes = [outcome for (outcome,) in await asyncio.gather(*(engine.create_runs([snap]) for snap in snaps))]

    assert sum(isinstance(outcome, Created) for outcome in outcomes) == 1


async def test_the_request_key_answers_before_the_idempotency_key(engine: RunEngine) -> None:
    by_request = await create(engine, request_key="request")
    await create(engine, idempotency_key="key")

    found = await engine.find_by_keys(snapshot(request_key="request", idempotency_key="key"))

    assert found == Existing(by_request, by="request_key")


async def test_a_snapshot_without_keys_finds_nothing(engine: RunEngine) -> None:
    await create(engine)

    assert await engine.find_by_keys(snapshot()) is None


async def test_a_reset_frees_the_key_once_and_leaves_it_readable(engine: RunEngine) -> None:
    run_id = await create(engine, idempotency_key="key", idempotency_expires_at=START + HOUR)

    assert await engine.reset_idempotency_key(ENV, "echo", "key", START) == run_id
    assert await engine.reset_idempotency_key(ENV, "echo", "key", START) is None

    assert await engine.find_by_keys(snapshot(idempotency_key="key")) is None
    assert (await read(engine, run_id)).snapshot.idempotency_key == "key"


async def test_resetting_a_key_whose_lifetime_is_over_says_that_nothing_held_it(engine: RunEngine) -> None:
    await create(engine, idempotency_key="key", idempotency_expires_at=START + HOUR)

    assert await engine.reset_idempotency_key(ENV, "echo", "key", START + HOUR) is None


async def test_a_key_that_is_to_be_freed_of_one_run_stays_another_runs(engine: RunEngine) -> None:
    run_id = await create(engine, idempotency_key="key")

    assert await engine.reset_idempotency_key(ENV, "echo", "key", START, run_id="run_other") is None

    assert await engine.find_by_keys(snapshot(idempotency_key="key")) == Existing(run_id, by="idempotency_key")
    assert await engine.reset_idempotency_key(ENV, "echo", "key", START, run_id=run_id) == run_id
    assert await engine.find_by_keys(snapshot(idempotency_key="key")) is None


async def test_a_cancelled_run_keeps_its_key(engine: RunEngine) -> None:
    run_id = await create(engine, idempotency_key="key")
    await engine.cancel_run(ENV, run_id, START)

    assert await engine.find_by_keys(snapshot(idempotency_key="key")) == Existing(run_id, by="idempotency_key")


async def test_the_keys_of_many_snapshots_are_looked_up_together(engine: RunEngine) -> None:
    by_request = await create(engine, request_key="request")
    by_key = await create(engine, idempotency_key="key", idempotency_expires_at=START + HOUR)

    found = await engine.find_by_keys_many(
        [
            snapshot(),
            snapshot(idempotency_key="key"),
            snapshot(idempotency_key="other"),
            snapshot(request_key="request", idempotency_key="key"),
            snapshot(idempotency_key="key", created_at=START + HOUR),
            snapshot(idempotency_key="key", env_id=OTHER_ENV),
        ]
    )

    assert list(found) == [
        None,
        Existing(by_key, by="idempotency_key"),
        None,
        Existing(by_request, by="request_key"),
        None,
        None,
    ]
    assert list(await engine.find_by_keys_many([])) == []
    assert list(await engine.find_by_keys_many([snapshot(), snapshot()])) == [None, None]


# --- delaying and debouncing ---------------------------------------------------------------------------------------


async def test_a_delayed_run_reads_as_queued_from_its_due_moment_on(engine: RunEngine, clock: Clock) -> None:
    run_id = await create(engine, delayed_until=START + HOUR)

    clock.turn(hours=1, microseconds=-1)
    assert (await read(engine, run_id)).status is RunStatus.DELAYED
    clock.turn(microseconds=1)
    assert (await read(engine, run_id)).status is RunStatus.QUEUED


async def test_a_delay_that_is_over_already_delays_nothing(engine: RunEngine) -> None:
    run_id = await create(engine, delayed_until=START)

    assert (await read(engine, run_id)).status is RunStatus.QUEUED


@pytest.mark.parametrize("delay", [2 * HOUR, START + 2 * HOUR + MINUTE])
async def test_a_delayed_run_moves_when_rescheduled(engine: RunEngine, clock: Clock, delay: object) -> None:
    run_id = await create(engine, delayed_until=START + HOUR, ttl_s=60)
    at = clock.turn(minutes=1)

    run = await engine.reschedule_run(ENV, run_id, delay, at)  # pyright: ignore[reportArgumentType]

    assert run is not None
    assert run.snapshot.delayed_until == START + 2 * HOUR + MINUTE
    clock.turn(hours=1)
    assert (await read(engine, run_id)).status is RunStatus.DELAYED


async def test_a_run_that_is_not_delayed_any_more_cannot_be_rescheduled(engine: RunEngine, clock: Clock) -> None:
    due = await create(engine, delayed_until=START + HOUR)
    queued = await create(engine)
    clock.turn(hours=1)

    for run_id in (due, queued):
        with pytest.raises(ConflictError, match="QUEUED") as raised:
            await engine.reschedule_run(ENV, run_id, HOUR, clock.now)
        assert raised.value.field == "delay"


async def test_a_delay_beyond_the_calendar_is_refused(engine: RunEngine) -> None:
    run_id = await create(engine, delayed_until=START + HOUR)

    with pytest.raises(InvalidRequestError, match="delay"):
        await engine.reschedule_run(ENV, run_id, timedelta.max, START)


def debounced(
    at: timedelta, *, delay: timedelta = MINUTE, max_delay: timedelta = HOUR, mode: str = "leading", **fields: object
) -> Snapshot:
    moment = START + at
    debounce = Debounce(key="key", delay=delay, mode=mode, max_delay=max_delay)  # pyright: ignore[reportArgumentType]
    return snapshot(created_at=moment, delayed_until=moment + delay, debounce=debounce, **fields)


async def test_a_debounced_trigger_pushes_the_run_that_is_still_delayed(engine: RunEngine, clock: Clock) -> None:
    first = debounced(timedelta(0), payload=b"1")
    await engine.create_runs([first])
    clock.turn(seconds=30)

    outcome = await engine.create_runs([debounced(timedelta(seconds=30), payload=b"2", tags=("late",))])

    assert outcome == [Existing(first.run_id, by="debounce")]
    run = await read(engine, first.run_id)
    assert run.snapshot.delayed_until == START + timedelta(seconds=90)
    assert (run.snapshot.payload, run.snapshot.tags) == (b"1", ())


async def test_a_trailing_debounced_trigger_puts_its_own_content_in_place(engine: RunEngine) -> None:
    first = debounced(timedelta(0), payload=b"1", tags=("first",), metadata=b'{"n": 1}')
    last = debounced(
        timedelta(seconds=30), mode="trailing", payload=b"2", payload_type="text/plain", tags=("a", "b"), max_attempts=3
    )
    await engine.create_runs([first])

    await engine.create_runs([last])

    snap = (await read(engine, first.run_id)).snapshot
    assert (snap.payload, snap.payload_type, snap.tags, snap.max_attempts) == (b"2", "text/plain", ("a", "b"), 3)
    assert snap.metadata is None
    assert snap.created_at == START


async def test_debounced_triggers_push_no_further_than_the_longest_delay(engine: RunEngine, clock: Clock) -> None:
    first = debounced(timedelta(0), max_delay=3 * MINUTE)
    await engine.create_runs([first])

    for seconds in (50, 100, 150):
        clock.now = START + timedelta(seconds=seconds)
        await engine.create_runs([debounced(timedelta(seconds=seconds), max_delay=3 * MINUTE)])

    assert (await read(engine, first.run_id)).snapshot.delayed_until == START + 3 * MINUTE


async def test_a_debounced_trigger_never_pulls_the_run_forward(engine: RunEngine) -> None:
    first = debounced(timedelta(0), delay=10 * MINUTE)
    await engine.create_runs([first])

    await engine.create_runs([debounced(timedelta(seconds=1), delay=MINUTE)])

    assert (await read(engine, first.run_id)).snapshot.delayed_until == START + 10 * MINUTE


async def test_a_debounced_trigger_makes_a_new_run_once_the_old_one_is_due(engine: RunEngine, clock: Clock) -> None:
    first = debounced(timedelta(0))
    await engine.create_runs([first])
    clock.turn(minutes=1)

    second = debounced(MINUTE)
    assert await engine.create_runs([second]) == [Created(second.run_id)]
    assert (await read(engine, first.run_id)).snapshot.delayed_until == START + MINUTE


async def test_a_debounced_trigger_makes_a_new_run_once_the_old_one_is_cancelled(engine: RunEngine) -> None:
    first, second = debounced(timedelta(0)), debounced(timedelta(seconds=1))
    await engine.create_runs([first])
    await engine.cancel_run(ENV, first.run_id, START)

    assert await engine.create_runs([second]) == [Created(second.run_id)]


async def test_concurrent_triggers_of_one_debounce_key_share_one_run(engine: RunEngine) -> None:
    snaps = [debounced(timedelta(milliseconds=number)) for number in range(50)]

    outcomes = [outcome for (outcome,) in await asyncio.gather(*(engine.create_runs([snap]) for snap in snaps))]

    (winner,) = [outcome.run_id for outcome in outcomes if isinstance(outcome, Created)]
    assert {outcome.run_id for outcome in outcomes} == {winner}
    assert (await read(engine, winner)).snapshot.delayed_until == START + MINUTE + timedelta(milliseconds=49)


async def test_debounce_keys_of_other_tasks_and_environments_are_other_keys(engine: RunEngine) -> None:
    snaps = [debounced(timedelta(0)), debounced(timedelta(0), task_id="x"), debounced(timedelta(0), env_id=OTHER_ENV)]

    assert await engine.create_runs(snaps) == [Created(snap.run_id) for snap in snaps]


# --- reading and changing ------------------------------------------------------------------------------------------


async def test_a_run_of_another_environment_does_not_exist_for_any_operation(engine: RunEngine) -> None:
    run_id = await create(engine, delayed_until=START + HOUR, idempotency_key="key", tags=("a",))
    before = await read(engine, run_id)
    operation = MetadataOperation(type="set", key="a", value=b"1")

    assert await engine.get_run(OTHER_ENV, run_id) is None
    assert (await engine.list_runs(OTHER_ENV, RunFilter())).runs == ()
    assert await engine.cancel_run(OTHER_ENV, run_id, START) is None
    assert await engine.add_tags(OTHER_ENV, run_id, ["b"]) is None
    assert await engine.change_metadata(OTHER_ENV, run_id, [operation]) is None
    assert await engine.reschedule_run(OTHER_ENV, run_id, 2 * HOUR, START) is None
    assert await engine.reset_idempotency_key(OTHER_ENV, "echo", "key", START) is None
    assert await read(engine, run_id) == before


async def test_a_run_that_does_not_exist_is_none_for_every_operation(engine: RunEngine) -> None:
    assert await engine.get_run(ENV, "run_none") is None
    assert await engine.cancel_run(ENV, "run_none", START) is None
    assert await engine.add_tags(ENV, "run_none", ["b"]) is None
    assert await engine.change_metadata(ENV, "run_none", []) is None
    assert await engine.reschedule_run(ENV, "run_none", HOUR, START) is None


async def test_many_runs_are_read_together_without_those_of_other_environments(engine: RunEngine) -> None:
    first, second = await create(engine, tags=("a",)), await create(engine, delayed_until=START + HOUR)
    theirs = await create(engine, env_id=OTHER_ENV)

    runs = await engine.get_runs(ENV, [second, theirs, "run_none", first])
    progress = await engine.get_progress(ENV, [second, theirs, "run_none", first])

    assert runs == {run_id: await read(engine, run_id) for run_id in (first, second)}
    assert progress == {run_id: RunProgress(run.status, run.updated_at) for run_id, run in runs.items()}
    assert (progress[first].status, progress[second].status) == (RunStatus.QUEUED, RunStatus.DELAYED)
    assert await engine.get_runs(ENV, []) == await engine.get_progress(ENV, []) == {}


async def test_the_progress_of_a_delayed_run_is_that_of_a_queued_one_from_its_due_moment_on(
    engine: RunEngine, clock: Clock
) -> None:
    run_id = await create(engine, delayed_until=START + HOUR)
    clock.turn(hours=1)
    assert (await engine.get_progress(ENV, [run_id]))[run_id].status is RunStatus.QUEUED


async def test_a_run_names_its_children_oldest_first(engine: RunEngine) -> None:
    parent = await create(engine)
    late = await create(engine, parent_run_id=parent, created_at=START + MINUTE)
    early = await create(engine, parent_run_id=parent)
    await create(engine, parent_run_id=parent, env_id=OTHER_ENV)

    assert (await read(engine, parent)).children == (early, late)


async def test_a_cancelled_run_stays_as_it_was_cancelled_the_first_time(engine: RunEngine) -> None:
    run_id = await create(engine)

    cancelled = await engine.cancel_run(ENV, run_id, START + MINUTE)
    again = await engine.cancel_run(ENV, run_id, START + HOUR)

    assert cancelled is not None
    assert (cancelled.status, cancelled.finished_at) == (RunStatus.CANCELED, START + MINUTE)
    assert again == cancelled


@pytest.mark.parametrize("ttl_s", [None, 60])
@pytest.mark.parametrize("comes_first", ["the new delay", "the cancellation"])
async def test_a_run_that_is_carried_its_cancellation_and_a_new_delay_waits_for_nothing_more(
    engine: RunEngine, clock: Clock, comes_first: str, ttl_s: int | None
) -> None:
    run_id = await create(engine, delayed_until=START + HOUR, ttl_s=ttl_s)
    at = clock.turn(minutes=1)
    moves: list[Patch] = [Reschedule(START + 2 * HOUR, at), Cancel(at)]
    changes = moves if comes_first == "the new delay" else moves[::-1]

    run = await engine.carry_over(ENV, run_id, changes)

    assert run is not None
    assert (run.status, run.finished_at, run.updated_at) == (RunStatus.CANCELED, at, at)
    assert run.snapshot.delayed_until == START + (2 * HOUR if comes_first == "the new delay" else HOUR)
    with pytest.raises(ConflictError, match="CANCELED"):
        await engine.reschedule_run(ENV, run_id, HOUR, at)
    clock.turn(hours=3)
    assert (await read(engine, run_id)).status is RunStatus.CANCELED


async def test_tags_are_added_once_each_and_in_order(engine: RunEngine) -> None:
    run_id = await create(engine, tags=("b", "a"))

    run = await engine.add_tags(ENV, run_id, ["c", "a", "c"])

    assert run is not None
    assert run.snapshot.tags == ("b", "a", "c")


async def test_an_eleventh_tag_is_refused_and_changes_nothing(engine: RunEngine) -> None:
    run_id = await create(engine, tags=tuple("abcdefgh"))

    with pytest.raises(InvalidRequestError, match="tags"):
        await engine.add_tags(ENV, run_id, ["i", "j", "k"])

    assert (await read(engine, run_id)).snapshot.tags == tuple("abcdefgh")


async def test_concurrent_metadata_changes_lose_none(engine: RunEngine) -> None:
    run_id = await create(engine, metadata=b'{"kept": 1e2}')
    increment = MetadataOperation(type="increment", key="n", value=b"1")
    appends = [MetadataOperation(type="append", key="list", value=b"%d" % number) for number in range(30)]

    await asyncio.gather(*(engine.change_metadata(ENV, run_id, [increment, append]) for append in appends))

    metadata = (await read(engine, run_id)).snapshot.metadata
    assert metadata is not None
    assert b'"kept":1e2' in metadata
    assert b'"n":30' in metadata
    assert metadata.count(b",") == 29 + 2


async def test_a_metadata_change_that_cannot_be_applied_changes_nothing(engine: RunEngine) -> None:
    run_id = await create(engine, metadata=b'{"a": "text"}')
    operations = [
        MetadataOperation(type="set", key="b", value=b"1"),
        MetadataOperation(type="increment", key="a", value=b"1"),
    ]

    with pytest.raises(InvalidRequestError, match=r"operations\[1\]"):
        await engine.change_metadata(ENV, run_id, operations)

    assert (await read(engine, run_id)).snapshot.metadata == b'{"a": "text"}'


# --- listing -------------------------------------------------------------------------------------------------------


async def listed(engine: RunEngine, **query: object) -> list[str]:
    page = await engine.list_runs(ENV, RunFilter(**query))  # pyright: ignore[reportArgumentType]
    return [run.id for run in page.runs]


async def test_runs_are_listed_newest_first_and_by_id_within_a_moment(engine: RunEngine) -> None:
    await engine.create_runs(
        [
            snapshot(run_id="run_b"),
            snapshot(run_id="run_c", created_at=START - MINUTE),
            snapshot(run_id="run_a"),
            snapshot(run_id="run_d", created_at=START + MINUTE),
        ]
    )

    assert await listed(engine) == ["run_d", "run_b", "run_a", "run_c"]


async def test_pages_lead_to_both_ends_and_back(engine: RunEngine) -> None:
    ids = [await create(engine, created_at=START + number * MINUTE) for number in range(5)][::-1]

    first = await engine.list_runs(ENV, RunFilter(page_size=2))
    second = await engine.list_runs(ENV, RunFilter(page_size=2, after=first.next))
    third = await engine.list_runs(ENV, RunFilter(page_size=2, after=second.next))
    back = await engine.list_runs(ENV, RunFilter(page_size=2, before=third.previous))
    start = await engine.list_runs(ENV, RunFilter(page_size=2, before=back.previous))

    assert [[run.id for run in page.runs] for page in (first, second, third)] == [ids[:2], ids[2:4], ids[4:]]
    assert (first.previous, third.next) == (None, None)
    assert (back.runs, start.runs) == (second.runs, first.runs)
    assert (start.previous, start.next) == (None, first.next)


async def test_a_page_that_is_exactly_full_is_the_last(engine: RunEngine) -> None:
    for _ in range(2):
        await create(engine)

    page = await engine.list_runs(ENV, RunFilter(page_size=2))

    assert (len(page.runs), page.next, page.previous) == (2, None, None)


async def test_pages_stay_where_they_are_while_runs_arrive(engine: RunEngine) -> None:
    ids = [await create(engine, created_at=START + number * MINUTE) for number in range(6)][::-1]
    seen: list[str] = []
    cursor = None
    while True:
        page = await engine.list_runs(ENV, RunFilter(page_size=2, after=cursor))
        seen += [run.id for run in page.runs]
        await create(engine, created_at=START + HOUR)
        cursor = page.next
        if cursor is None:
            break

    assert seen == ids


@pytest.mark.parametrize("cursor", ["", "x", "AAAA", "bnVsbA", "é", "WyIyMDI2LTAxLTAxIl0", "[]"])
@pytest.mark.parametrize("side", ["after", "before"])
async def test_a_cursor_that_no_page_gave_is_refused(engine: RunEngine, side: str, cursor: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await listed(engine, **{side: cursor})
    assert raised.value.errors[0].field == f"page[{side}]"


async def test_two_cursors_at_once_are_refused(engine: RunEngine) -> None:
    for _ in range(2):
        await create(engine)
    cursor = (await engine.list_runs(ENV, RunFilter(page_size=1))).next

    with pytest.raises(InvalidRequestError):
        await listed(engine, after=cursor, before=cursor)


async def test_each_filter_shows_what_it_names_and_all_must_hold(engine: RunEngine) -> None:
    plain = await create(engine)
    tagged = await create(engine, tags=("a", "b"), task_id="x")
    test = await create(engine, test=True, tags=("c",))
    batched = await create(engine, batch_id="batch", created_at=START + HOUR, task_id="x")
    cancelled = await create(engine)
    await engine.cancel_run(ENV, cancelled, START)

    assert set(await listed(engine, task_ids=("x",))) == {tagged, batched}
    assert set(await listed(engine, task_ids=("x", "echo"))) == {plain, tagged, test, batched, cancelled}
    assert set(await listed(engine, tags=("b", "c"))) == {tagged, test}
    assert await listed(engine, is_test=True) == [test]
    assert set(await listed(engine, is_test=False)) == {plain, tagged, batched, cancelled}
    assert await listed(engine, created_from=START + HOUR) == [batched]
    assert batched not in await listed(engine, created_to=START)
    assert await listed(engine, batch_id="batch") == [batched]
    assert await listed(engine, statuses=(RunStatus.CANCELED,)) == [cancelled]
    assert await listed(engine, statuses=(RunStatus.CANCELED,), task_ids=("x",)) == []


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((RunStatus.QUEUED,), {"due", "queued"}),
        ((RunStatus.DELAYED,), {"delayed"}),
        ((RunStatus.QUEUED, RunStatus.DELAYED), {"due", "delayed", "queued"}),
        ((RunStatus.CANCELED,), {"cancelled"}),
        ((RunStatus.CANCELED, RunStatus.DELAYED), {"cancelled", "delayed"}),
    ],
)
async def test_the_status_filter_goes_by_the_status_that_is_shown(
    engine: RunEngine, clock: Clock, statuses: tuple[RunStatus, ...], expected: set[str]
) -> None:
    await create(engine, run_id="due", delayed_until=START + MINUTE)
    await create(engine, run_id="delayed", delayed_until=START + HOUR)
    await create(engine, run_id="queued")
    await create(engine, run_id="cancelled", delayed_until=START + HOUR)
    await engine.cancel_run(ENV, "cancelled", START)
    clock.turn(minutes=1)

    page = await engine.list_runs(ENV, RunFilter(statuses=statuses))

    assert {run.id for run in page.runs} == expected
    assert {run.status for run in page.runs} <= set(statuses)


# --- batches -------------------------------------------------------------------------------------------------------


def batch_of(**fields: Any) -> Batch:
    defaults: dict[str, Any] = {
        "id": batch_id(START),
        "env_id": ENV,
        "run_count": 3,
        "created_at": START,
        "updated_at": START,
    }
    return Batch(**{**defaults, **fields})


async def test_a_batch_is_recorded_without_runs(engine: RunEngine) -> None:
    batch = batch_of(
        idempotency_key="key",
        idempotency_expires_at=START + HOUR,
        request_key="request",
        request_key_expires_at=START + HOUR,
        parent_run_id="run_parent",
        resume_parent_on_completion=True,
    )

    assert await engine.create_batch(batch) == Created(batch.id)

    assert await engine.get_batch(ENV, batch.id) == batch
    assert await engine.create_batch(batch) == Existing(batch.id, by="run_id")


async def test_a_batch_of_another_environment_does_not_exist(engine: RunEngine) -> None:
    batch = batch_of()
    await engine.create_batch(batch)

    assert await engine.get_batch(OTHER_ENV, batch.id) is None
    assert await engine.add_batch_runs(OTHER_ENV, batch.id, {0: "run_a"}, START) is None
    assert await engine.get_batch(ENV, batch.id) == batch
    assert await engine.get_batch(ENV, "batch_none") is None
    assert await engine.add_batch_runs(ENV, "batch_none", {0: "run_a"}, START) is None


async def test_runs_are_put_at_their_indexes_whether_the_batch_made_them_or_not(engine: RunEngine) -> None:
    batch = batch_of(run_count=5)
    await engine.create_batch(batch)
    own = [item_run_id(batch.id, index) for index in range(5)]

    first = await engine.add_batch_runs(ENV, batch.id, {4: own[4], 1: "run_cached"}, START + MINUTE)
    second = await engine.add_batch_runs(ENV, batch.id, {0: own[0], 3: own[0], 2: own[2]}, START + HOUR)

    assert first is not None
    assert (first.runs, first.sealed, first.updated_at) == ({1: "run_cached", 4: own[4]}, False, START + MINUTE)
    assert second is not None
    assert second.runs == {0: own[0], 1: "run_cached", 2: own[2], 3: own[0], 4: own[4]}
    assert second.sealed
    assert await engine.get_batch(ENV, batch.id) == second


async def test_an_index_that_is_taken_keeps_its_run(engine: RunEngine) -> None:
    batch = batch_of()
    await engine.create_batch(batch)
    own = item_run_id(batch.id, 0)
    await engine.add_batch_runs(ENV, batch.id, {0: own, 1: "run_cached"}, START)

    again = await engine.add_batch_runs(ENV, batch.id, {0: "run_other", 1: item_run_id(batch.id, 1)}, START)

    assert again is not None
    assert again.runs == {0: own, 1: "run_cached"}


async def test_runs_that_come_from_many_sides_at_once_are_all_there(engine: RunEngine) -> None:
    batch = batch_of(run_count=20)
    await engine.create_batch(batch)

    await asyncio.gather(
        *(
            engine.add_batch_runs(ENV, batch.id, {index: f"run_{side}", index + 1: f"run_{side}"}, START)
            for side, index in enumerate(range(19))
        )
    )

    stored = await engine.get_batch(ENV, batch.id)
    assert stored is not None
    assert sorted(stored.runs) == list(range(20))


@pytest.mark.parametrize(
    ("kind", "expires"),
    [("idempotency_key", "idempotency_expires_at"), ("request_key", "request_key_expires_at")],
)
async def test_a_batchs_key_answers_in_its_environment_until_its_lifetime_is_over(
    engine: RunEngine, kind: Any, expires: str
) -> None:
    def keyed(**fields: Any) -> Batch:
        return batch_of(**{kind: "\N{SNOWMAN}" * 2048, expires: START + HOUR, **fields})

    first, theirs = keyed(), keyed(env_id=OTHER_ENV)
    assert await engine.create_batch(first) == Created(first.id)
    assert await engine.create_batch(theirs) == Created(theirs.id)

    in_time = keyed(created_at=START + HOUR - timedelta(microseconds=1))
    assert await engine.create_batch(in_time) == Existing(first.id, by=kind)
    late = keyed(created_at=START + HOUR, **{expires: START + 2 * HOUR})
    assert await engine.create_batch(late) == Created(late.id)
    assert await engine.create_batch(keyed(created_at=START + HOUR)) == Existing(late.id, by=kind)


async def test_a_batchs_request_key_answers_before_its_idempotency_key(engine: RunEngine) -> None:
    ends = {"idempotency_expires_at": START + HOUR, "request_key_expires_at": START + HOUR}
    by_key = batch_of(idempotency_key="key", **ends)
    by_request = batch_of(request_key="request", **ends)
    await engine.create_batch(by_key)
    await engine.create_batch(by_request)

    outcome = await engine.create_batch(batch_of(idempotency_key="key", request_key="request", **ends))

    assert outcome == Existing(by_request.id, by="request_key")


async def test_a_hundred_batches_of_one_key_that_come_at_once_are_one(engine: RunEngine) -> None:
    batches = [batch_of(idempotency_key="key", idempotency_expires_at=START + HOUR) for _ in range(100)]

    outcomes = await asyncio.gather(*(engine.create_batch(batch) for batch in batches))

    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Created)]
    assert outcomes.count(Existing(winner.run_id, by="idempotency_key")) == 99
