"""A run that was held is the run that would have been created directly, and reads so at every moment before."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import text

from mollifier.errors import MollifierError
from mollifier.model import BatchRequest, Environment, MetadataOperation, Run, RunStatus, TriggerRequest
from mollifier.postgres.engine import utc_now
from mollifier.postgres.upkeep import Upkeep
from tests.divert.conftest import ENVIRONMENT, House
from tests.postgres.support import Clock

pytestmark = pytest.mark.leaves_keys

DIRECT = Environment(id="env_direct", name="prod", project_id="proj_a", org_id="org_b", org_flags={})
WHOSE = {"id", "environment_id", "organization_id", "job_id"}
WHEN = {"updated_at", "expired_at", "finished_at"}
"""Upkeep stamps what time brings to a created run with the moment of its round; to a held one it has come at its own moment."""
LIFETIMES = {"idempotency_slot": "idempotency_expires_at", "request_slot": "request_key_expires_at"}

_examples = itertools.count()
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
hostile = st.binary(max_size=2000) | st.sampled_from(
    [
        b"",
        b"\x00",
        b'"\\u0000"',
        b"[]",
        b"{}",
        b"9007199254740993",
        b"-0.0",
        b'"\\ud800"',
        b"\xff\xfe",
        "\N{SNOWMAN}".encode(),
    ]
)
seconds = st.integers(1, 10**6).map(lambda number: timedelta(seconds=number))
briefly = st.integers(1, 100).map(lambda number: timedelta(seconds=number))
PASSED = datetime(2000, 1, 1, tzinfo=UTC)
FAR_OFF = datetime(2999, 1, 1, tzinfo=UTC)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


requests = st.builds(
    TriggerRequest,
    task_id=st.just("echo"),
    payload=hostile,
    payload_type=st.sampled_from(["application/json", "application/super+json", "text/plain", "application/store"]),
    context=optional(hostile),
    metadata=optional(
        st.sampled_from([b"{}", b"null", b"[]", b'{"k": [1e999, -0.0], "\\u0000": 9007199254740993}', b'{"k":7}'])
    ),
    metadata_type=st.sampled_from(["application/json", "application/super+json"]),
    tags=st.lists(texts, max_size=10, unique=True).map(tuple),
    idempotency_key=optional(texts),
    idempotency_key_shown=optional(texts),
    idempotency_lifetime=optional(seconds.map(lambda lifetime: lifetime + timedelta(hours=1))),
    request_key=optional(texts),
    delay=optional(briefly | seconds | st.just(FAR_OFF) | st.just(PASSED)),
    ttl=optional(briefly | seconds | st.just(timedelta.max)),
    queue=optional(texts),
    concurrency_key=optional(texts),
    priority=st.integers(-(2**31), 2**31 - 1),
    machine=optional(texts),
    region=optional(texts),
    max_attempts=optional(st.integers(1, 100)),
    max_duration_s=optional(st.integers(1, 2**31 - 1)),
    test=st.booleans(),
    lock_to_version=optional(texts),
    external_deployment_id=optional(texts),
    bulk_action_id=optional(texts),
    parent_batch=optional(texts),
    trigger_function=st.sampled_from(["trigger", "batchTrigger"]),
    trigger_source=optional(texts),
    replayed_from=optional(texts),
    traceparent=optional(st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
    tracestate=optional(texts),
)
depths = st.integers(0, 2)
passing = st.just(0) | st.integers(0, 200) | st.integers(0, 3000)
"""How long the run is held, seconds; less than any key lives."""


async def row_of(house: House, run_id: str) -> dict[str, Any]:
    """The run's columns as they are in the database."""
    async with house.database.statement() as connection:
        found = await connection.execute(text("SELECT * FROM runs WHERE id = :id"), {"id": run_id})
        return dict(found.mappings().one())


async def jobs_of(house: House, run_id: str) -> list[tuple[Any, ...]]:
    query = "SELECT queue_name, priority, status FROM procrastinate_jobs WHERE args->>'run_id' = :id"
    async with house.database.statement() as connection:
        return [tuple(row) for row in await connection.execute(text(query), {"id": run_id})]


