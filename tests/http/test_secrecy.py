"""No secret and nothing of a customer's gets into a log, at any level, or into an answer that is not its own.

Everything that may be logged about happens here: triggers that go well and ones that do not, defects, outages of either store, runs that
fail. The log is written as the programs write it, at DEBUG. Only the test's own HTTP client is left out.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from redis.asyncio import Redis

from mollifier.model import Tenant
from mollifier.observability import LineHandler, configure_logging
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from mollifier.settings import Settings
from mollifier.worker import run_worker_process
from tests.core.support import until
from tests.http.conftest import Api, Start, bearer
from tests.postgres.support import Outage, execute, rows

PAYLOAD, METADATA, CONTEXT = "canary-in-the-payload", "canary-in-the-metadata", "canary-in-the-context"
KEY, REQUEST_KEY, TAG = "canary-in-the-key", "canary-in-the-request-key", "canary-in-the-tag"
ADMIN_TOKEN, WRONG_TOKEN = "canary-admin-token", "canary-wrong-token"
DATABASE_PASSWORD, REDIS_PASSWORD = "canary-database-password", "canary-redis-password"
CREDENTIALS = [ADMIN_TOKEN, WRONG_TOKEN, DATABASE_PASSWORD, REDIS_PASSWORD]
CANARIES = [*CREDENTIALS, PAYLOAD, METADATA, CONTEXT, KEY, REQUEST_KEY, TAG]
DIVERT: dict[str, Any] = {
    "enabled": True,
    "divert": True,
    "trip_threshold": 1,
    "trip_window_ms": 3_600_000,
    "hold_ms": 3_600_000,
    "gate_deadline_ms": 2_000,
    "accept_deadline_ms": 2_000,
}
OPTIONS: dict[str, Any] = {"idempotencyKey": KEY, "metadata": {"of": METADATA}, "tags": [TAG], "maxAttempts": 1}
pytestmark = pytest.mark.leaves_keys


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """The log of everything in this process, at DEBUG."""
    root = logging.getLogger()
    before = root.level
    file = tmp_path / "all.log"
    configure_logging(file, logging.DEBUG)
    # The program keeps some quieter than that. Of these only one writes what passes through it: the rows of every answer.
    quiet = {name: logging.getLogger(name) for name in ("uvicorn", "procrastinate", "alembic")}
    levels = {name: logger.level for name, logger in quiet.items()}
    for logger in quiet.values():
        logger.setLevel(logging.DEBUG)
    clients = [logging.getLogger(name) for name in ("httpx", "httpcore")]
    for client in clients:
        client.propagate = False
    logging.getLogger(__name__).debug("at the lowest level")
    yield file
    for name, logger in quiet.items():
        logger.setLevel(levels[name])
    for client in clients:
        client.propagate = True
    for handler in [one for one in root.handlers if isinstance(one, LineHandler)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before)


@dataclass(frozen=True)
class Servers:
    """Both servers as users with passwords know them, and how to make them fail."""

    urls: dict[str, Any]
    database: Database
    redis: Any
    outage: Outage

    async def make_inserts_fail(self) -> None:
        """Bring a defect about: the database refuses every row, and repeats it in its message."""
        await execute(self.database, "ALTER TABLE runs ADD CONSTRAINT none_is_good CHECK (false) NOT VALID")

    async def end_failing(self) -> None:
        await execute(self.database, "ALTER TABLE runs DROP CONSTRAINT none_is_good")

    async def spoil_an_entry(self) -> None:
        """Have a number of a held entry be something of a customer's, as after a mishap with a copy."""
        names: list[bytes] = [name async for name in self.redis.scan_iter("mollifier:*:entry:*")]
        await self.redis.hset(names[0], "accepted_ms", PAYLOAD)

    async def shut_out(self) -> None:
        await self.redis.acl_setuser("canary", enabled=False)
        await self.redis.execute_command("CLIENT", "KILL", "USER", "canary")

    async def let_in(self) -> None:
        await self.redis.acl_setuser("canary", enabled=True)

    async def has_failed_run(self) -> bool:
        return bool(await rows(self.database, "SELECT 1 FROM runs WHERE error IS NOT NULL LIMIT 1"))


