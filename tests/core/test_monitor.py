"""Monitor mode from end to end: what went into the buffer comes out, is told under the same hash, and then is gone."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from mollifier import snapshots
from mollifier.buffer import Buffer
from mollifier.engine import RunEngine
from mollifier.facade import Mollifier
from mollifier.model import Entry, EntryKind, EntryState, Environment, Snapshot, TriggerRequest
from mollifier.monitor import audit_handler
from mollifier.settings import Settings
from mollifier.telemetry import EVENTS_LOGGER
from tests.core.engines import AnyTask, MemoryEngine
from tests.core.observed import Observed
from tests.core.support import execute, hold, take, until

SETTINGS = Settings(
    enabled=True,
    redis_url="unix:///unused",
    partitions=4,
    trip_threshold=5,
    trip_window_ms=60_000,
    hold_ms=60_000,
    drain_poll_interval_ms=5,
)
ENROLLED = Environment(id="env", name="prod", project_id="proj", org_id="org", org_flags={"mollifierEnabled": True})
AWKWARD = [b"[]", b"9007199254740993", b'"\\u0000"', b"\xff\x00", "\N{SNOWMAN}".encode(), b"{}", b" 1 "]


def events(caplog: pytest.LogCaptureFixture, name: str) -> dict[str, dict[str, Any]]:
    """Return the fields of every event of this name, by run."""
    found = [r.__dict__["fields"] for r in caplog.records if r.name == EVENTS_LOGGER and r.getMessage() == name]
    by_run = {fields["run_id"]: fields for fields in found}
    assert len(by_run) == len(found)
    return by_run


async def test_everything_buffered_in_a_burst_is_drained_once_under_the_same_hash(
    redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    engine, observed = MemoryEngine(), Observed()
    mollifier = Mollifier(
        SETTINGS,
        engine=cast("RunEngine", engine),
        tasks=AnyTask(),
        redis=redis_client,
        telemetry=observed.telemetry,
    )
    for number in range(40):
        payload = AWKWARD[number % len(AWKWARD)]
        triggered = await mollifier.triggers.trigger(ENROLLED, TriggerRequest(task_id="task", payload=payload))
        for emit in triggered.after_answer:
            emit()
    assert len(engine.runs) == 40
    drainer = mollifier.drainer(audit_handler(observed.telemetry))
    drainer.start()

    async def everything_is_drained() -> bool:
        return len(events(caplog, "mollifier.drained")) == 35

    await until(everything_is_drained)
    assert await drainer.stop(5000)
    buffered, drained = events(caplog, "mollifier.buffered"), events(caplog, "mollifier.drained")
    assert list(buffered) == list(engine.runs)[5:]
    assert {run: f["payload_sha256"] for run, f in drained.items()} == {
        run: f["payload_sha256"] for run, f in buffered.items()
    }
    assert {f["attempts"] for f in drained.values()} == {1}
    assert mollifier.buffer is not None
    assert (await mollifier.buffer.counts()).left == 0


async def drained(buffer: Buffer, observed: Observed) -> tuple[Entry, BaseException | None]:
    """Pop one entry and give it to the handler; return it and its outcome."""
    entry = await take(buffer)
    (outcome,) = await audit_handler(observed.telemetry)([entry])
    return entry, outcome


def a_snapshot() -> Snapshot:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    return Snapshot(run_id="run", org_id="org", env_id="env", task_id="task", created_at=moment)


async def test_drained_tells_how_long_the_entry_was_held(
    buffer: Buffer, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    await hold(buffer, "run", payload=snapshots.encode(a_snapshot()))
    key = buffer.keyspace.of("org").entry("run")
    accepted_ms = int(await execute(redis_client, "HGET", key, "accepted_ms"))
    await execute(redis_client, "HSET", key, "accepted_ms", accepted_ms - 7000)
    await drained(buffer, Observed())
    assert 7000 <= events(caplog, "mollifier.drained")["run"]["dwell_ms"] < 60_000


@pytest.mark.leaves_keys
async def test_a_payload_that_is_no_snapshot_is_kept_as_failed_and_tells_nothing(
    redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    mollifier = Mollifier(SETTINGS, engine=cast("RunEngine", MemoryEngine()), tasks=AnyTask(), redis=redis_client)
    buffer = mollifier.buffer
    assert buffer is not None
    await hold(buffer, "run", payload=b"no snapshot", kind=EntryKind.HELD)
    drainer = mollifier.drainer(audit_handler(mollifier.telemetry))
    drainer.start()

    async def it_has_failed() -> bool:
        entry = await buffer.get_entry("org", "run")
        return entry is not None and entry.state is EntryState.FAILED

    await until(it_has_failed)
    assert await drainer.stop(5000)
    assert events(caplog, "mollifier.drained") == {}
    entry = await buffer.get_entry("org", "run")
    assert entry is not None
    assert (entry.payload, entry.attempts) == (b"no snapshot", 1)
