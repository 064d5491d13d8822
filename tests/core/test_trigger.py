"""The trigger path: what is asked in which order, what the caller gets, and what is left behind."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import pytest
from redis.asyncio import Redis

from mollifier import snapshots
from mollifier.admission import Triggered
from mollifier.engine import RunEngine
from mollifier.errors import EngineUnavailableError, InvalidRequestError, NotFoundError
from mollifier.facade import Mollifier
from mollifier.model import Debounce, EntryKind, Environment, Run, RunStatus, Snapshot, TriggerRequest
from mollifier.settings import Settings
from mollifier.snapshots import take_snapshot
from mollifier.telemetry import EVENTS_LOGGER
from tests.core.engines import AnyTask, MemoryEngine
from tests.core.support import execute, state_of

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
FLAGGED = Environment(id="env", name="prod", project_id="proj", org_id="org", org_flags={"mollifierEnabled": True})
WATCHED = Environment(id="env-w", name="prod", project_id="proj-w", org_id="org-w")
PLAIN = TriggerRequest(task_id="task", payload=b'{"n": 1}')

# Every second trigger of an environment is a burst.
TIGHT = Settings(
    enabled=True, redis_url="unix:///unused", partitions=4, trip_threshold=1, trip_window_ms=60_000, hold_ms=60_000
)


def mollifier_of(
    redis: Redis | None, engine: MemoryEngine, settings: Settings | Callable[[], Settings] = TIGHT
) -> Mollifier:
    numbers = itertools.count(1)
    return Mollifier(
        settings,
        engine=cast("RunEngine", engine),
        tasks=AnyTask(),
        redis=redis,
        clock=lambda: NOW,
        new_run_id=lambda _: f"run_{next(numbers)}",
    )


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


async def burst(mollifier: Mollifier, environment: Environment, request: TriggerRequest = PLAIN) -> Triggered:
    """Trigger twice; return what became of the second, which is over the threshold."""
    await mollifier.triggers.trigger(environment, request)
    return await mollifier.triggers.trigger(environment, request)


def events_of(triggered: Triggered, caplog: pytest.LogCaptureFixture) -> list[tuple[str, Mapping[str, Any]]]:
    """Call what is left to do after the answer; return the events it emits."""
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    caplog.clear()
    for emit in triggered.after_answer:
        emit()
    return [(r.getMessage(), r.__dict__["fields"]) for r in caplog.records if r.name == EVENTS_LOGGER]


# --- off -----------------------------------------------------------------------------------------------------------


async def test_switched_off_the_run_is_created_and_nothing_else_happens(
    redis_client: Redis, engine: MemoryEngine
) -> None:
    mollifier = mollifier_of(redis_client, engine, msgspec.structs.replace(TIGHT, enabled=False))
    for _ in range(5):
        triggered = await mollifier.triggers.trigger(FLAGGED, PLAIN)
        assert triggered.after_answer == ()
    assert list(engine.runs) == [f"run_{n}" for n in range(1, 6)]
    assert await state_of(redis_client) == {}


async def test_switched_off_no_connection_to_the_buffers_server_is_opened(
    redis_client: Redis, redis_url: str, engine: MemoryEngine
) -> None:
    async def connections() -> int:
        return (await execute(redis_client, "INFO", "stats"))["total_connections_received"]

    before = await connections()
    mollifier = mollifier_of(None, engine, Settings(enabled=False, redis_url=redis_url))
    for _ in range(5):
        await mollifier.triggers.trigger(FLAGGED, PLAIN)
    assert await connections() == before
    await mollifier.aclose()


async def test_enabled_without_a_server_triggers_pass_and_nothing_happens(engine: MemoryEngine) -> None:
    mollifier = mollifier_of(None, engine, Settings(enabled=True))
    triggered = await burst(mollifier, FLAGGED)
    assert (triggered.result.run_id, triggered.after_answer) == ("run_2", ())
    await mollifier.aclose()


async def test_a_client_that_the_host_application_brings_is_enough(redis_client: Redis, engine: MemoryEngine) -> None:
    mollifier = mollifier_of(redis_client, engine, msgspec.structs.replace(TIGHT, redis_url=None))
    await burst(mollifier, FLAGGED)
    assert mollifier.buffer is not None
    assert await mollifier.buffer.get_entry("org", "run_2") is not None


# --- monitor -------------------------------------------------------------------------------------------------------


async def test_in_a_burst_an_enrolled_organizations_trigger_is_buffered_too_and_its_run_created(
    redis_client: Redis, engine: MemoryEngine
) -> None:
    mollifier = mollifier_of(redis_client, engine)
    triggered = await burst(mollifier, FLAGGED)
    assert triggered.result.run_id == "run_2"
    assert triggered.result.is_cached is False
    assert list(engine.runs) == ["run_1", "run_2"]
    assert mollifier.buffer is not None
    entry = await mollifier.buffer.get_entry("org", "run_2")
    assert entry is not None
    assert entry.kind is EntryKind.AUDIT
    assert snapshots.decode(entry.payload) == engine.runs["run_2"]
    assert await mollifier.buffer.get_entry("org", "run_1") is None


async def test_buffered_is_told_after_the_answer_with_the_hash_of_what_is_stored(
    redis_client: Redis, engine: MemoryEngine, caplog: pytest.LogCaptureFixture
) -> None:
    mollifier = mollifier_of(redis_client, engine)
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    triggered = await burst(mollifier, FLAGGED)
    assert [record for record in caplog.records if record.name == EVENTS_LOGGER] == []
    ((name, fields),) = events_of(triggered, caplog)
    assert mollifier.buffer is not None
    entry = await mollifier.buffer.get_entry("org", "run_2")
    assert entry is not None
    assert name == "mollifier.buffered"
    assert (fields["run_id"], fields["payload_bytes"]) == ("run_2", len(entry.payload))


async def test_a_failing_buffer_write_never_fails_the_trigger(
    redis_client: Redis, engine: MemoryEngine, caplog: pytest.LogCaptureFixture
) -> None:
    mollifier = mollifier_of(redis_client, engine)
    await mollifier.triggers.trigger(FLAGGED, PLAIN)
    for keys in mollifier.buffer.keyspace.partitions if mollifier.buffer else ():
        await execute(redis_client, "SET", keys.seq, "no number", "EX", 60)
    triggered = await mollifier.triggers.trigger(FLAGGED, PLAIN)
    assert (triggered.result.run_id, triggered.after_answer) == ("run_2", ())
    assert list(engine.runs) == ["run_1", "run_2"]
    (record,) = [record for record in caplog.records if record.getMessage() == "mollifier.failed_open"]
    assert record.__dict__["fields"]["part"] == "buffer"


async def test_a_server_that_is_away_never_fails_the_trigger(engine: MemoryEngine) -> None:
    mollifier = mollifier_of(None, engine, msgspec.structs.replace(TIGHT, redis_url="unix:///nowhere/valkey.sock"))
    triggered = await burst(mollifier, FLAGGED)
    assert (triggered.result.run_id, triggered.after_answer) == ("run_2", ())
    await mollifier.aclose()


# --- shadow --------------------------------------------------------------------------------------------------------


async def test_in_shadow_mode_a_burst_is_told_and_nothing_is_buffered(
    redis_client: Redis, engine: MemoryEngine, caplog: pytest.LogCaptureFixture
) -> None:
    mollifier = mollifier_of(redis_client, engine, msgspec.structs.replace(TIGHT, shadow_mode=True))
    triggered = await burst(mollifier, WATCHED)
    assert triggered.result.run_id == "run_2"
    assert [(name, fields["run_id"]) for name, fields in events_of(triggered, caplog)] == [
        ("mollifier.would_mollify", "run_2")
    ]
    assert {key.split(":")[2] for key in await state_of(redis_client)} == {"rate", "tripped"}


async def test_an_organization_neither_enrolled_nor_watched_leaves_no_trace(
    redis_client: Redis, engine: MemoryEngine
) -> None:
    triggered = await burst(mollifier_of(redis_client, engine), WATCHED)
    assert triggered.after_answer == ()
    assert await state_of(redis_client) == {}


# --- what never reaches the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (TriggerRequest(task_id="unknown-task"), NotFoundError),
        (TriggerRequest(task_id="task", parent_run_id="run_of_nobody"), InvalidRequestError),
    ],
    ids=["unknown task", "unknown parent"],
)
async def test_a_rejected_trigger_counts_against_no_rate_and_leaves_nothing_behind(
    redis_client: Redis, engine: MemoryEngine, request_: TriggerRequest, error: type[Exception]
) -> None:
    mollifier = mollifier_of(redis_client, engine)
    for _ in range(3):
        with pytest.raises(error):
            await mollifier.triggers.trigger(FLAGGED, request_)
    assert await state_of(redis_client) == {}
    assert engine.runs == {}


@pytest.mark.parametrize(
    ("request_", "cached"),
    [
        (TriggerRequest(task_id="task", idempotency_key="key"), True),
        (TriggerRequest(task_id="task", request_key="key"), False),
    ],
    ids=["idempotency key", "request key"],
)
async def test_a_trigger_that_a_key_answers_counts_against_no_rate(
    redis_client: Redis, engine: MemoryEngine, request_: TriggerRequest, cached: bool
) -> None:
    mollifier = mollifier_of(redis_client, engine)
    await mollifier.triggers.trigger(FLAGGED, request_)
    before = await state_of(redis_client)
    for _ in range(3):
        triggered = await mollifier.triggers.trigger(FLAGGED, request_)
        assert (triggered.result.run_id, triggered.result.is_cached) == ("run_1", cached)
    assert await state_of(redis_client) == before


@pytest.mark.parametrize(
    "request_",
    [
        TriggerRequest(task_id="task", debounce=Debounce(key="key", delay=timedelta(seconds=1))),
        TriggerRequest(task_id="task", one_time_token="token"),
        TriggerRequest(task_id="task", resume_parent_on_completion=True),
    ],
    ids=["debounce", "one-time token", "trigger and wait"],
)
async def test_who_needs_a_synchronous_answer_counts_against_no_rate(
    redis_client: Redis, engine: MemoryEngine, request_: TriggerRequest
) -> None:
    mollifier = mollifier_of(redis_client, engine)
    triggered = await burst(mollifier, FLAGGED, request_)
    assert (triggered.result.run_id, triggered.after_answer) == ("run_2", ())
    assert await state_of(redis_client) == {}


async def test_an_engine_that_cannot_be_reached_is_the_callers_error(redis_client: Redis, engine: MemoryEngine) -> None:
    engine.fault = EngineUnavailableError("down")
    with pytest.raises(EngineUnavailableError):
        await mollifier_of(redis_client, engine).triggers.trigger(FLAGGED, PLAIN)


async def test_settings_are_read_at_each_trigger(redis_client: Redis, engine: MemoryEngine) -> None:
    live = msgspec.structs.replace(TIGHT, enabled=False)
    mollifier = mollifier_of(redis_client, engine, lambda: live)
    await burst(mollifier, FLAGGED)
    assert await state_of(redis_client) == {}
    live = TIGHT
    assert len((await burst(mollifier, FLAGGED)).after_answer) == 1
    live = msgspec.structs.replace(TIGHT, enabled=False)
    assert (await burst(mollifier, FLAGGED)).after_answer == ()


# --- the snapshot --------------------------------------------------------------------------------------------------


def snapshot_of(request: TriggerRequest, parent: Run | None = None) -> Snapshot:
    return take_snapshot(FLAGGED, request, parent, "run", NOW)


def test_a_snapshot_has_every_field_of_its_request() -> None:
    request = TriggerRequest(
        task_id="task",
        payload=b"payload",
        payload_type="text/plain",
        context=b"context",
        metadata=b"metadata",
        metadata_type="application/super+json",
        tags=("a", "b"),
        queue="queue",
        concurrency_key="concurrency",
        priority=3,
        machine="machine",
        region="region",
        max_attempts=4,
        max_duration_s=5,
        test=True,
        lock_to_version="version",
        external_deployment_id="deployment",
        bulk_action_id="bulk",
        trigger_function="batchTrigger",
        trigger_source="source",
        traceparent="traceparent",
        tracestate="tracestate",
    )
    snapshot = snapshot_of(request)
    for field in request.__struct_fields__:
        value = getattr(request, field)
        if value is not None and hasattr(snapshot, field):
            assert getattr(snapshot, field) == value, field


@pytest.mark.parametrize(
    ("request_", "field", "value"),
    [
        (TriggerRequest(task_id="t", delay=timedelta(seconds=5)), "delayed_until", NOW + timedelta(seconds=5)),
        (TriggerRequest(task_id="t", delay=NOW + timedelta(days=1)), "delayed_until", NOW + timedelta(days=1)),
        (TriggerRequest(task_id="t"), "delayed_until", None),
        (
            TriggerRequest(task_id="t", debounce=Debounce(key="k", delay=timedelta(seconds=7))),
            "delayed_until",
            NOW + timedelta(seconds=7),
        ),
        (TriggerRequest(task_id="t", idempotency_key="k"), "idempotency_expires_at", NOW + timedelta(days=30)),
        (
            TriggerRequest(task_id="t", idempotency_key="k", idempotency_lifetime=timedelta(seconds=1)),
            "idempotency_expires_at",
            NOW + timedelta(seconds=1),
        ),
        (TriggerRequest(task_id="t"), "idempotency_expires_at", None),
        (TriggerRequest(task_id="t", request_key="k"), "request_key_expires_at", NOW + timedelta(hours=24)),
        (TriggerRequest(task_id="t"), "request_key_expires_at", None),
        (TriggerRequest(task_id="t", ttl=timedelta(minutes=2)), "ttl_s", 120),
    ],
)
def test_a_snapshots_moments_are_fixed_at_the_triggers_moment(
    request_: TriggerRequest, field: str, value: object
) -> None:
    snapshot = snapshot_of(request_)
    assert snapshot.created_at == NOW
    assert getattr(snapshot, field) == value


def test_a_child_notes_its_place_in_the_tree() -> None:
    root = Run(snapshot=snapshot_of(PLAIN), status=RunStatus.EXECUTING, updated_at=NOW)
    child = snapshot_of(TriggerRequest(task_id="task", parent_run_id="run"), root)
    assert (child.parent_run_id, child.root_run_id, child.depth) == ("run", "run", 1)
    middle = Run(snapshot=msgspec.structs.replace(child, run_id="child"), status=RunStatus.EXECUTING, updated_at=NOW)
    grandchild = snapshot_of(TriggerRequest(task_id="task", parent_run_id="child"), middle)
    assert (grandchild.parent_run_id, grandchild.root_run_id, grandchild.depth) == ("child", "run", 2)
