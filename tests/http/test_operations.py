"""What an operator meets: health, metrics, the documentation, and how the API treats what it does not know."""

import asyncio
import os
import re
import signal
import socket
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import text

from mollifier.buffer import Buffer
from mollifier.errors import SettingsError
from mollifier.http.server import ApiServer, serve
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from mollifier.server import Server
from mollifier.settings import Settings
from tests.http.conftest import Api, Start


async def test_the_process_is_up(api: Api) -> None:
    answer = await api.client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_it_is_ready_while_the_database_answers_and_tells_whether_anybody_drains(
    start: Start, redis_url: str, database: Database
) -> None:
    async with start(redis_url=redis_url, enabled=True) as api:
        alone = await api.client.get("/readyz")
        await appear_as_worker(database)
        accompanied = await api.client.get("/readyz")
    assert (alone.status_code, accompanied.status_code) == (200, 200)
    assert alone.json() == {"status": "degraded", "database": "ok", "buffer": "ok", "drainer": "down"}
    assert accompanied.json() == {"status": "ok", "database": "ok", "buffer": "ok", "drainer": "ok"}


async def test_entries_that_nobody_drains_degrade_it(
    start: Start, redis_url: str, redis_client: Redis, database: Database, tenant: Tenant
) -> None:
    await Buffer(Server(redis_client), Settings).accept("run_1", tenant.env_id, tenant.org_id, b"x")
    client: Any = redis_client
    (key,) = await client.keys("*:entry:*")
    await client.hset(key, "accepted_ms", "1")
    await appear_as_worker(database)
    async with start(redis_url=redis_url, enabled=True) as api:
        assert (await api.client.get("/readyz")).json()["drainer"] == "degraded"


async def test_a_worker_that_cannot_create_runs_degrades_it_until_it_can(
    start: Start, redis_url: str, redis_client: Redis, database: Database
) -> None:
    buffer = Buffer(Server(redis_client), Settings)
    await appear_as_worker(database)
    async with start(redis_url=redis_url, enabled=True) as api:
        await buffer.tell_engine_away(60_000)
        away = await api.client.get("/readyz")
        await buffer.tell_engine_back()
        back = await api.client.get("/readyz")
    assert (away.status_code, away.json()["status"], away.json()["drainer"]) == (200, "degraded", "degraded")
    assert back.json()["drainer"] == "ok"


async def appear_as_worker(database: Database) -> None:
    async with database.statement() as connection:
        await connection.execute(text("INSERT INTO procrastinate_workers DEFAULT VALUES"))


async def test_it_is_not_ready_without_its_database(start: Start) -> None:
    async with start(database_url="postgresql://nobody@127.0.0.1:1/nothing") as api:
        answer = await api.client.get("/readyz")
        assert (await api.client.get("/healthz")).status_code == 200
    assert (answer.status_code, answer.json()["status"], answer.json()["database"]) == (503, "down", "down")


async def test_a_database_without_tables_is_a_503_and_named_in_the_log(
    start: Start, empty_database_url: str, tenant: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    async with start(database_url=empty_database_url) as api:
        assert (await api.trigger(tenant)).status_code == 503
    details = [record.__dict__.get("fields", {}).get("detail", "") for record in caplog.records]
    assert any("mollifier migrate" in detail for detail in details)


async def test_metrics_measure_requests_by_route(api: Api, tenant: Tenant) -> None:
    await api.triggered(tenant)
    await api.client.get("/nowhere/at/all")
    text = (await api.client.get("/metrics")).text
    routes = set(re.findall(r'http_server_request_duration_seconds_count\{.*http_route="([^"]*)"', text))
    assert routes == {"/api/v1/tasks/{taskId}/trigger", "(none)"}
    assert tenant.env_id not in text


async def test_the_documentation_loads_nothing_from_elsewhere(api: Api) -> None:
    page = await api.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert re.findall(r'(?:src|href)="(?!#|/schema)[^"]*"', page.text) == []
    for route in ("/api/v1/tasks/{taskId}/trigger", "/admin/api/v1/flags", "/readyz"):
        assert route in page.text


async def test_the_openapi_document_describes_bodies_and_errors(api: Api) -> None:
    document = (await api.client.get("/schema/openapi.json")).json()
    trigger = document["paths"]["/api/v1/tasks/{taskId}/trigger"]["post"]
    assert trigger["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/TriggerBody")
    assert set(trigger["responses"]) == {"200", "400", "401", "404", "413", "415", "422", "429", "503"}
    options = document["components"]["schemas"]["TriggerOptions"]["properties"]
    assert {"idempotencyKeyTTL", "tags", "delay", "concurrencyKey"} <= set(options)
    named = set(re.findall(r'"#/components/schemas/(\w+)"', (await api.client.get("/schema/openapi.json")).text))
    assert named <= set(document["components"]["schemas"])


# --- what it does not know -----------------------------------------------------------------------------------------


async def test_no_such_route_is_a_problem(api: Api) -> None:
    for path in ("/", "/nowhere", "/api/v1/tasks", "/api/v1/tasks/a/b/trigger", "/%FF/%2F", "/api/v1/tasks//trigger"):
        answer = await api.client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
        assert "/docs" in answer.json()["error"]


async def test_another_method_is_told_which_ones_there_are(api: Api) -> None:
    answer = await api.client.get("/api/v1/tasks/echo/trigger")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST, OPTIONS"
    assert answer.json()["status"] == 405


async def test_options_and_head_are_answered(api: Api) -> None:
    options = await api.client.options("/api/v1/tasks/echo/trigger")
    assert (options.status_code, options.headers["allow"]) == (204, "OPTIONS, POST")
    head = await api.client.head("/healthz")
    assert (head.status_code, head.content) == (200, b"")
    assert (await api.client.head("/api/v1/tasks/echo/trigger")).status_code == 405


async def test_bytes_that_are_no_http_do_no_harm(api: Api) -> None:
    url = api.client.base_url
    for sent in (
        b"\x00\xff\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: \xff\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(sent)
        writer.write_eof()
        first = await asyncio.wait_for(reader.readline(), 5)
        assert b" 500 " not in first
        writer.close()
    assert (await api.client.get("/healthz")).status_code == 200


# --- serving -------------------------------------------------------------------------------------------------------


async def test_it_says_where_it_listens_and_stops_on_a_signal(database_url: str) -> None:
    server = ApiServer(Settings(database_url=database_url))
    urls: list[str] = []

    def ready(url: str) -> None:
        urls.append(url)
        os.kill(os.getpid(), signal.SIGTERM)

    await server.run_until_stopped(ready)
    assert urls == [server.url]
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", server.url)


def test_it_does_not_start_without_a_database() -> None:
    with pytest.raises(SettingsError, match="MOLLIFIER_DATABASE_URL"):
        serve(Settings(), port=0)


def test_a_port_that_is_taken_is_an_os_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address: Any = taken.getsockname()
        with pytest.raises(OSError, match="in use"):
            serve(Settings(database_url="postgresql://h/d"), port=address[1])
