"""A run that was held is the run that would have been created directly."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from mollifier.model import Environment, TriggerRequest
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys

DIRECT = Environment(id="env_direct", name="prod", project_id="proj_a", org_id="org_b", org_flags={})
DIFFERENT = {"id", "environment_id", "organization_id", "created_at", "updated_at", "expired_at", "finished_at"}
"""Who the run belongs to, and when things were done to it; moments that count from `created_at` are compared as distances from it."""

_examples = itertools.count()
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
seconds = st.integers(1, 10**6).map(lambda number: timedelta(seconds=number))


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


requests = st.builds(
    TriggerRequest,
    task_id=st.just("echo"),
    payload=st.binary(max_size=2000),
    payload_type=st.sampled_from(["application/json", "application/super+json", "text/plain", "application/store"]),
    context=optional(st.binary(max_size=50)),
    metadata=optional(st.binary(max_size=50)),
    tags=st.lists(texts, max_size=10, unique=True).map(tuple),
    idempotency_key=optional(texts),
    idempotency_key_shown=optional(texts),
    idempotency_lifetime=optional(seconds.map(lambda lifetime: lifetime + timedelta(hours=1))),
    request_key=optional(texts),
    delay=optional(seconds | st.just(datetime(2999, 1, 1, tzinfo=UTC)) | st.just(datetime(2000, 1, 1, tzinfo=UTC))),
    ttl=optional(seconds.map(lambda ttl: ttl + timedelta(hours=1))),
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
    trigger_source=optional(texts),
    traceparent=st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    tracestate=optional(texts),
)


async def row_of(house: House, run_id: str) -> dict[str, Any]:
    """The run's columns as they are in the database, its moments as distances from its creation."""
    async with house.database.statement() as connection:
        found = await connection.execute(text("SELECT * FROM runs WHERE id = :id"), {"id": run_id})
        row = dict(found.mappings().one())
    row.pop("job_id")
    relative = {
        name: value - row["created_at"]
        for name, value in row.items()
        if isinstance(value, datetime) and value.year not in (2000, 2999)
    }
    return {name: value for name, value in {**row, **relative}.items() if name not in DIFFERENT}


async def jobs_of(house: House, run_id: str) -> list[tuple[Any, ...]]:
    query = "SELECT queue_name, priority, status FROM procrastinate_jobs WHERE args->>'run_id' = :id"
    async with house.database.statement() as connection:
        return [tuple(row) for row in await connection.execute(text(query), {"id": run_id})]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests)
async def test_a_run_created_through_the_buffer_equals_one_created_directly(
    holding: House, request: TriggerRequest
) -> None:
    unique = {
        name: f"{key[:20]}{next(_examples)}"
        for name in ("idempotency_key", "request_key")
        if (key := getattr(request, name)) is not None
    }
    options = {field: getattr(request, field) for field in request.__struct_fields__ if field != "task_id"} | unique

    direct = await holding.trigger(DIRECT, **options)
    held = await holding.trigger(ENVIRONMENT, **options)
    assert await holding.created(held) is None
    await holding.drain()

    assert await row_of(holding, held) == await row_of(holding, direct)
    assert await jobs_of(holding, held) == await jobs_of(holding, direct)
