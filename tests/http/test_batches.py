"""Batches over HTTP: what comes in, what is answered, and that bad input changes nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from sqlalchemy import func, select

from mollifier.http.batches import ITEMS_PER_STEP
from mollifier.model import RunStatus, Tenant
from mollifier.postgres.database import Database
from mollifier.postgres.tables import batches
from mollifier.postgres.tenants import Tenants
from tests.http.conftest import Api, Start, bearer, change_run, count_runs, fields_of

NDJSON = "application/x-ndjson"
# Exactly what is above the threshold is held, however busy this machine is.
DIVERT: dict[str, Any] = {
    "enabled": True,
    "divert": True,
    "trip_threshold": 100,
    "trip_window_ms": 3_600_000,
    "hold_ms": 3_600_000,
    "gate_deadline_ms": 30_000,
    "accept_deadline_ms": 30_000,
}


@pytest.fixture
async def enrolled(database: Database) -> Tenant:
    """A tenant whose organization's flag is on."""
    tenants = Tenants(database)
    tenant = await tenants.create_tenant("enrolled")
    await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
    return tenant


def items(count: int, **options: Any) -> list[dict[str, Any]]:
    return [{"task": "echo", "payload": {"n": n}, "options": options} for n in range(count)]


def lines(found: Iterable[dict[str, Any]], start: int = 0) -> bytes:
    return b"".join(json.dumps({"index": i, **item}).encode() + b"\n" for i, item in enumerate(found, start))


async def batch(api: Api, tenant: Tenant, body: Any, **headers: str) -> httpx.Response:
    sent = bearer(tenant) | {name.replace("_", "-"): value for name, value in headers.items()}
    return await api.client.post("/api/v2/tasks/batch", json=body, headers=sent)


async def announce(api: Api, tenant: Tenant, run_count: int, **fields: Any) -> str:
    answer = await api.post(tenant, "/api/v3/batches", {"runCount": run_count, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def stream(
    api: Api, tenant: Tenant, batch_id: str, content: bytes | AsyncIterator[bytes], kind: str = NDJSON
) -> httpx.Response:
    headers = bearer(tenant) | {"content-type": kind}
    return await api.client.post(f"/api/v3/batches/{batch_id}/items", content=content, headers=headers)


async def details(api: Api, tenant: Tenant, batch_id: str) -> dict[str, Any]:
    answer = await api.get(tenant, f"/api/v2/batches/{batch_id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def count_batches(database: Database) -> int:
    async with database.statement() as connection:
        return (await connection.execute(select(func.count()).select_from(batches))).scalar_one()


async def held(client: Redis) -> int:
    found: Any = client.keys("mollifier:*:entry:*")  # pyright: ignore[reportUnknownMemberType] - untyped options
    return len(await found)


# --- whole ---------------------------------------------------------------------------------------------------------


async def test_a_batch_is_answered_with_its_id_and_the_claims_of_a_token(api: Api, tenant: Tenant) -> None:
    answer = await batch(api, tenant, {"items": items(3, tags=["t"])})

    assert answer.status_code == 200
    found = answer.json()
    assert found == {"id": found["id"], "runCount": 3}
    assert json.loads(answer.headers["x-trigger-jwt-claims"]) == {"sub": tenant.env_id, "pub": True}
    read = await details(api, tenant, found["id"])
    assert read == {
        "id": found["id"],
        "status": "PENDING",
        "createdAt": read["createdAt"],
        "updatedAt": read["updatedAt"],
        "runCount": 3,
        "runs": read["runs"],
        "processing": {"errors": []},
    }
    runs = [await api.run(tenant, run_id) for run_id in read["runs"]]
    assert [run["payload"] for run in runs] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert {(run["batchId"], run["triggerFunction"]) for run in runs} == {(found["id"], "batchTrigger")}
    listed = await api.get(tenant, "/api/v1/runs", **{"filter[batch]": found["id"]})
    assert [run["id"] for run in listed.json()["data"]] == read["runs"][::-1]


@pytest.mark.leaves_keys
async def test_a_thousand_items_in_one_call_of_which_those_above_the_threshold_are_held(
    start: Start, database: Database, enrolled: Tenant, redis_url: str, redis_client: Redis
) -> None:
    async with start(redis_url=redis_url, **DIVERT) as api:
        answer = await batch(api, enrolled, {"items": items(1000)})

        assert answer.status_code == 200, answer.text
        assert await count_runs(database) == 100
        assert await held(redis_client) == 900
        read = await details(api, enrolled, answer.json()["id"])
        assert (read["status"], len(set(read["runs"]))) == ("PENDING", 1000)
        last = await api.run(enrolled, read["runs"][-1])
        assert (last["status"], last["payload"], last["batchId"]) == ("QUEUED", {"n": 999}, read["id"])


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["items"]),
        ({"items": []}, ["items"]),
        ({"items": {}}, ["items"]),
        ({"items": [*items(1000), *items(1)]}, ["items"]),
        ({"items": [*items(1), 5]}, ["items[1]"]),
        ({"items": [*items(2), {"payload": 1}]}, ["items[2].task"]),
        ({"items": [{"task": "\x00"}, {"task": "x" * 257}]}, ["items[0].task", "items[1].task"]),
        (
            {"items": [*items(1), *items(1, tags=5), *items(1, ttl="x")]},
            ["items[1].options.tags", "items[2].options.ttl"],
        ),
        ({"items": items(1), "parentRunId": 5}, ["parentRunId"]),
        ({"items": items(1), "resumeParentOnCompletion": True}, ["parentRunId"]),
        ({"items": items(1), "parentRunId": "run_none"}, ["parentRunId"]),
        ({"items": [*items(2), *items(1, parentRunId="run_none")]}, ["items[2].options.parentRunId"]),
    ],
)
async def test_one_mistake_anywhere_and_nothing_is_triggered(
    api: Api, tenant: Tenant, database: Database, body: Any, fields: list[str]
) -> None:
    answer = await batch(api, tenant, body)
    assert (answer.status_code, fields_of(answer)) == (422, fields)
    assert (await count_runs(database), await count_batches(database)) == (0, 0)


