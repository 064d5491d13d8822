"""Triggering over HTTP, with Mollifier off: what comes in, what is answered, and that bad input changes nothing."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mollifier.model import Tenant
from mollifier.postgres.database import Database
from tests.http.conftest import Api, Start, bearer, change_run, count_runs, fields_of, raw_member

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LIMIT_BYTES = 4096

in_one_loop = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


async def test_a_triggered_run_can_be_read(api: Api, tenant: Tenant) -> None:
    answer = await api.trigger(tenant, {"payload": {"a": 1}})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"id": answer.json()["id"], "isCached": False}
    assert (await api.run(tenant, answer.json()["id"]))["payload"] == {"a": 1}


async def test_every_option_is_seen_on_the_run(api: Api, tenant: Tenant) -> None:
    parent = await api.triggered(tenant)
    options = {
        "tags": ["a", "b"],
        "idempotencyKey": "order-1",
        "delay": "2030-01-31T12:00:00Z",
        "ttl": "1h30m",
        "metadata": {"step": 1},
        "queue": {"name": "mail"},
        "concurrencyKey": 7,
        "priority": 3,
        "machine": "small-1x",
        "region": "eu",
        "maxAttempts": 2,
        "maxDuration": 60,
        "test": True,
        "lockToVersion": "1",
        "parentRunId": parent,
        "parentBatch": "batch_1",
    }
    run = await api.run(tenant, await api.triggered(tenant, [], **options))
    expected = {
        "status": "DELAYED",
        "taskIdentifier": "echo",
        "idempotencyKey": "order-1",
        "tags": ["a", "b"],
        "delayedUntil": "2030-01-31T12:00:00Z",
        "ttl": "1h30m",
        "metadata": {"step": 1},
        "isTest": True,
        "batchId": "batch_1",
        "depth": 1,
        "triggerFunction": "trigger",
        "payload": [],
    }
    assert {name: run[name] for name in expected} == expected
    assert run["relatedRuns"]["parent"]["id"] == parent
    assert run["relatedRuns"]["root"]["id"] == parent


async def test_a_task_id_may_hold_a_slash_however_it_is_written(api: Api, tenant: Tenant) -> None:
    for path in ("a%2Fb%20c", "%61%2fb%20c", "a%2Fb c"):
        answer = await api.trigger(tenant, task=path)
        assert answer.status_code == 200, path
        assert (await api.run(tenant, answer.json()["id"]))["taskIdentifier"] == "a/b c"


PAYLOADS: list[tuple[dict[str, Any], str, str]] = [
    ({}, '{"a":1e309}', '{"a":1e309}'),
    ({}, "123456789012345678901234567890", "123456789012345678901234567890"),
    ({}, "[ ]", "[ ]"),
    ({}, '"nul \\u0000"', '"nul \\u0000"'),
    ({}, "null", "null"),
    ({"payloadType": "application/json"}, json.dumps('{"a" : 1e309}'), '{"a" : 1e309}'),
    ({"payloadType": "application/super+json"}, json.dumps('{"json":[ 1],"meta":{}}'), "[ 1]"),
    ({"payloadType": "text/plain"}, '"plain \\u0000"', '"plain \\u0000"'),
    ({"payloadType": "text/plain"}, '""', '""'),
    ({"payloadType": "application/store"}, '"packets/1"', '"packets/1"'),
]


async def test_a_payload_is_read_as_the_value_it_stands_for(
    api: Api, tenant: Tenant, subtests: pytest.Subtests
) -> None:
    for options, payload, shown in PAYLOADS:
        with subtests.test(payload, options=options):
            body = f'{{"payload": {payload}, "options": {json.dumps(options)}}}'
            answer = await api.trigger(tenant, body.encode())
            assert answer.status_code == 200
            run = await api.get(tenant, f"/api/v3/runs/{answer.json()['id']}")
            assert raw_member(run, "payload") == shown.encode()


async def test_no_payload_is_none_to_read(api: Api, tenant: Tenant) -> None:
    answer = await api.trigger(tenant, {"options": {"payloadType": "text/plain"}})
    assert "payload" not in await api.run(tenant, answer.json()["id"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
clean_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@in_one_loop
@given(value=json_values, text=clean_text, ascii_only=st.booleans())
async def test_payload_bytes_are_the_same_after_a_round_trip(
    api: Api, tenant: Tenant, value: Any, text: str, ascii_only: bool
) -> None:
    try:
        payload = json.dumps(value, ensure_ascii=ascii_only).encode()
        payload.decode()
        msgspec.json.decode(payload, type=msgspec.Raw)
    except (UnicodeEncodeError, msgspec.DecodeError):
        return
    raw = await api.trigger(tenant, b'{"payload":' + payload + b"}")
    plain = await api.trigger(tenant, {"payload": text, "options": {"payloadType": "text/plain"}})
    assert raw_member(await api.get(tenant, f"/api/v3/runs/{raw.json()['id']}"), "payload") == payload
    assert (await api.run(tenant, plain.json()["id"]))["payload"] == text


# --- who asks ------------------------------------------------------------------------------------------------------


async def test_without_a_known_key_nothing_is_answered_but_how_to_get_in(
    api: Api, tenant: Tenant, database: Database, subtests: pytest.Subtests
) -> None:
    for header in (None, "Bearer", "Bearer nobody", "Basic YTpi", "Bearer \xff\xfe"):
        with subtests.test(header=header):
            headers = {} if header is None else {b"authorization": header.encode("latin-1")}
            answer = await api.client.post("/api/v1/tasks/echo/trigger", json={}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.headers["content-type"] == "application/problem+json"
            assert "API key" in answer.json()["error"]
            assert fields_of(answer) == ["authorization"]
    assert await count_runs(database) == 0


# --- bad input -----------------------------------------------------------------------------------------------------


BAD: list[tuple[bytes, int, list[str]]] = [
    (b"", 400, ["body"]),
    (b"{", 400, ["body"]),
    (b'{"payload": NaN}', 400, ["body"]),
    (b'{"payload": "\xff"}', 400, ["body"]),
    (b'\xef\xbb\xbf{"payload": 1}', 400, ["body"]),
    (b'{"payload": "\\ud800"}', 400, ["body"]),
    (b'{"payload": ' + b"[" * 1500 + b"]" * 1500 + b"}", 400, ["body"]),
    (b"[]", 422, ["body"]),
    (b'{"options": []}', 422, ["options"]),
    (b'{"options": {"tags": ["\\ud800"]}}', 422, ["options.tags[0]"]),
    (b'{"options": {"tags": "a\\u0000b", "delay": "soon"}}', 422, ["options.tags", "options.delay"]),
    (b'{"options": {"idempotencyKey": "a\\u0000b"}}', 422, ["options.idempotencyKey"]),
    (b'{"options": {"priority": 9223372036854775809}}', 422, ["options.priority"]),
    (b'{"options": {"ttl": 9007199254740993}}', 422, ["options.ttl"]),
    (b'{"options": {"maxAttempts": 0}}', 422, ["options.maxAttempts"]),
    (b'{"options": {"metadata": "{", "metadataType": "application/json"}}', 422, ["options.metadata"]),
    (b'{"options": {"parentRunId": "run_nobody"}}', 422, ["options.parentRunId"]),
    (b'{"options": {"resumeParentOnCompletion": true}}', 422, ["options.parentRunId"]),
    (b'{"payload": {}, "options": {"payloadType": "application/json"}}', 422, ["payload"]),
]


async def test_bad_input_is_told_by_field_and_changes_nothing(
    api: Api, tenant: Tenant, database: Database, subtests: pytest.Subtests
) -> None:
    for body, status, fields in BAD:
        with subtests.test(str(body[:80])):
            answer = await api.trigger(tenant, body)
            assert (answer.status_code, fields_of(answer)) == (status, fields)
            problem = answer.json()
            assert problem["status"] == status
            assert problem["error"] == problem["detail"]
            assert all(error["detail"] for error in problem["errors"])
    assert await count_runs(database) == 0


async def test_an_unknown_task_is_named(api: Api, tenant: Tenant, database: Database) -> None:
    answer = await api.trigger(tenant, task="nobody%2Fknows")
    assert (answer.status_code, fields_of(answer)) == (404, ["taskId"])
    assert "'nobody/knows'" in answer.json()["error"]
    assert await count_runs(database) == 0


async def test_a_task_id_that_cannot_be_is_refused(api: Api, tenant: Tenant) -> None:
    for task in ("%00", "a%0Ab", "%FF", "t" * 257):
        answer = await api.trigger(tenant, task=task)
        assert (answer.status_code, fields_of(answer)) == (422, ["taskId"])


async def test_a_body_that_is_not_said_to_be_json_is_refused(api: Api, tenant: Tenant, database: Database) -> None:
    for content_type in (None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
        headers = {**bearer(tenant), **({} if content_type is None else {"content-type": content_type})}
        answer = await api.client.post("/api/v1/tasks/echo/trigger", content=b"{}", headers=headers)
        assert (answer.status_code, fields_of(answer)) == (415, ["content-type"])
        assert "application/json" in answer.json()["error"]
    assert await count_runs(database) == 0


async def test_every_way_of_saying_json_will_do(api: Api, tenant: Tenant) -> None:
    for content_type in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"):
        assert (await api.trigger(tenant, {}, content_type=content_type)).status_code == 200


async def test_a_body_over_the_limit_is_refused_chunked_or_not(
    start: Start, tenant: Tenant, database: Database
) -> None:
    exact = b'{"payload": "' + b"x" * (LIMIT_BYTES - 15) + b'"}'

    async def chunks() -> AsyncIterator[bytes]:
        yield exact
        yield b" "

    async with start(body_limit_bytes=LIMIT_BYTES) as api:
        assert len(exact) == LIMIT_BYTES
        assert (await api.trigger(tenant, exact)).status_code == 200
        answer = await api.trigger(tenant, exact + b" ")
        assert (answer.status_code, fields_of(answer)) == (413, ["body"])
        assert "MOLLIFIER_BODY_LIMIT_BYTES" in answer.json()["error"]
        headers = {**bearer(tenant), "content-type": "application/json"}
        streamed = await api.client.post("/api/v1/tasks/echo/trigger", content=chunks(), headers=headers)
        assert (streamed.status_code, fields_of(streamed)) == (413, ["body"])
    assert await count_runs(database) == 1


async def test_another_environments_run_is_no_parent(api: Api, tenant: Tenant, neighbour: Tenant) -> None:
    foreign = await api.triggered(neighbour)
    answer = await api.trigger(tenant, {"options": {"parentRunId": foreign}})
    assert (answer.status_code, fields_of(answer)) == (422, ["options.parentRunId"])


# --- keys ----------------------------------------------------------------------------------------------------------


async def test_an_idempotency_key_answers_with_the_run_it_is_bound_to(
    api: Api, tenant: Tenant, neighbour: Tenant
) -> None:
    first = await api.triggered(tenant, 1, idempotencyKey="order-1")
    again = await api.trigger(tenant, {"payload": 2}, idempotency_key="order-1")
    assert again.json() == {"id": first, "isCached": True}
    assert await api.triggered(neighbour, 1, idempotencyKey="order-1") != first


async def test_a_key_of_a_header_may_be_any_text(api: Api, tenant: Tenant) -> None:
    first = await api.triggered(tenant, 1, idempotencyKey="bestellung-ä")
    headers = [(b"authorization", f"Bearer {tenant.api_key}".encode()), (b"idempotency-key", "bestellung-ä".encode())]
    again = await api.client.post("/api/v1/tasks/echo/trigger", json={}, headers=headers)
    assert again.json() == {"id": first, "isCached": True}


async def test_a_retried_request_gets_the_run_of_the_first_one(api: Api, tenant: Tenant) -> None:
    first = await api.trigger(tenant, {"payload": 1}, x_trigger_request_idempotency_key="request-1")
    again = await api.trigger(tenant, {"payload": 1}, x_trigger_request_idempotency_key="request-1")
    assert again.json() == {"id": first.json()["id"], "isCached": False}


async def test_a_hundred_triggers_at_once_with_one_key_make_one_run(
    api: Api, tenant: Tenant, database: Database
) -> None:
    answers = await asyncio.gather(
        *(api.trigger(tenant, {"payload": n, "options": {"idempotencyKey": "one"}}) for n in range(100))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum(not answer.json()["isCached"] for answer in answers) == 1
    assert await count_runs(database) == 1


async def test_a_key_is_free_again_when_its_run_failed(api: Api, tenant: Tenant, database: Database) -> None:
    first = await api.triggered(tenant, 1, idempotencyKey="order-1", idempotencyKeyTTL="1h")
    await change_run(database, first, status="FAILED", idempotency_slot=None)
    assert await api.triggered(tenant, 1, idempotencyKey="order-1") != first


async def test_the_callers_trace_is_kept(api: Api, tenant: Tenant, database: Database) -> None:
    run_id = (await api.trigger(tenant, {}, traceparent=TRACEPARENT, tracestate="a=1")).json()["id"]
    from mollifier.postgres.engine import PostgresRunEngine

    run = await PostgresRunEngine(database).get_run(tenant.env_id, run_id)
    assert run is not None
    assert (run.snapshot.traceparent, run.snapshot.tracestate) == (TRACEPARENT, "a=1")


async def test_a_database_that_cannot_be_reached_is_a_503_that_says_when_to_come_back(
    start: Start, tenant: Tenant
) -> None:
    async with start(database_url="postgresql://nobody@127.0.0.1:1/nothing") as api:
        answer = await api.trigger(tenant)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