@pytest.fixture
async def servers(database: Database, database_url: str, redis_url: str, redis_client: Redis) -> AsyncIterator[Servers]:
    redis: Any = redis_client
    password = [f"+{REDIS_PASSWORD}"]
    await redis.acl_setuser(
        "canary", enabled=True, reset=True, passwords=password, keys="*", channels="*", commands=["+@all"]
    )
    url = urlsplit(database_url)
    urls = {
        "database_url": url._replace(netloc=f"{url.username}:{DATABASE_PASSWORD}@").geturl(),
        "redis_url": redis_url.replace("unix://", f"unix://canary:{REDIS_PASSWORD}@"),
    }
    yield Servers(urls, database, redis, Outage(database_url))
    await redis.acl_deluser("canary")


@pytest.fixture
async def enrolled(database: Database) -> Tenant:
    await record_tasks(database, {"tell": "tests"})
    tenants = Tenants(database)
    tenant = await tenants.create_tenant("canary")
    await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
    return tenant


class Visitor:
    """Somebody who does everything, and keeps the answers."""

    def __init__(self, api: Api, tenant: Tenant) -> None:
        self._api = api
        self._tenant = tenant
        self.answers: list[httpx.Response] = []

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        sent = {**bearer(self._tenant), "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        answer = await self._api.client.request(method, path, content=content, headers=sent)
        self.answers.append(answer)
        return answer

    async def trigger(self, **options: Any) -> str | None:
        body = {"payload": {"of": PAYLOAD}, "context": CONTEXT, "options": {**OPTIONS, **options}}
        answer = await self.ask("POST", "/api/v1/tasks/tell/trigger", body)
        return answer.json().get("id")

    async def use_everything(self) -> list[str]:
        """Trigger, read and change, in every way that works; return the runs."""
        runs = [await self.trigger(), await self.trigger(idempotencyKey=f"{KEY} again"), await self.trigger(delay="1h")]
        path = "/api/v1/tasks/tell/trigger"
        await self.ask("POST", path, {"payload": PAYLOAD}, x_trigger_request_idempotency_key=REQUEST_KEY)
        await self.ask("POST", path, {"payload": PAYLOAD}, idempotency_key=f"{KEY} in a header")
        items = [{"task": "tell", "payload": PAYLOAD, "options": {"metadata": METADATA}}] * 3
        await self.ask("POST", "/api/v2/tasks/batch", {"items": items})
        batch = (await self.ask("POST", "/api/v3/batches", {"runCount": 2, "idempotencyKey": KEY})).json().get("id")
        line = json.dumps({"index": 0, "task": "tell", "payload": PAYLOAD}).encode()
        await self.ask("POST", f"/api/v3/batches/{batch}/items", line, content_type="application/x-ndjson")
        await self.ask("GET", f"/api/v2/batches/{batch}")
        await self.ask("GET", f"/api/v1/runs?filter[tag]={TAG}")
        found = [run for run in runs if run]
        for run in found:
            await self.ask("GET", f"/api/v3/runs/{run}")
            operation = {"type": "append", "key": METADATA, "value": METADATA}
            await self.ask("PUT", f"/api/v1/runs/{run}/metadata", {"operations": [operation]})
            await self.ask("POST", f"/api/v1/runs/{run}/tags", {"tags": [f"{TAG}-2"]})
            await self.ask("POST", f"/api/v1/runs/{run}/replay")
        await self.ask("POST", f"/api/v2/runs/{found[-1] if found else 'none'}/cancel")
        await self.ask("POST", f"/api/v1/idempotencyKeys/{quote(KEY)}/reset", {"taskIdentifier": "tell"})
        return found

    async def make_every_mistake(self) -> None:
        """Send what is refused, secrets in every place of it."""
        path = "/api/v1/tasks/tell/trigger"
        for body in (
            f'{{"payload": "{PAYLOAD}'.encode(),
            f'{{"payload": "{PAYLOAD}\\ud800"}}'.encode(),
            f'["{PAYLOAD}"]'.encode(),
            b'{"payload": "%s\xff"}' % PAYLOAD.encode(),
            {"payload": PAYLOAD, "options": {"payloadType": PAYLOAD, "metadata": METADATA, "metadataType": METADATA}},
            {"payload": PAYLOAD, "options": {"idempotencyKey": f"{KEY}\0", "tags": [[TAG]], "delay": PAYLOAD}},
            {"payload": PAYLOAD, "options": {"payloadType": "application/json", "idempotencyKeyTTL": KEY}},
            {"payload": PAYLOAD * 2_000},
        ):
            await self.ask("POST", path, body)
        await self.ask("POST", path, PAYLOAD.encode(), content_type="text/plain")
        await self.ask("POST", "/api/v1/tasks/nobody/trigger", {"payload": PAYLOAD})
        for authorization in (f"Bearer {WRONG_TOKEN}", WRONG_TOKEN, f"Basic {WRONG_TOKEN}"):
            for place in (path, "/admin/api/v1/flags", f"/{WRONG_TOKEN}"):
                await self.ask("POST", place, {"payload": PAYLOAD}, authorization=authorization)
        for place in ("organizations", "environments/none/keys", "buffer", "flags"):
            await self.ask("GET", f"/admin/api/v1/{place}", authorization=f"Bearer {ADMIN_TOKEN}")


@asynccontextmanager
async def worker(settings: Settings) -> AsyncGenerator[None]:
    stop = asyncio.Event()
    running = asyncio.create_task(run_worker_process(settings, stop=stop))
    try:
        yield
    finally:
        stop.set()
        await running


def events(log_file: Path) -> list[str]:
    return [json.loads(line)["event"] for line in log_file.read_text().splitlines()]


def leaks(text: str, *secrets: str) -> list[str]:
    """Return the lines with a secret in them, in whatever encoding."""
    forms = {form for secret in secrets for form in (secret, quote(secret), secret.encode().hex())}
    return [line[:2000] for line in text.splitlines() if any(form in line for form in forms)]


async def test_whatever_happens_the_log_tells_no_secret_and_nothing_of_a_customer_s(
    start: Start, enrolled: Tenant, servers: Servers, log_file: Path
) -> None:
    settings: dict[str, Any] = {**servers.urls, **DIVERT, "admin_token": ADMIN_TOKEN, "body_limit_bytes": 10_000}
    async with start(**settings) as api:
        visitor = Visitor(api, enrolled)
        await visitor.use_everything()
        await visitor.make_every_mistake()
        await servers.make_inserts_fail()
        await visitor.trigger(idempotencyKey=f"{KEY} of a defect", debounce={"key": KEY, "delay": "1h"})
        await servers.end_failing()
        await servers.outage.begin()
        await visitor.use_everything()
        await servers.shut_out()
        await visitor.use_everything()
        await servers.outage.end()
        await visitor.use_everything()
        await servers.let_in()
        await servers.spoil_an_entry()
        async with worker(Settings(**servers.urls, **DIVERT, tasks=("tests.http.telling_tasks",))):
            await until(servers.has_failed_run)

            async def has_met_the_spoilt_entry() -> bool:
                return "mollifier.malformed_entry" in events(log_file)

            await until(has_met_the_spoilt_entry)
    nowhere = {
        "database_url": f"postgresql://u:{DATABASE_PASSWORD}@127.0.0.1:1/none",
        "redis_url": f"redis://u:{REDIS_PASSWORD}@127.0.0.1:1",
    }
    async with start(**{**settings, **nowhere}) as api:
        lost = Visitor(api, enrolled)
        await lost.use_everything()
        await lost.ask("GET", "/readyz")
        visitor.answers += lost.answers

    seen = set(events(log_file))
    told = ("buffered", "drained", "failed_open", "unavailable", "unexpected")
    assert {"at the lowest level", *(f"mollifier.{name}" for name in told)} <= seen
    assert leaks(log_file.read_text(), *CANARIES, enrolled.api_key) == []
    statuses = {answer.status_code for answer in visitor.answers}
    assert statuses >= {200, 400, 401, 404, 413, 415, 422, 500, 503}
    for answer in visitor.answers:
        told = answer.text if answer.is_success else answer.text.replace(KEY, "")
        secrets = CREDENTIALS if answer.is_success else CANARIES
        assert leaks(f"{told}\n{answer.headers}", *secrets, enrolled.api_key) == []