async def test_a_task_that_nobody_knows_is_named_with_its_item(api: Api, tenant: Tenant, database: Database) -> None:
    answer = await batch(api, tenant, {"items": [*items(2), {"task": "nobody's"}]})
    assert (answer.status_code, fields_of(answer)) == (404, ["items[2].task"])
    assert "nobody's" in answer.json()["error"]
    assert (await count_runs(database), await count_batches(database)) == (0, 0)


async def test_a_batch_over_the_bodys_limit_is_refused(start: Start, tenant: Tenant, database: Database) -> None:
    async with start(body_limit_bytes=4096) as api:
        answer = await batch(api, tenant, {"items": [{"task": "echo", "payload": "x" * 4096}]})
        assert answer.status_code == 413
    assert await count_batches(database) == 0


async def test_a_batch_that_is_not_json_is_malformed(api: Api, tenant: Tenant) -> None:
    headers = bearer(tenant) | {"content-type": "application/json"}
    answer = await api.client.post("/api/v2/tasks/batch", content=b'{"items": [', headers=headers)
    assert (answer.status_code, fields_of(answer)) == (400, ["body"])


async def test_a_batch_that_is_sent_again_is_the_one_it_made(api: Api, tenant: Tenant, database: Database) -> None:
    answers = [
        (await batch(api, tenant, {"items": items(4)}, x_trigger_request_idempotency_key="r")).json() for _ in range(3)
    ]
    assert answers == [answers[0]] * 3
    assert await count_runs(database) == 4


async def test_headers_that_name_keys_are_not_the_items(api: Api, tenant: Tenant, database: Database) -> None:
    await batch(api, tenant, {"items": items(4)}, idempotency_key="k", x_trigger_request_idempotency_key="r")
    assert await count_runs(database) == 4


async def test_items_keep_their_own_options_and_the_origin_of_the_request(api: Api, tenant: Tenant) -> None:
    parent = await api.triggered(tenant)
    body: dict[str, Any] = {
        "items": [
            {"task": "echo", "payload": '{"a":1}', "options": {"payloadType": "application/json", "tags": "x"}},
            {"task": "a/b c", "payload": [], "options": {"idempotencyKey": "k", "delay": "1h"}},
        ],
        "parentRunId": parent,
    }
    found = (await batch(api, tenant, body)).json()
    first, second = [await api.run(tenant, run_id) for run_id in (await details(api, tenant, found["id"]))["runs"]]
    assert (first["taskIdentifier"], first["payload"], first["tags"]) == ("echo", {"a": 1}, ["x"])
    assert (second["taskIdentifier"], second["payload"], second["status"]) == ("a/b c", [], "DELAYED")
    assert (second["idempotencyKey"], second["relatedRuns"]["parent"]["id"]) == ("k", parent)


async def test_a_batch_that_a_run_waits_for_says_so_of_its_runs(api: Api, tenant: Tenant) -> None:
    parent = await api.triggered(tenant)
    body = {"items": items(1), "parentRunId": parent, "resumeParentOnCompletion": True}
    found = (await batch(api, tenant, body)).json()
    (run_id,) = (await details(api, tenant, found["id"]))["runs"]
    assert (await api.run(tenant, run_id))["triggerFunction"] == "batchTriggerAndWait"