async def ancestors_of(house: House, environment: Environment, depth: int) -> list[str]:
    """Trigger a line of runs, each the parent of the next; return their ids, the root first."""
    line: list[str] = []
    for _ in range(depth):
        line.append(await house.trigger(environment, parent_run_id=line[-1] if line else None))
    return line


async def read(house: House, run_id: str) -> Run:
    run = await house.runs.get(ENVIRONMENT, run_id)
    assert run is not None
    return run


async def assert_equal_rows(
    house: House,
    held: str,
    direct: str,
    *,
    but: Collection[str],
    ancestor_of: Mapping[str | None, str | None] | None = None,
) -> None:
    """Have a run that was held and one that was not differ in those columns only, and in when time brought what it brings."""
    row, expected = await row_of(house, held), await row_of(house, direct)
    if ancestor_of is not None:
        for name in ("parent_run_id", "root_run_id"):
            expected[name] = ancestor_of[expected[name]]
    for columns in (row, expected):
        # A key whose lifetime is over is free, whether or not somebody has asked for it and taken it from its run.
        for name, ends in LIFETIMES.items():
            columns[name] = None if (end := columns[ends]) is not None and end <= house.clock() else columns[name]
    different = {name for name in row if row[name] != expected[name]}.difference(but)
    assert different <= WHEN
    assert not different or RunStatus(row["status"]) in (RunStatus.EXPIRED, RunStatus.QUEUED)
    if row["status"] != RunStatus.EXPIRED:
        assert await jobs_of(house, held) == await jobs_of(house, direct)


def fresh(request: TriggerRequest) -> dict[str, Any]:
    """The request's options, with keys that no other example has."""
    unique = {
        name: f"{key[:20]}{next(_examples)}"
        for name in ("idempotency_key", "request_key")
        if (key := getattr(request, name)) is not None
    }
    fields = set(request.__struct_fields__) - {"task_id", "parent_run_id"}
    return {field: getattr(request, field) for field in fields} | unique


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests, depth=depths, held_s=passing)
async def test_a_run_created_through_the_buffer_equals_one_created_directly(
    holding: House, request: TriggerRequest, depth: int, held_s: int
) -> None:
    holding.clock = clock = Clock(utc_now())
    options = fresh(request)
    theirs, ours = [await ancestors_of(holding, environment, depth) for environment in (DIRECT, ENVIRONMENT)]

    direct = await holding.trigger(DIRECT, **options, parent_run_id=theirs[-1] if depth else None)
    held = await holding.trigger(ENVIRONMENT, **options, parent_run_id=ours[-1] if depth else None)
    assert await holding.created(held) is None
    clock.turn(seconds=held_s)
    seen = await read(holding, held)
    await holding.hand_over()
    read_again = await read(holding, held)
    await Upkeep(holding.database, clock).advance()

    assert seen == read_again == await holding.created(held)
    ancestor_of = {None: None, **dict(zip(theirs, ours, strict=True))}
    await assert_equal_rows(holding, held, direct, but=WHOSE, ancestor_of=ancestor_of)


changes = st.lists(
    st.one_of(
        st.tuples(st.just("tags"), st.lists(texts, max_size=4)),
        st.tuples(st.just("metadata"), st.integers(0, 9)),
        st.tuples(st.just("reschedule"), briefly | seconds),
        st.tuples(st.just("cancel"), st.none()),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=5,
)


async def change(house: House, environment: Environment, run_id: str, *, kind: str, value: Any, key: str | None) -> str:
    """Make one change, and return how it was answered."""
    try:
        match kind:
            case "tags":
                run = await house.runs.add_tags(environment, run_id, value)
            case "metadata":
                operation = MetadataOperation(type="append", key="k", value=str(value).encode())
                run = await house.runs.change_metadata(environment, run_id, [operation])
            case "reschedule":
                run = await house.runs.reschedule(environment, run_id, value)
            case "cancel":
                run = await house.runs.cancel(environment, run_id)
            case _:
                return str(key and await house.runs.reset_idempotency_key(environment, "echo", key))
    except MollifierError as error:
        return f"{type(error).__name__}: {error}"
    assert run is not None
    changed_at = run.updated_at if run.status is not RunStatus.EXPIRED else None
    return f"{run.status} {run.snapshot.tags} {run.snapshot.metadata} {run.snapshot.delayed_until} {changed_at}"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests, asked=changes, between_s=st.integers(0, 20))
