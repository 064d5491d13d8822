"""What a request may at most be: its head, how deep its JSON nests, its metadata. Beyond that, a 4xx that names what."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mollifier.fields import DEPTH_MAX
from mollifier.http.protocol import HEAD_BYTES_MAX, HEADERS_MAX
from mollifier.metadata import METADATA_BYTES_MAX
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from tests.http.conftest import Api, bearer, count_runs, fields_of


async def sent(api: Api, *parts: bytes) -> tuple[bytes, bytes]:
    """Send raw bytes; return the status line and all that follows it, once the server is done."""
    reader, writer = await asyncio.open_connection(api.client.base_url.host, api.client.base_url.port)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0)
        answer = await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    status, _, rest = answer.partition(b"\r\n")
    return status, rest


def problem_in(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


HOST = b"host: a\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"a: b\r\n" * HEADERS_MAX + b"\r\n",
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"a: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"x" * HEAD_BYTES_MAX + b": a\r\n\r\n",
        b"GET /" + b"x" * HEAD_BYTES_MAX + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    ],
    ids=["many headers", "a long value", "a long name", "a long url"],
)
async def test_a_head_over_a_limit_is_a_431_that_says_which_limits_there_are(api: Api, head: bytes) -> None:
    status, answer = await sent(api, head)
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    problem = problem_in(answer)
    assert (problem["status"], [error["field"] for error in problem["errors"]]) == (431, ["headers"])
    assert str(HEADERS_MAX) in problem["error"]
    assert (await api.client.get("/healthz")).status_code == 200


async def test_a_head_at_the_limits_is_served(api: Api) -> None:
    most = b"GET /healthz HTTP/1.1\r\n" + HOST + b"connection: close\r\n" + b"a: b\r\n" * (HEADERS_MAX - 2) + b"\r\n"
    longest = (
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"connection: close\r\na: " + b"x" * (HEAD_BYTES_MAX - 100) + b"\r\n\r\n"
    )
    for head in (most, longest):
        assert (await sent(api, head))[0] == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    ("beginning", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\na: ", b"HTTP/1.1 431 Request Header Fields Too Large"),
        (b"GET /", b"HTTP/1.1 431 Request Header Fields Too Large"),
        (
            b"POST /api/v3/batches/batch_a/items HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: ",
            b"HTTP/1.1 401 Unauthorized",
        ),
    ],
    ids=["header", "url", "trailer"],
)
async def test_what_never_ends_is_cut_off(api: Api, beginning: bytes, status: bytes) -> None:
    answered, _ = await sent(api, beginning, *[b"x" * 65_536] * 100)
    assert answered in (status, b"")


async def test_a_request_after_a_long_body_on_the_same_connection_is_served(api: Api, tenant: Tenant) -> None:
    for _ in range(3):
        assert (await api.trigger(tenant, {"payload": "x" * 1_000_000})).status_code == 200


# --- depth ---------------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


async def test_json_nests_to_the_limit_and_no_deeper(api: Api, tenant: Tenant, database: Database) -> None:
    # The body is an object, which is a level of its own.
    run_id = (await api.trigger(tenant, b'{"payload": %s}' % nested(DEPTH_MAX - 1))).json()["id"]
    assert (await api.get(tenant, f"/api/v3/runs/{run_id}")).content.count(nested(DEPTH_MAX - 1)) == 1
    for depth in (DEPTH_MAX, 10_000, 1_000_000):
        answer = await api.trigger(tenant, b'{"payload": %s}' % nested(depth))
        assert (answer.status_code, fields_of(answer)) == (400, ["body"])
        assert f"deeper than {DEPTH_MAX} levels" in answer.json()["error"]
        text = json.dumps({"payload": nested(depth + 1).decode(), "options": {"payloadType": "application/json"}})
        answer = await api.trigger(tenant, text.encode())
        assert (answer.status_code, fields_of(answer)) == (422, ["payload"])
    assert await count_runs(database) == 1


async def test_every_route_with_a_body_looks_at_how_deep_it_nests(api: Api, tenant: Tenant) -> None:
    run_id = await api.triggered(tenant)
    body = b'{"metadata": %s}' % nested(DEPTH_MAX)
    headers = {**bearer(tenant), "content-type": "application/json"}
    for method, path in (
        ("PUT", f"/api/v1/runs/{run_id}/metadata"),
        ("POST", f"/api/v1/runs/{run_id}/tags"),
        ("POST", f"/api/v2/runs/{run_id}/cancel"),
        ("POST", "/api/v2/tasks/batch"),
        ("POST", "/api/v3/batches"),
    ):
        answer = await api.client.request(method, path, content=body, headers=headers)
        assert (answer.status_code, fields_of(answer)) == (400, ["body"])


# --- metadata ------------------------------------------------------------------------------------------------------


async def test_metadata_over_the_limit_is_refused_where_it_comes(api: Api, tenant: Tenant, database: Database) -> None:
    large = {"a": "x" * METADATA_BYTES_MAX}
    answer = await api.trigger(tenant, {"options": {"metadata": large}})
    assert (answer.status_code, fields_of(answer)) == (422, ["options.metadata"])
    assert str(METADATA_BYTES_MAX) in answer.json()["error"]
    text = {"metadata": json.dumps(large), "metadataType": "application/json"}
    assert fields_of(await api.trigger(tenant, {"options": text})) == ["options.metadata"]
    answer = await api.post(
        tenant, "/api/v2/tasks/batch", {"items": [{"task": "echo", "options": {"metadata": large}}]}
    )
    assert fields_of(answer) == ["items[0].options.metadata"]
    assert await count_runs(database) == 0

    run_id = await api.triggered(tenant, metadata={"n": 1})
    path = f"/api/v1/runs/{run_id}/metadata"
    answer = await api.client.put(path, json={"metadata": large}, headers=bearer(tenant))
    assert (answer.status_code, fields_of(answer)) == (422, ["metadata"])
    assert (await api.get(tenant, path)).json() == {"metadata": {"n": 1}}