async def test_a_batch_is_completed_when_all_of_its_runs_have_ended(
    api: Api, tenant: Tenant, database: Database
) -> None:
    found = (await batch(api, tenant, {"items": items(2)})).json()
    first, second = (await details(api, tenant, found["id"]))["runs"]
    await change_run(database, first, status=RunStatus.COMPLETED)
    assert (await details(api, tenant, found["id"]))["status"] == "PENDING"
    await change_run(database, second, status=RunStatus.FAILED)
    assert (await details(api, tenant, found["id"]))["status"] == "COMPLETED"


# --- announced and streamed ----------------------------------------------------------------------------------------


async def test_a_batch_is_announced_then_streamed_then_sealed(api: Api, tenant: Tenant) -> None:
    answer = await api.post(tenant, "/api/v3/batches", {"runCount": 3, "idempotencyKey": "k"})
    assert answer.status_code == 200
    found = answer.json()
    assert found == {"id": found["id"], "runCount": 3, "isCached": False, "idempotencyKey": "k"}
    assert json.loads(answer.headers["x-trigger-jwt-claims"]) == {"sub": tenant.env_id, "pub": True}

    first = await stream(api, tenant, found["id"], lines(items(2)))
    assert (first.status_code, first.json()) == (
        200,
        {
            "id": found["id"],
            "itemsAccepted": 2,
            "itemsDeduplicated": 0,
            "sealed": False,
            "enqueuedCount": 2,
            "expectedCount": 3,
        },
    )
    read = await details(api, tenant, found["id"])
    assert (read["status"], read["idempotencyKey"], len(read["runs"])) == ("PENDING", "k", 2)

    whole = await stream(api, tenant, found["id"], lines(items(3)))
    assert whole.json() == {"id": found["id"], "itemsAccepted": 1, "itemsDeduplicated": 2, "sealed": True}
    runs = [await api.run(tenant, run_id) for run_id in (await details(api, tenant, found["id"]))["runs"]]
    assert [run["payload"] for run in runs] == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_an_announced_batch_is_cached_under_its_key(api: Api, tenant: Tenant, neighbour: Tenant) -> None:
    first = await announce(api, tenant, 3, idempotencyKey="k")
    again = (await api.post(tenant, "/api/v3/batches", {"runCount": 5, "idempotencyKey": "k"})).json()
    assert again == {"id": first, "runCount": 3, "isCached": True, "idempotencyKey": "k"}
    assert await announce(api, neighbour, 3, idempotencyKey="k") != first


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["runCount"]),
        ({"runCount": 0}, ["runCount"]),
        ({"runCount": 10_001}, ["runCount"]),
        ({"runCount": 1.5}, ["runCount"]),
        ({"runCount": 1, "idempotencyKey": ""}, ["idempotencyKey"]),
        ({"runCount": 1, "idempotencyKey": "\x00"}, ["idempotencyKey"]),
        ({"runCount": 1, "idempotencyKey": "x" * 2049}, ["idempotencyKey"]),
        ({"runCount": 1, "resumeParentOnCompletion": True}, ["parentRunId"]),
        ({"runCount": 1, "parentRunId": "run_none"}, ["parentRunId"]),
    ],
)
async def test_a_batch_that_cannot_be_is_not_announced(
    api: Api, tenant: Tenant, database: Database, body: Any, fields: list[str]
) -> None:
    answer = await api.post(tenant, "/api/v3/batches", body)
    assert (answer.status_code, fields_of(answer)) == (422, fields)
    assert await count_batches(database) == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lines(items(1)) + b"nonsense\n", (400, "body", "line 2")),
        (lines(items(1)) + b"\n\n[]\n", (422, "line 4", "object")),
        (lines(items(1)) + b'{"task": "echo"}\n', (422, "line 2: index", "required")),
        (lines(items(1)) + b'{"index": 5, "task": "echo"}\n', (422, "line 2: index", "0 to 4")),
        (lines(items(1)) + b'{"index": -1, "task": "echo"}\n', (422, "line 2: index", "0 to 4")),
        (lines([*items(3), *items(1, tags=5)]), (422, "items[3].options.tags", "array")),
        (b'{"index": 2}', (422, "items[2].task", "required")),
        (lines([*items(1), {"task": "nobody's"}]), (404, "items[1].task", "nobody's")),
        (lines(items(1, parentRunId="run_none")), (422, "items[0].options.parentRunId", "run_none")),
        (b'{"index": 0, "task": "echo", "payload": "\xff"}', (400, "body", "UTF-8")),
    ],
)
async def test_a_bad_line_is_named_and_nothing_of_its_step_is_triggered(
    api: Api, tenant: Tenant, database: Database, content: bytes, expected: tuple[int, str, str]
) -> None:
    status, field, said = expected
    batch_id = await announce(api, tenant, 5)
    answer = await stream(api, tenant, batch_id, content)
    assert (answer.status_code, fields_of(answer)) == (status, [field])
    assert said in answer.json()["error"]
    assert await count_runs(database) == 0