async def test_changes_are_answered_for_a_held_run_as_for_a_created_one(
    holding: House, request: TriggerRequest, asked: list[tuple[str, Any]], between_s: int
) -> None:
    holding.clock = clock = Clock(utc_now())
    upkeep = Upkeep(holding.database, clock)
    options = fresh(request)
    key = options["idempotency_key"]
    direct = await holding.trigger(DIRECT, **options)
    held = await holding.trigger(ENVIRONMENT, **options)

    for kind, value in asked:
        clock.turn(seconds=between_s)
        await upkeep.advance()
        answers = [
            await change(holding, environment, run_id, kind=kind, value=value, key=key)
            for environment, run_id in ((DIRECT, direct), (ENVIRONMENT, held))
        ]
        assert answers[0] == answers[1]
    seen = await read(holding, held)
    await holding.hand_over()

    assert seen == await holding.created(held)
    row, expected = await row_of(holding, held), await row_of(holding, direct)
    different = {name for name in row if row[name] != expected[name]} - WHOSE
    assert different <= {*WHEN, "patch_count"}


# --- batches -------------------------------------------------------------------------------------------------------


async def batch_of(house: House, environment: Environment, items: Sequence[TriggerRequest]) -> list[str]:
    """Trigger the items as one batch; return the ids of their runs, in order."""
    added = await house.mollifier.batches.trigger(environment, BatchRequest(run_count=len(items)), items)
    return [added.batch.runs[index] for index in range(len(items))]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(requests, min_size=1, max_size=4), held_s=passing)
async def test_an_item_of_a_batch_created_through_the_buffer_equals_one_created_directly(
    holding: House, wanted: list[TriggerRequest], held_s: int
) -> None:
    holding.clock = clock = Clock(utc_now())
    items = [holding.request(**fresh(request)) for request in wanted]

    direct, held = [await batch_of(holding, environment, items) for environment in (DIRECT, ENVIRONMENT)]
    assert [await holding.created(run_id) for run_id in held] == [None] * len(items)
    clock.turn(seconds=held_s)
    seen = [await read(holding, run_id) for run_id in held]
    await holding.hand_over()
    await Upkeep(holding.database, clock).advance()

    assert seen == [await holding.created(run_id) for run_id in held]
    for one, other in zip(held, direct, strict=True):
        await assert_equal_rows(holding, one, other, but=WHOSE | {"batch_id"})


# --- keys that do not live as long ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    request=requests,
    lifetime=seconds,
    over=st.timedeltas(timedelta(milliseconds=1), timedelta(days=2)),
    successor=st.sampled_from(["none", "held", "created"]),
)
async def test_a_run_held_longer_than_its_key_lives_equals_one_created_directly_and_the_key_is_free(
    holding: House, request: TriggerRequest, lifetime: timedelta, over: timedelta, successor: str
) -> None:
    # What is bound in the buffer ends by the clock that the server shares with this process: all that passes has passed already.
    now = utc_now()
    holding.clock = clock = Clock(now - lifetime - over)
    upkeep = Upkeep(holding.database, clock)
    options = fresh(replace(request, idempotency_key=request.idempotency_key or "k", idempotency_lifetime=lifetime))
    await holding.trip()

    runs = [[await holding.trigger(environment, **options)] for environment in (DIRECT, ENVIRONMENT)]
    clock.now = now
    await upkeep.advance()
    if successor != "none":
        if successor == "created":
            await holding.calm()
        anew = {**options, "request_key": None}
        for environment, made in zip((DIRECT, ENVIRONMENT), runs, strict=True):
            run_id, cached = await holding.trigger_all(environment, **anew)
            assert not cached
            made.append(run_id)
    seen = await read(holding, runs[1][0])
    await holding.hand_over()
    await upkeep.advance()

    assert seen == await holding.created(runs[1][0])
    for direct, held in zip(*runs, strict=True):
        await assert_equal_rows(holding, held, direct, but=WHOSE)
    answers = [
        await holding.trigger_all(environment, **{**options, "request_key": None})
        for environment in (DIRECT, ENVIRONMENT)
    ]
    assert answers[0][1] == answers[1][1]
    assert (answers[1][0] in runs[1]) == answers[1][1]
    await holding.hand_over()
