"""The rollout's steps over HTTP: what each leaves in the buffer, what it logs and counts, and that its faults never fail a trigger."""

import asyncio
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import delete

from mollifier.embedded import EmbeddedStack, Stack
from mollifier.errors import SettingsError
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from mollifier.postgres.tables import runs
from mollifier.postgres.tenants import Tenants
from tests.http.conftest import PARTITIONS, Api, Diverting, Start, bearer, count_runs, fields_of

DECISIONS = "mollifier_decisions_total"
FLAG = {"mollifierEnabled": True}
# One trigger in an hour passes, so a test decides what trips without a clock.
STRICT: dict[str, Any] = {"enabled": True, "trip_threshold": 1, "trip_window_ms": 3_600_000, "hold_ms": 3_600_000}


@pytest.fixture
async def enrolled(database: Database) -> Tenant:
    """A tenant whose organization's flag is on."""
    tenants = Tenants(database)
    tenant = await tenants.create_tenant("enrolled")
    await tenants.set_flags(tenant.org_id, FLAG)
    return tenant


@pytest.fixture
async def valkey() -> AsyncIterator[Stack]:
    """A Valkey of the test's own, to be stopped."""
    async with EmbeddedStack(durable=False, postgres=False) as stack:
        yield stack


async def entries(client: Redis) -> int:
    return len(await keys(client, "mollifier:*:entry:*"))


async def keys(client: Redis, pattern: str = "*") -> list[bytes]:
    found: Any = client.keys(pattern)  # pyright: ignore[reportUnknownMemberType] - the client leaves its options untyped
    return await found


async def connections(client: Redis) -> int:
    """Return how many connections the server has ever taken."""
    info: Any = client.info("stats")  # pyright: ignore[reportUnknownMemberType] - as above
    return (await info)["total_connections_received"]


async def decisions(api: Api) -> dict[str, float]:
    """Return the decisions that the metrics show, by their labels; an empty label is none, as Prometheus has it."""
    lines = (await api.client.get("/metrics")).text.splitlines()
    found = [line.removeprefix(DECISIONS) for line in lines if line.startswith(DECISIONS)]
    return {
        re.sub(r',?[a-z_]+=""', "", labels): float(value)
        for labels, _, value in (line.rpartition(" ") for line in found)
    }


async def eventually(holds: Callable[[], Any], seconds: float = 5.0) -> None:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    while not await holds():
        assert datetime.now(UTC) < end, "it never came to hold"
        await asyncio.sleep(0.05)


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.getMessage() == name]


async def test_switched_off_it_opens_no_connection_and_counts_nothing(
    start: Start, enrolled: Tenant, redis_url: str, redis_client: Redis
) -> None:
    before = await connections(redis_client)
    async with start(redis_url=redis_url, trip_threshold=1) as api:
        for _ in range(5):
            await api.triggered(enrolled)
        ready = (await api.client.get("/readyz")).json()
        assert ready == {"status": "ok", "database": "ok", "buffer": "off", "drainer": "off"}
        assert await decisions(api) == {}
    assert await connections(redis_client) == before
    assert await keys(redis_client) == []


async def test_switched_off_a_held_run_is_not_found_and_not_changed_until_it_is_drained(
    start: Start, diverting: Diverting, redis_url: str
) -> None:
    run_id = await diverting.held()
    async with start(enabled=False, redis_url=redis_url, partitions=PARTITIONS) as off:
        assert (await off.get(diverting.tenant, f"/api/v3/runs/{run_id}")).status_code == 404
        assert (await off.get(diverting.tenant, "/api/v1/runs")).json()["data"] == []
        assert (await off.post(diverting.tenant, f"/api/v2/runs/{run_id}/cancel")).status_code == 404
        assert (await diverting.run(run_id))["status"] == "QUEUED"
        await diverting.drain()
        assert (await off.run(diverting.tenant, run_id))["status"] == "QUEUED"


async def test_switched_off_where_draining_is_on_a_held_run_is_read_listed_and_cancelled(
    start: Start, diverting: Diverting, redis_url: str, database: Database
) -> None:
    run_id = await diverting.held()
    async with start(enabled=False, drainer_enabled=True, redis_url=redis_url, partitions=PARTITIONS) as off:
        assert (await off.run(diverting.tenant, run_id))["status"] == "QUEUED"
        listed = (await off.get(diverting.tenant, "/api/v1/runs")).json()["data"]
        assert [run["id"] for run in listed] == [run_id]
        assert await count_runs(database) == 0
        assert (await off.post(diverting.tenant, f"/api/v2/runs/{run_id}/cancel")).status_code == 200
        await diverting.drain()
        assert (await off.run(diverting.tenant, run_id))["status"] == "CANCELED"
        assert await count_runs(database) == 1


