"""Every field of a snapshot survives the way into the database and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mollifier.engine import Created
from mollifier.model import Debounce, Run, RunError, RunStatus, Snapshot
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from tests.postgres.support import START, execute, read

# Postgres stores neither NUL nor half of a surrogate pair as text; the request parser refuses them in options.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=50)
names = texts.filter(bool)
moments = st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds UTC
durations = st.timedeltas(timedelta(0), timedelta(days=10_000))
numbers = st.integers(0, 2**31 - 1)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "run_id": st.uuids().map(lambda number: f"run_{number.hex}"),
    "org_id": names,
    "env_id": names,
    "task_id": names,
    "created_at": moments,
    "payload": st.binary(max_size=5000),
    "payload_type": texts,
    "context": optional(st.binary()),
    "metadata": optional(st.binary()),
    "metadata_type": texts,
    "tags": st.lists(texts, max_size=10).map(tuple),
    "idempotency_key": optional(texts),
    "idempotency_key_shown": optional(texts),
    "idempotency_expires_at": optional(moments),
    "request_key": optional(texts),
    "request_key_expires_at": optional(moments),
    "delayed_until": optional(moments),
    "ttl_s": optional(st.integers(0, 2**40)),
    "debounce": optional(
        st.builds(
            Debounce, key=texts, delay=durations, mode=st.sampled_from(["leading", "trailing"]), max_delay=durations
        )
    ),
    "queue": optional(names),
    "concurrency_key": optional(texts),
    "priority": st.integers(-(2**31), 2**31 - 1),
    "machine": optional(texts),
    "region": optional(texts),
    "max_attempts": optional(numbers),
    "max_duration_s": optional(st.integers(0, 2**40)),
    "test": st.booleans(),
    "lock_to_version": optional(texts),
    "external_deployment_id": optional(texts),
    "bulk_action_id": optional(texts),
    "parent_run_id": optional(texts),
    "root_run_id": optional(texts),
    "depth": numbers,
    "resume_parent_on_completion": st.booleans(),
    "batch_id": optional(texts),
    "trigger_function": st.sampled_from(["trigger", "triggerAndWait", "batchTrigger", "batchTriggerAndWait"]),
    "trigger_source": optional(texts),
    "replayed_from": optional(texts),
    "traceparent": optional(texts),
    "tracestate": optional(texts),
}
snapshots = st.fixed_dictionaries(FIELDS).map(lambda fields: Snapshot(**fields))


def test_no_field_is_left_out() -> None:
    assert set(FIELDS) == set(Snapshot.__struct_fields__)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(snapshots, min_size=1, max_size=5))
async def test_any_snapshots_come_back_as_they_went_in(engine: PostgresRunEngine, batch: list[Snapshot]) -> None:
    outcomes = await engine.create_runs(batch)

    for snap, outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, Created):
            assert (await read(engine, snap.run_id, snap.env_id)).snapshot == snap


async def test_what_came_of_a_run_comes_back_too(engine: PostgresRunEngine, database: Database) -> None:
    run = Run(
        snapshot=Snapshot(run_id="run_1", org_id="org", env_id="env", task_id="task", created_at=START),
        status=RunStatus.FAILED,
        updated_at=START + timedelta(seconds=4),
        started_at=START + timedelta(seconds=1),
        finished_at=START + timedelta(seconds=2),
        expired_at=START + timedelta(seconds=3),
        attempt_count=7,
        output=b'"\\u0000"\x00\xff',
        output_type="text/plain",
        error=RunError(message="nul \x00", name="Bad", stack_trace="line"),
        version="v1",
    )
    await engine.create_runs([run.snapshot])
    fields = (
        "updated_at",
        "started_at",
        "finished_at",
        "expired_at",
        "attempt_count",
        "output",
        "output_type",
        "version",
    )
    values = {name: getattr(run, name) for name in fields}
    assignments = ", ".join(f"{name} = :{name}" for name in (*fields, "status", "error"))

    statement = f"UPDATE runs SET {assignments}"  # noqa: S608 - made of constants
    await execute(database, statement, **values, status="FAILED", error=msgspec.json.encode(run.error))

    assert await read(engine, "run_1", "env") == run