async def test_the_steps_before_a_bad_line_are_in_and_the_corrected_stream_completes_the_batch(
    api: Api, tenant: Tenant, database: Database
) -> None:
    count = ITEMS_PER_STEP + 10
    batch_id = await announce(api, tenant, count)

    answer = await stream(api, tenant, batch_id, lines(items(count - 1)) + b"nonsense\n")
    assert answer.status_code == 400
    assert await count_runs(database) == ITEMS_PER_STEP

    whole = (await stream(api, tenant, batch_id, lines(items(count)))).json()
    assert (whole["sealed"], whole["itemsAccepted"], whole["itemsDeduplicated"]) == (True, 10, ITEMS_PER_STEP)
    assert await count_runs(database) == count


@pytest.mark.leaves_keys
async def test_a_stream_that_breaks_in_the_middle_is_completed_when_sent_again(
    start: Start, database: Database, enrolled: Tenant, redis_url: str, redis_client: Redis
) -> None:
    count = ITEMS_PER_STEP * 2 + 10
    async with start(redis_url=redis_url, **DIVERT) as api:
        batch_id = await announce(api, enrolled, count)
        content = lines(items(count))

        async def broken() -> AsyncIterator[bytes]:
            yield content[: len(content) * 3 // 4]
            while not (await details(api, enrolled, batch_id))["runs"]:
                await asyncio.sleep(0.01)
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            await stream(api, enrolled, batch_id, broken())
        assert (await details(api, enrolled, batch_id))["status"] == "PENDING"

        answer = (await stream(api, enrolled, batch_id, content)).json()

        assert (answer["sealed"], answer["itemsDeduplicated"]) == (True, ITEMS_PER_STEP)
        assert (await count_runs(database), await held(redis_client)) == (100, count - 100)
        runs = (await details(api, enrolled, batch_id))["runs"]
        assert (await api.run(enrolled, runs[-1]))["payload"] == {"n": count - 1}


async def test_a_stream_may_come_in_any_pieces(api: Api, tenant: Tenant) -> None:
    batch_id = await announce(api, tenant, 20)
    content = lines(items(20)).replace(b"\n", b"\r\n").strip()

    async def pieces() -> AsyncIterator[bytes]:
        for place in range(0, len(content), 7):
            yield content[place : place + 7]

    answer = await stream(api, tenant, batch_id, pieces())
    assert (answer.status_code, answer.json()["itemsAccepted"]) == (200, 20)


async def test_a_stream_may_be_longer_than_a_body_but_no_line_of_it(start: Start, tenant: Tenant) -> None:
    async with start(body_limit_bytes=4096) as api:
        batch_id = await announce(api, tenant, 20)
        long = [{"task": "echo", "payload": "x" * 3000} for _ in range(20)]
        assert (await stream(api, tenant, batch_id, lines(long))).json()["sealed"] is True

        too_long = b'{"index": 0, "task": "echo", "payload": "' + b"x" * 10_000

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield too_long

        assert (await stream(api, tenant, batch_id, too_long)).status_code == 413
        assert (await stream(api, tenant, batch_id, endless())).status_code == 413


async def test_a_stream_of_nothing_changes_nothing(api: Api, tenant: Tenant) -> None:
    batch_id = await announce(api, tenant, 2)
    answer = await stream(api, tenant, batch_id, b"\n\n")
    assert (answer.status_code, answer.json()["sealed"], answer.json()["enqueuedCount"]) == (200, False, 0)


@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
async def test_a_stream_that_is_not_said_to_be_ndjson_is_refused(api: Api, tenant: Tenant, kind: str) -> None:
    batch_id = await announce(api, tenant, 2)
    assert (await stream(api, tenant, batch_id, lines(items(2)), kind)).status_code == 415


async def test_a_batch_of_another_environment_does_not_exist(api: Api, tenant: Tenant, neighbour: Tenant) -> None:
    batch_id = await announce(api, tenant, 2)
    for answer in (
        await api.get(neighbour, f"/api/v2/batches/{batch_id}"),
        await stream(api, neighbour, batch_id, lines(items(2))),
        await api.get(tenant, "/api/v2/batches/batch_none"),
        await stream(api, tenant, "batch_none", lines(items(2))),
    ):
        assert (answer.status_code, fields_of(answer)) == (404, ["batchId"])
    assert (await details(api, tenant, batch_id))["runs"] == []


async def test_batches_need_a_key(api: Api) -> None:
    for answer in (
        await api.client.post("/api/v2/tasks/batch", json={}),
        await api.client.post("/api/v3/batches", json={}),
        await api.client.post("/api/v3/batches/b/items", content=b""),
        await api.client.get("/api/v2/batches/b"),
    ):
        assert answer.status_code == 401
