"""The worker process: what it drains, what stops it at boot, and what it waits for."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio import Redis

from mollifier import snapshots
from mollifier.buffer import Buffer
from mollifier.config import Exporters
from mollifier.errors import SettingsError
from mollifier.keys import PARTITIONS, SWEEPER_CLAIM
from mollifier.model import Snapshot
from mollifier.observability import configure_telemetry
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.server import Server
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry
from mollifier.worker import run_worker_process
from tests.core.support import execute, until
from tests.working import Working, working

TASKS = ("mollifier.demo_tasks",)


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message == name]


def has_event(caplog: pytest.LogCaptureFixture, name: str) -> Callable[[], bool]:
    return lambda: bool(events(caplog, name))


def happened(caplog: pytest.LogCaptureFixture, name: str) -> Callable[[], Awaitable[bool]]:
    async def has_happened() -> bool:
        return has_event(caplog, name)()

    return has_happened


def fields_of(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    return [getattr(record, "fields", {}) for record in events(caplog, name)]


async def hold(buffer: Buffer, *run_ids: str) -> None:
    for run_id in run_ids:
        snapshot = Snapshot(
            run_id=run_id, org_id="org", env_id="env", task_id="echo", created_at=datetime.now(UTC), payload=b"{}"
        )
        await buffer.accept(run_id, "env", "org", snapshots.encode(snapshot))


async def is_empty(buffer: Buffer) -> bool:
    return (await buffer.counts()).left == 0


@pytest.mark.parametrize(
    "rollout",
    [
        pytest.param({"enabled": True}, id="switched on"),
        pytest.param({"enabled": False, "drainer_enabled": True}, id="switched off with the drainer left on"),
    ],
)
async def test_a_worker_drains_what_the_buffer_holds_and_says_so(
    rollout: dict[str, bool],
    redis_client: Redis,
    redis_url: str,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = Settings(redis_url=redis_url, database_url=database_url, tasks=TASKS, **rollout)  # pyright: ignore[reportArgumentType] - the parameters of one case
    buffer = Buffer(Server(redis_client), lambda: settings)
    await hold(buffer, "run_a", "run_b")

    with caplog.at_level(logging.INFO):
        async with working(settings):
            await until(lambda: is_empty(buffer))

    drained = [getattr(record, "fields", {}) for record in events(caplog, "mollifier.drained")]
    assert [(fields["run_id"], fields["attempts"]) for fields in drained] == [("run_a", 1), ("run_b", 1)]


async def test_a_worker_sweeps_and_stops_in_favour_of_others(
    redis_client: Redis, redis_url: str, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(redis_url=redis_url, database_url=database_url, tasks=TASKS, enabled=True)
    buffer = Buffer(Server(redis_client), lambda: settings)
    await hold(buffer, "run_a")
    keys = buffer.keyspace.of("org")
    # So no drainer is told of this organization.
    await execute(redis_client, "ZADD", keys.orgs, 2**42, "org")

    async with working(settings):
        await until(lambda: is_empty(buffer))
        assert await execute(redis_client, "EXISTS", SWEEPER_CLAIM) == 1

    assert fields_of(caplog, "mollifier.index_repaired") == [
        {"kind": "late", "org_id": "org", "env_id": "env", "level": "organization"}
    ]
    assert await execute(redis_client, "EXISTS", SWEEPER_CLAIM) == 0


async def test_a_worker_that_is_switched_off_opens_no_connection_to_the_buffers_server_and_warns_instead(
    redis_client: Redis, redis_url: str, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = (await execute(redis_client, "INFO", "stats"))["total_connections_received"]

    async with working(Settings(redis_url=redis_url, database_url=database_url, tasks=TASKS)) as worker:
        assert worker.drainer is None

    assert (await execute(redis_client, "INFO", "stats"))["total_connections_received"] == before
    (warning,) = events(caplog, "mollifier.not_draining")
    assert warning.levelno == logging.WARNING
    assert "MOLLIFIER_DRAINER_ENABLED=1" in getattr(warning, "fields", {})["detail"]


async def test_a_worker_without_a_buffer_has_nothing_to_warn_of(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(Settings(database_url=database_url, tasks=TASKS)):
        pass

    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert set(warned) <= {"mollifier.finding"}


async def test_a_worker_that_does_not_drain_warns_of_the_entries_it_leaves(
    redis_client: Redis, redis_url: str, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        redis_url=redis_url, database_url=database_url, tasks=TASKS, enabled=True, drainer_enabled=False
    )
    buffer = Buffer(Server(redis_client), lambda: settings)
    await hold(buffer, "run_a")

    async with working(settings) as worker:
        assert worker.drainer is None

    (warning,) = events(caplog, "mollifier.nobody_drains")
    assert getattr(warning, "fields", {})["entries"] == 1
    assert (await buffer.counts()).queued == 1


async def test_a_worker_examines_the_servers_when_it_starts_and_logs_what_would_lose_data(
    redis_url: str, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(redis_url=redis_url, database_url=database_url, tasks=TASKS, enabled=True, divert=True)

    with caplog.at_level(logging.INFO):
        async with working(settings):
            await until(happened(caplog, "mollifier.examined"))

    found = {fields["check"]: fields for fields in fields_of(caplog, "mollifier.finding")}
    # The servers of these tests keep nothing on disk; that nobody drains is not said of a worker about to.
    assert found.keys() == {"buffer.persistence", "database.durability"}
    assert found["buffer.persistence"]["severity"] == "critical"
    assert "appendonly yes" in found["buffer.persistence"]["fix"]
    assert {record.levelno for record in events(caplog, "mollifier.finding")} == {logging.ERROR}
    (examined,) = fields_of(caplog, "mollifier.examined")
    assert examined["critical"] == 2


async def test_a_worker_whose_servers_are_away_is_told_so_and_works_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(
        redis_url=f"unix://{tmp_path}/nobody", database_url="postgresql://127.0.0.1:1/none", tasks=TASKS, enabled=True
    )
    stop = asyncio.Event()
    with caplog.at_level(logging.INFO):
        running = asyncio.create_task(run_worker_process(settings, stop=stop))
        await until(happened(caplog, "mollifier.examined"))

    checks = {fields["check"] for fields in fields_of(caplog, "mollifier.finding")}
    assert {"buffer.reachable", "database.reachable"} <= checks
    assert not running.done()
    stop.set()
    await asyncio.wait_for(running, 20)


async def test_a_defect_of_the_doctor_costs_no_worker(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mollifier.worker.diagnose", fail)
    async with working(Settings(database_url=database_url, tasks=TASKS)):
        await until(happened(caplog, "mollifier.boot_fault"))


async def test_a_worker_waits_for_a_buffer_that_is_away_at_boot_and_stops_when_told(
    tmp_path: Path, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(redis_url=f"unix://{tmp_path}/nobody", database_url=database_url, tasks=TASKS, enabled=True)
    stop = asyncio.Event()
    running = asyncio.create_task(run_worker_process(settings, stop=stop))

    async def has_waited() -> bool:
        return has_event(caplog, "mollifier.boot_fault")()

    await until(has_waited)
    assert not running.done()

    stop.set()
    await asyncio.wait_for(running, 20)


@pytest.mark.parametrize(
    ("variable", "settings"),
    [
        ("MOLLIFIER_DATABASE_URL", Settings()),
        ("MOLLIFIER_DRAINER_ENABLED", Settings(database_url="postgresql:///nowhere", drainer_enabled=True)),
        ("MOLLIFIER_TASKS", Settings(database_url="postgresql:///nowhere", tasks=("no.such.module",))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_settings_no_worker_can_follow_stop_it_at_boot_with_the_variables_name(
    variable: str, settings: Settings
) -> None:
    with pytest.raises(SettingsError) as raised:
        await run_worker_process(settings)

    assert raised.value.variable == variable


async def test_another_number_of_partitions_than_the_buffers_stops_the_worker_at_boot(
    redis_client: Redis, redis_url: str, database_url: str
) -> None:
    await redis_client.set(PARTITIONS, "16")
    settings = Settings(redis_url=redis_url, database_url=database_url, tasks=TASKS, enabled=True, partitions=32)

    with pytest.raises(SettingsError) as raised:
        await run_worker_process(settings)

    assert raised.value.variable == "MOLLIFIER_PARTITIONS"
    assert await execute(redis_client, "GET", PARTITIONS) == b"16"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_worker_however_often_one_was_started_in_this_process(
    number: signal.Signals, redis_url: str, database_url: str
) -> None:
    settings = Settings(redis_url=redis_url, database_url=database_url, tasks=TASKS, enabled=True)
    async with working(settings):
        pass
    worker = Working()
    running = asyncio.create_task(run_worker_process(settings, on_start=worker.on_start))
    await asyncio.wait_for(worker.started.wait(), 20)

    os.kill(os.getpid(), number)

    await asyncio.wait_for(running, 20)
    assert worker.drainer is not None
    assert not worker.drainer.running


# --- what can be seen of it ----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


async def test_a_worker_shows_what_it_drained_to_prometheus_for_as_long_as_it_runs(
    redis_client: Redis, redis_url: str, database_url: str
) -> None:
    port = free_port()
    settings = Settings(
        redis_url=redis_url, database_url=database_url, tasks=TASKS, enabled=True, worker_metrics_port=port
    )
    await hold(Buffer(Server(redis_client), lambda: settings), "run_a", "run_b")
    observability = configure_telemetry("mollifier-worker", Exporters())
    telemetry = Telemetry(observability.meter_provider, observability.tracer_provider)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

        async def shows_both() -> bool:
            shown = (await client.get("/metrics", headers={"Connection": "close"})).text
            assert 'mollifier_sweep_mismatches{kind="missing"} 0.0' in shown
            assert "mollifier_sweep_oldest_milliseconds 0.0" in shown
            return 'mollifier_drain_entries_total{outcome="acked"} 2.0' in shown

        async with working(settings, telemetry=telemetry, registry=observability.registry):
            await until(shows_both)

        with pytest.raises(httpx.ConnectError):
            await client.get("/metrics")
    observability.shutdown()


async def test_a_metrics_port_that_cannot_be_had_stops_the_worker_at_boot_with_the_variables_name(
    database_url: str,
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 - where the worker listens too
        settings = Settings(database_url=database_url, tasks=TASKS, worker_metrics_port=taken.getsockname()[1])
        with pytest.raises(SettingsError) as raised:
            await run_worker_process(settings)

    assert raised.value.variable == "MOLLIFIER_WORKER_METRICS_PORT"


async def test_the_run_of_a_task_continues_the_triggers_trace(database_url: str) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace_id, caller_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    snapshot = Snapshot(
        run_id="run_a",
        org_id="org",
        env_id="env",
        task_id="echo",
        created_at=datetime.now(UTC),
        payload=b"{}",
        traceparent=f"00-{trace_id}-{caller_id}-01",
    )
    async with Database(database_url) as database:
        await PostgresRunEngine(database).create_runs([snapshot])

    async def is_traced() -> bool:
        return bool(exporter.get_finished_spans())

    async with working(Settings(database_url=database_url, tasks=TASKS), tracer_provider=provider):
        await until(is_traced)

    (span,) = exporter.get_finished_spans()
    assert span.name == "mollifier.run"
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace_id, caller_id)
    provider.shutdown()