async def test_enabled_without_a_server_it_does_nothing(start: Start, enrolled: Tenant, database: Database) -> None:
    async with start(**STRICT) as api:
        for _ in range(3):
            await api.triggered(enrolled)
        assert (await api.client.get("/readyz")).json()["buffer"] == "degraded"
    assert await count_runs(database) == 3


async def test_a_mollified_trigger_is_run_and_buffered(
    start: Start, enrolled: Tenant, redis_url: str, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with start(redis_url=redis_url, **STRICT) as api:
            passed = await api.triggered(enrolled, 1)
            assert await entries(redis_client) == 0
            held = await api.triggered(enrolled, 2)
            assert (await api.run(enrolled, held))["status"] == "QUEUED"
            assert (await api.run(enrolled, passed))["status"] == "QUEUED"
            listed = (await api.admin("GET", f"buffer/entries?env={enrolled.env_id}")).json()["data"]
    assert [entry["runId"] for entry in listed] == [held]
    assert listed[0]["kind"] == "audit"
    (event,) = events(caplog, "mollifier.buffered")
    assert {name: event[name] for name in ("run_id", "env_id", "org_id", "task_id")} == {
        "run_id": held,
        "env_id": enrolled.env_id,
        "org_id": enrolled.org_id,
        "task_id": "echo",
    }


@pytest.mark.leaves_keys
@pytest.mark.parametrize("divert", [False, True], ids=["in monitor mode", "once that has become divert mode"])
async def test_an_audit_copy_is_no_run(
    start: Start, enrolled: Tenant, database: Database, redis_url: str, redis_client: Redis, *, divert: bool
) -> None:
    async with start(redis_url=redis_url, **STRICT) as api:
        await api.triggered(enrolled)
        run_id = await api.triggered(enrolled, tags="t")
        items = [{"task": "echo", "options": {"tags": "t"}}] * 2
        batch_id = (await api.post(enrolled, "/api/v2/tasks/batch", {"items": items})).json()["id"]
    assert await entries(redis_client) == 3

    async with start(redis_url=redis_url, divert=divert, **STRICT) as api:
        listed = (await api.get(enrolled, "/api/v1/runs")).json()["data"]
        assert len(listed) == len({run["id"] for run in listed}) == 4
        # A copy stays behind where a trigger fails after it: its caller was told that there is no run.
        async with database.statement() as connection:
            await connection.execute(delete(runs))
        for query in ({}, {"filter[tag]": "t"}, {"filter[batch]": batch_id}, {"filter[status]": "QUEUED"}):
            assert (await api.get(enrolled, "/api/v1/runs", **query)).json() == {"data": [], "pagination": {}}
        for method, path, body in (
            ("GET", "/api/v3/runs/{}", None),
            ("GET", "/api/v1/runs/{}/result", None),
            ("GET", "/api/v1/runs/{}/metadata", None),
            ("PUT", "/api/v1/runs/{}/metadata", {"metadata": {"a": 1}}),
            ("POST", "/api/v1/runs/{}/tags", {"tags": "a"}),
            ("POST", "/api/v1/runs/{}/reschedule", {"delay": "1h"}),
            ("POST", "/api/v1/runs/{}/replay", {}),
            ("POST", "/api/v2/runs/{}/cancel", {}),
        ):
            answer = await api.client.request(method, path.format(run_id), json=body, headers=bearer(enrolled))
            assert (answer.status_code, fields_of(answer)) == (404, ["runId"]), path
    assert await count_runs(database) == 0


async def test_shadow_mode_only_says_what_it_would_do(
    start: Start, tenant: Tenant, redis_url: str, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with start(redis_url=redis_url, shadow_mode=True, **STRICT) as api:
            run_ids = [await api.triggered(tenant) for _ in range(3)]
            counted = await decisions(api)
    assert [event["run_id"] for event in events(caplog, "mollifier.would_mollify")] == run_ids[1:]
    assert await entries(redis_client) == 0
    assert counted == {
        '{enrolled="false",outcome="pass_through"}': 1,
        '{enrolled="false",outcome="shadow_log",reason="per_env_rate"}': 2,
    }


async def test_metrics_name_an_organization_only_when_it_is_enrolled_and_never_an_environment(
    start: Start, tenant: Tenant, enrolled: Tenant, redis_url: str
) -> None:
    async with start(redis_url=redis_url, **STRICT) as api:
        for one in (tenant, tenant, enrolled, enrolled):
            await api.triggered(one)
        counted = await decisions(api)
        everything = (await api.client.get("/metrics")).text
    org = enrolled.org_id
    assert counted == {
        '{enrolled="false",outcome="pass_through"}': 2,
        f'{{enrolled="true",org_id="{org}",outcome="pass_through"}}': 1,
        f'{{enrolled="true",org_id="{org}",outcome="mollify",reason="per_env_rate"}}': 1,
    }
    assert tenant.org_id not in everything
    assert enrolled.env_id not in everything


async def test_what_validation_rejects_or_a_key_answers_never_reaches_the_gate(
    start: Start, enrolled: Tenant, redis_url: str, redis_client: Redis, database: Database
) -> None:
    bad: list[Any] = [b"{", b"[]", {"options": {"tags": [""]}}, {"options": {"parentRunId": "run_nobody"}}]
    async with start(redis_url=redis_url, **STRICT) as api:
        first = await api.triggered(enrolled, 1, idempotencyKey="order-1")
        before = await decisions(api)
        for body in bad:
            assert (await api.trigger(enrolled, body)).status_code in (400, 422)
        assert (await api.trigger(enrolled, task="unknown")).status_code == 404
        again = await api.trigger(enrolled, {"payload": 2, "options": {"idempotencyKey": "order-1"}})
        assert again.json() == {"id": first, "isCached": True}
        assert await decisions(api) == before
    assert await entries(redis_client) == 0
    assert await count_runs(database) == 1


async def test_who_needs_an_answer_at_once_passes_the_gate_by(
    start: Start, enrolled: Tenant, redis_url: str, redis_client: Redis
) -> None:
    async with start(redis_url=redis_url, **STRICT) as api:
        parent = await api.triggered(enrolled)
        for n in range(3):
            await api.triggered(enrolled, debounce={"key": f"d{n}", "delay": "1h"})
            await api.triggered(enrolled, parentRunId=parent, resumeParentOnCompletion=True)
    assert await entries(redis_client) == 0


async def test_no_request_talks_itself_past_the_gate(
    start: Start, enrolled: Tenant, redis_url: str, redis_client: Redis
) -> None:
    """A one-time token is for host applications, which have some; of what they call it, HTTP knows nothing."""
    async with start(redis_url=redis_url, **STRICT) as api:
        for token in ("t1", "t2", 3):
            await api.triggered(enrolled, oneTimeToken=token)
    assert await entries(redis_client) == 2


async def test_a_replay_passes_the_gate(start: Start, enrolled: Tenant, redis_url: str, redis_client: Redis) -> None:
    async with start(redis_url=redis_url, **STRICT) as api:
        first = await api.triggered(enrolled)
        replayed = await api.post(enrolled, f"/api/v1/runs/{first}/replay")
    assert replayed.status_code == 200
    assert await entries(redis_client) == 1


async def test_what_is_left_for_after_the_answer_is_done_when_the_client_has_gone(
    start: Start, enrolled: Tenant, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with start(redis_url=redis_url, **STRICT) as api:
            await api.triggered(enrolled)
            url = api.client.base_url
            _, writer = await asyncio.open_connection(url.host, url.port)
            head = (
                f"POST /api/v1/tasks/echo/trigger HTTP/1.1\r\nhost: {url.host}\r\nauthorization: Bearer {enrolled.api_key}\r\n"
                "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
            )
            writer.write(head.encode())
            await writer.drain()
            writer.close()

            async def told() -> bool:
                return len(events(caplog, "mollifier.buffered")) == 1

            await eventually(told)


# --- flags ---------------------------------------------------------------------------------------------------------


async def test_one_organizations_flag_never_reaches_another(
    start: Start, tenant: Tenant, enrolled: Tenant, redis_url: str, redis_client: Redis
) -> None:
    async with start(redis_url=redis_url, **STRICT) as api:
        for _ in range(3):
            await api.triggered(tenant)
        assert await entries(redis_client) == 0
        for _ in range(3):
            await api.triggered(enrolled)
        assert await entries(redis_client) == 2
        await api.admin("PUT", "flags", FLAG)
        await api.admin("PUT", f"organizations/{enrolled.org_id}/flags", {"mollifierEnabled": False})
        await api.triggered(enrolled)
        assert await entries(redis_client) == 2


async def test_a_flag_set_elsewhere_is_live_within_five_seconds(
    start: Start, tenant: Tenant, database: Database, redis_url: str, redis_client: Redis
) -> None:
    async with start(redis_url=redis_url, **STRICT) as api:
        await api.triggered(tenant)
        await Tenants(database).set_flags(tenant.org_id, FLAG)

        async def held() -> bool:
            await api.triggered(tenant)
            return await entries(redis_client) > 0

        await eventually(held)


async def test_a_global_flag_set_elsewhere_is_live_within_five_seconds(
    start: Start, tenant: Tenant, redis_url: str, redis_client: Redis
) -> None:
    async with start(redis_url=redis_url, **STRICT) as api, start() as elsewhere:
        await api.triggered(tenant)
        await elsewhere.admin("PUT", "flags", {**FLAG, "other": {"nested": [1]}})

        async def held() -> bool:
            await api.triggered(tenant)
            return await entries(redis_client) > 0

        await eventually(held)


# --- faults --------------------------------------------------------------------------------------------------------


async def test_a_stopped_buffer_never_fails_a_trigger(
    start: Start, enrolled: Tenant, valkey: Stack, database: Database
) -> None:
    async with start(redis_url=valkey.redis_url, **STRICT) as api:
        await api.triggered(enrolled)
        await valkey.stop("valkey", kill=True)
        for _ in range(3):
            await api.triggered(enrolled)
        ready = await api.client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json() == {"status": "degraded", "database": "ok", "buffer": "degraded", "drainer": "down"}
        assert (await api.admin("GET", "buffer")).status_code == 503
        await valkey.start("valkey")
        await api.triggered(enrolled)
        assert (await api.client.get("/readyz")).json()["buffer"] == "ok"
    assert await count_runs(database) == 5


async def test_a_buffer_that_hangs_never_fails_a_trigger(
    start: Start, enrolled: Tenant, valkey: Stack, database: Database
) -> None:
    assert valkey.valkey_pid is not None
    async with start(redis_url=valkey.redis_url, **STRICT) as api:
        await api.triggered(enrolled)
        os.kill(valkey.valkey_pid, signal.SIGSTOP)
        try:
            for _ in range(3):
                await api.triggered(enrolled)
        finally:
            os.kill(valkey.valkey_pid, signal.SIGCONT)
    assert await count_runs(database) == 4


async def test_it_starts_without_its_buffer_and_claims_it_later(start: Start, enrolled: Tenant, valkey: Stack) -> None:
    await valkey.stop("valkey")
    async with start(redis_url=valkey.redis_url, **STRICT) as api:
        await api.triggered(enrolled)
        await valkey.start("valkey")
        async with Redis.from_url(valkey.redis_url) as client:  # pyright: ignore[reportUnknownMemberType] - untyped

            async def claimed() -> bool:
                return await client.get("mollifier:partitions") == b"64"

            await eventually(claimed, 15)


async def test_another_number_of_partitions_stops_the_start_with_the_name_of_the_setting(
    start: Start, redis_url: str, redis_client: Redis
) -> None:
    await redis_client.set("mollifier:partitions", "32")
    with pytest.raises(SettingsError, match="MOLLIFIER_PARTITIONS"):
        async with start(redis_url=redis_url, **STRICT):
            pass


async def test_another_number_of_partitions_found_later_stops_the_process(start: Start, valkey: Stack) -> None:
    await valkey.stop("valkey")

    async def meet() -> None:
        async with start(redis_url=valkey.redis_url, **STRICT) as api:
            await valkey.start("valkey")
            async with Redis.from_url(valkey.redis_url) as client:  # pyright: ignore[reportUnknownMemberType] - untyped
                await client.set("mollifier:partitions", "32")

            async def stopped() -> bool:
                return api.server.should_exit

            await eventually(stopped, 15)

    with pytest.raises(SettingsError, match="MOLLIFIER_PARTITIONS"):
        await meet()
