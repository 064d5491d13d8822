"""Caps over HTTP: what a caller is told, and what an operator sees of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from mollifier.caps import CAPS
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from mollifier.postgres.tables import batches
from mollifier.postgres.tenants import Tenants
from tests.http.conftest import Api, Start, bearer, count_runs

pytestmark = pytest.mark.leaves_keys

# One trigger passes and all others are held, however busy this machine is.
DIVERT: dict[str, Any] = {
    "enabled": True,
    "divert": True,
    "trip_threshold": 1,
    "trip_window_ms": 3_600_000,
    "hold_ms": 3_600_000,
    "gate_deadline_ms": 30_000,
    "accept_deadline_ms": 30_000,
    **dict.fromkeys(CAPS, 0),
}
REJECT = {**DIVERT, "held_over_cap": "reject"}


@pytest.fixture
async def enrolled(database: Database) -> Tenant:
    """A tenant whose organization's flag is on."""
    tenants = Tenants(database)
    tenant = await tenants.create_tenant("enrolled")
    await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
    return tenant


def is_rejected(answer: httpx.Response, setting: str) -> bool:
    """Whether the answer says that one has to come again, when, and because of what."""
    assert answer.status_code == 429, answer.text
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["content-type"] == "application/problem+json"
    return f"({setting}); try again in 2 seconds." in answer.json()["error"]


async def counted(api: Api) -> list[str]:
    lines = (await api.client.get("/metrics")).text.splitlines()
    return [line for line in lines if line.startswith("mollifier_over_cap_total")]


async def test_over_a_cap_runs_are_created_directly_and_no_caller_can_tell(
    start: Start, enrolled: Tenant, redis_url: str, database: Database
) -> None:
    async with start(redis_url=redis_url, **{**DIVERT, "held_env_max_entries": 2}) as api:
        run_ids = [await api.triggered(enrolled, n) for n in range(6)]
        assert await count_runs(database) == 4
        assert [(await api.run(enrolled, run_id))["status"] for run_id in run_ids] == ["QUEUED"] * 6
        shown = (await api.admin("GET", "buffer")).json()
        assert await counted(api) == ['mollifier_over_cap_total{cap="held_env_max_entries",outcome="create"} 3.0']
    (cap,) = shown["caps"]
    assert cap == {"setting": "MOLLIFIER_HELD_ENV_MAX_ENTRIES", "most": 2, "held": 2, "envId": enrolled.env_id}
    assert shown["heldEntries"] == 2
    assert shown["heldBytes"] > 2 * len('{"n":1}')


@pytest.mark.parametrize("cap", CAPS)
async def test_a_rejected_trigger_is_told_when_to_come_again(
    start: Start, enrolled: Tenant, redis_url: str, database: Database, cap: str
) -> None:
    limit = 1 if cap.endswith("entries") else 900
    async with start(redis_url=redis_url, **{**REJECT, cap: limit}) as api:
        payload = "x" * 400
        passed, held = [await api.triggered(enrolled, payload) for _ in range(2)]
        refused = await api.trigger(enrolled, {"payload": payload, "options": {"idempotencyKey": "k"}})
        assert is_rejected(refused, f"MOLLIFIER_{cap.upper()}")
        assert (await api.run(enrolled, held))["status"] == "QUEUED"
        assert await count_runs(database) == 1
        # Whose trigger the gate lets pass is not asked how much is held.
        assert (await api.trigger(enrolled, {"options": {"debounce": {"key": "d", "delay": "1h"}}})).status_code == 200
    assert passed != held


async def test_more_than_a_cap_at_once_is_told_to_come_in_less(
    start: Start, enrolled: Tenant, redis_url: str, database: Database
) -> None:
    async with start(redis_url=redis_url, **{**REJECT, "held_org_max_entries": 3}) as api:
        items = [{"task": "echo", "payload": n} for n in range(5)]
        answer = await api.post(enrolled, "/api/v2/tasks/batch", {"items": items})
    assert answer.status_code == 429
    assert answer.json()["error"] == (
        "This is more at once than may be held of this organization (MOLLIFIER_HELD_ORG_MAX_ENTRIES); "
        "send less at a time, after 2 seconds."
    )
    assert await count_runs(database) == 0


async def test_a_batch_that_was_rejected_is_made_once_when_it_is_sent_again(
    start: Start, enrolled: Tenant, redis_url: str, database: Database
) -> None:
    items = [{"task": "echo", "payload": n} for n in range(4)]
    headers = bearer(enrolled) | {"x-trigger-request-idempotency-key": "r"}
    async with start(redis_url=redis_url, **{**REJECT, "held_env_max_entries": 5}) as api:
        for n in range(4):
            await api.triggered(enrolled, n)
        refused = await api.client.post("/api/v2/tasks/batch", json={"items": items}, headers=headers)
        assert is_rejected(refused, "MOLLIFIER_HELD_ENV_MAX_ENTRIES")
        assert await count_runs(database) == 1
        assert (await api.admin("GET", "buffer")).json()["heldEntries"] == 3
    async with start(redis_url=redis_url, **{**REJECT, "held_env_max_entries": 7}) as api:
        answers = [
            await api.client.post("/api/v2/tasks/batch", json={"items": items}, headers=headers) for _ in range(2)
        ]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json() == answers[1].json()
        assert (await api.admin("GET", "buffer")).json()["heldEntries"] == 7
    async with database.statement() as connection:
        assert (await connection.execute(select(func.count()).select_from(batches))).scalar_one() == 1


async def test_a_stream_that_was_rejected_can_be_sent_again_as_a_whole(
    start: Start, enrolled: Tenant, redis_url: str
) -> None:
    lines = b"".join(json.dumps({"index": n, "task": "echo", "payload": n}).encode() + b"\n" for n in range(4))
    headers = bearer(enrolled) | {"content-type": "application/x-ndjson"}
    async with start(redis_url=redis_url, **{**REJECT, "held_env_max_entries": 5}) as api:
        for n in range(4):
            await api.triggered(enrolled, n)
        batch_id = (await api.post(enrolled, "/api/v3/batches", {"runCount": 4})).json()["id"]
        path = f"/api/v3/batches/{batch_id}/items"
        refused = await api.client.post(path, content=lines, headers=headers)
        assert is_rejected(refused, "MOLLIFIER_HELD_ENV_MAX_ENTRIES")
        assert (await api.get(enrolled, f"/api/v2/batches/{batch_id}")).json()["runs"] == []
    async with start(redis_url=redis_url, **{**REJECT, "held_env_max_entries": 7}) as api:
        added = (await api.client.post(path, content=lines, headers=headers)).json()
    assert (added["itemsAccepted"], added["sealed"]) == (4, True)
