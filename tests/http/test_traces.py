"""What is traced of a trigger: from the request to the execution of its run, held or not, everything is in the caller's trace."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from mollifier.config import Exporters
from mollifier.model import Tenant
from mollifier.observability import Observability, configure_telemetry
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from mollifier.settings import Settings
from tests.core.observed import Observed
from tests.core.support import until
from tests.http.conftest import DIVERT, TASK, Diverting, Start, bearer, fields_of
from tests.working import working

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CALLER_ID}-01"
TRIGGER = "POST /api/v1/tasks/{taskId}/trigger"
BATCH = "POST /api/v2/tasks/batch"
STREAM = "POST /api/v3/batches/{batchId}/items"
REPLAY = "POST /api/v1/runs/{runId}/replay"
DRAIN, RUN = "mollifier.drain", "mollifier.run"


@pytest.fixture
def observed() -> Observed:
    return Observed()


@pytest.fixture
def observability(observed: Observed) -> Observability:
    plain = configure_telemetry("test", Exporters())
    return Observability(plain.registry, plain.meter_provider, observed.tracer_provider)


@pytest.fixture
def start_traced(start: Start, observability: Observability, redis_url: str) -> Start:
    """Start an API that traces, in divert mode unless told otherwise."""
    return partial(start, observability=observability, redis_url=redis_url, **DIVERT)


@pytest.fixture
async def holding(
    start_traced: Start, tenant: Tenant, database: Database, redis_client: Redis
) -> AsyncIterator[Diverting]:
    """An API that traces, and a tenant whose every trigger is held."""
    await Tenants(database).set_flags(tenant.org_id, {"mollifierEnabled": True})
    async with start_traced() as api:
        diverting = Diverting(api, tenant, redis_client, database)
        await diverting.hold()
        yield diverting


def trace_of(span: Any) -> str:
    return f"{span.context.trace_id:032x}"


def parent_of(span: Any) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


@dataclass
class Origin:
    """Where a request came from, and the spans that are expected to have come from there too."""

    span_id: str
    state: str
    names: list[str]


class Caller:
    """Sends requests, each from a trace of its own."""

    def __init__(self, diverting: Diverting) -> None:
        self._diverting = diverting
        self.origins: dict[str, Origin] = {}
        """By the trace's id."""

    async def ask(
        self, route: str, content: Any = None, *, runs: int = 1, kind: str = "application/json", **ids: str
    ) -> str:
        """Ask for what makes so many runs; return the id in the answer."""
        number = len(self.origins) + 1
        trace_id, origin = f"{number:032x}", Origin(f"{number:016x}", f"caller={number}", [route, *[DRAIN, RUN] * runs])
        headers = {
            **bearer(self._diverting.tenant),
            "content-type": kind,
            "traceparent": f"00-{trace_id}-{origin.span_id}-01",
            "tracestate": origin.state,
        }
        method, path = route.format(**ids).split(" ")
        sent = json.dumps(content or {})
        answer = await self._diverting.api.client.request(method, path, content=sent, headers=headers)
        assert answer.status_code == 200, answer.text
        self.origins[trace_id] = origin
        return answer.json()["id"]


def worker_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, tasks=("mollifier.demo_tasks",), **DIVERT)


async def execute_all(diverting: Diverting, settings: Settings, observed: Observed, runs: int) -> None:
    """Have a worker drain all that is held and execute all runs."""

    async def are_executed() -> bool:
        return [span.name for span in observed.spans()].count(RUN) == runs

    async with working(settings, telemetry=observed.telemetry, tracer_provider=observed.tracer_provider):
        await until(are_executed)
    assert await diverting.queued() == 0


async def test_the_request_the_drain_and_the_execution_of_held_runs_are_in_their_callers_traces(
    holding: Diverting, observed: Observed, database_url: str, redis_url: str
) -> None:
    caller = Caller(holding)
    item = {"task": TASK, "payload": 1}
    run_id = await caller.ask(TRIGGER, taskId=TASK)
    await caller.ask(BATCH, {"items": [item, item]}, runs=2)
    batch_id = (await holding.post("/api/v3/batches", {"runCount": 1})).json()["id"]
    await caller.ask(STREAM, {"index": 0, **item}, kind="application/x-ndjson", batchId=batch_id)
    await caller.ask(REPLAY, runId=run_id)
    assert await holding.queued() == 5

    await execute_all(holding, worker_settings(database_url, redis_url), observed, runs=5)

    for trace_id, origin in caller.origins.items():
        spans = [span for span in observed.spans() if trace_of(span) == trace_id and parent_of(span) == origin.span_id]
        assert sorted(span.name for span in spans) == sorted(origin.names)
        assert {span.context.trace_state.to_header() for span in spans} == {origin.state}
        drained, executed = (
            {span.attributes["mollifier.run_id"] for span in spans if span.name == name} for name in (DRAIN, RUN)
        )
        assert drained == executed
        assert all(span.attributes["mollifier.dwell_ms"] >= 0 for span in spans if span.name == DRAIN)


async def test_where_a_caller_names_no_trace_its_held_run_is_in_that_of_the_request(
    holding: Diverting, observed: Observed, database_url: str, redis_url: str
) -> None:
    await holding.api.triggered(holding.tenant)

    await execute_all(holding, worker_settings(database_url, redis_url), observed, runs=1)

    spans = {span.name: span for span in observed.spans()}
    request = spans[TRIGGER]
    assert parent_of(request) is None
    for name in (DRAIN, RUN):
        assert (trace_of(spans[name]), parent_of(spans[name])) == (
            trace_of(request),
            f"{request.context.span_id:016x}",
        )


async def test_gate_and_buffer_join_the_callers_trace(
    start_traced: Start, tenant: Tenant, database: Database, redis_client: Redis, observed: Observed
) -> None:
    await Tenants(database).set_flags(tenant.org_id, {"mollifierEnabled": True})
    async with start_traced(divert=False) as api:
        await Diverting(api, tenant, redis_client, database).hold()
        await api.trigger(tenant, {}, traceparent=TRACEPARENT)

    found = {span.name: span for span in observed.spans()}
    server, gate = found[TRIGGER], found["mollifier.gate"]
    assert parent_of(server) == CALLER_ID
    assert {trace_of(span) for span in found.values()} == {TRACE_ID}
    assert parent_of(gate) == f"{server.context.span_id:016x}"
    assert gate.attributes["mollifier.outcome"] == "mollify"
    assert "mollifier.buffer.accept" in found


async def test_a_trigger_without_a_trace_starts_one(
    start: Start, tenant: Tenant, observability: Observability, observed: Observed
) -> None:
    async with start(observability=observability) as api:
        answer = await api.trigger(tenant, {"options": {"tags": [""]}}, traceparent="rubbish")
        assert fields_of(answer) == ["options.tags[0]"]
    (server,) = observed.spans()
    assert server.parent is None
    assert server.attributes["http.response.status_code"] == 422
