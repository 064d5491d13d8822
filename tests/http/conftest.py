"""The API over real HTTP, in the test's own loop, on a real Valkey and a real Postgres."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy import func, select, update

from mollifier.facade import Mollifier
from mollifier.http.server import ApiServer
from mollifier.keys import Keyspace
from mollifier.model import Tenant
from mollifier.postgres.catalog import PostgresTaskCatalog, record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.tables import runs
from mollifier.postgres.tenants import Tenants
from mollifier.settings import Settings

TASK = "echo"
ADMIN_TOKEN = "admin"

PARTITIONS = 4
# What is held must not depend on how busy the machine is that runs the tests.
DIVERT: dict[str, Any] = {
    "enabled": True,
    "divert": True,
    "partitions": PARTITIONS,
    "trip_threshold": 1_000_000,
    "gate_deadline_ms": 30_000,
    "accept_deadline_ms": 30_000,
}

Start = Callable[..., AbstractAsyncContextManager["Api"]]


class Api:
    """A running API and a client of it."""

    def __init__(self, server: ApiServer, client: httpx.AsyncClient) -> None:
        self.server = server
        self.client = client

    async def trigger(self, tenant: Tenant, body: Any = None, task: str = TASK, **headers: str) -> httpx.Response:
        """Trigger with a body given as JSON-able value or as bytes; an underscore in a header's name stands for a hyphen."""
        sent = {**bearer(tenant), "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        return await self.client.post(f"/api/v1/tasks/{task}/trigger", content=content, headers=sent)

    async def triggered(self, tenant: Tenant, payload: Any = None, **options: Any) -> str:
        """Trigger a run and return its id."""
        answer = await self.trigger(tenant, {"payload": payload, "options": options})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    async def get(self, tenant: Tenant, path: str, **query: Any) -> httpx.Response:
        return await self.client.get(path, params=query, headers=bearer(tenant))

    async def run(self, tenant: Tenant, run_id: str) -> dict[str, Any]:
        """Read a run that is there."""
        answer = await self.get(tenant, f"/api/v3/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, tenant: Tenant, path: str, body: Any = None) -> httpx.Response:
        return await self.client.post(path, json={} if body is None else body, headers=bearer(tenant))

    async def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        return await self.client.request(method, f"/admin/api/v1/{path}", json=body, headers=headers)


def bearer(tenant: Tenant) -> dict[str, str]:
    return {"Authorization": f"Bearer {tenant.api_key}"}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database(database_url) as database:
        await record_tasks(database, {TASK: "tests", "a/b c": "tests"})
        yield database


@pytest.fixture
async def tenant(database: Database) -> Tenant:
    return await Tenants(database).create_tenant("acme")


@pytest.fixture
async def neighbour(database: Database) -> Tenant:
    return await Tenants(database).create_tenant("neighbour")


async def count_runs(database: Database) -> int:
    async with database.statement() as connection:
        return (await connection.execute(select(func.count()).select_from(runs))).scalar_one()


async def change_run(database: Database, run_id: str, **values: Any) -> None:
    """Arrange a state that only a worker brings about."""
    async with database.statement() as connection:
        await connection.execute(update(runs).where(runs.c.id == run_id).values(**values))


def raw_member(answer: httpx.Response, name: str) -> bytes:
    """Return the bytes of one member of the answer."""
    return bytes(msgspec.json.decode(answer.content, type=dict[str, msgspec.Raw])[name])


def fields_of(answer: httpx.Response) -> list[str]:
    return [error["field"] for error in answer.json()["errors"]]


@pytest.fixture
def start(database: Database, database_url: str) -> Start:
    """Start an API on the test's database with the given settings; without `redis_url`, it has no buffer."""

    @asynccontextmanager
    async def started(**settings: Any) -> AsyncGenerator[Api]:
        values: dict[str, Any] = {"database_url": database_url, "admin_token": ADMIN_TOKEN, **settings}
        observability = values.pop("observability", None)
        server = ApiServer(Settings(**values), observability=observability)
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(server.run_until_stopped(ready.set_result))
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving
        try:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                yield Api(server, client)
        finally:
            server.should_exit = True
            await serving

    return started


@pytest.fixture
async def api(start: Start) -> AsyncIterator[Api]:
    """An API with Mollifier off."""
    async with start() as running:
        yield running


class Diverting:
    """An API in divert mode and one tenant, whose triggers are created or held as the test says; nobody drains."""

    def __init__(self, api: Api, tenant: Tenant, redis: Redis, database: Database) -> None:
        self.api = api
        self.tenant = tenant
        self._redis = redis
        settings = Settings(redis_url="unix:///unused", **DIVERT)
        engine, tasks = PostgresRunEngine(database), PostgresTaskCatalog(database)
        self._drains = Mollifier(settings, engine=engine, tasks=tasks, redis=redis)

    async def hold(self) -> None:
        """Have the tenant's triggers held from now on."""
        await self._redis.set(self._tripped, "1", px=600_000)

    async def calm(self) -> None:
        """Have the tenant's triggers created from now on."""
        await self._redis.delete(self._tripped)

    async def created(self, payload: Any = None, **options: Any) -> str:
        """Trigger a run that is created."""
        await self.calm()
        return await self.api.triggered(self.tenant, payload, **options)

    async def held(self, payload: Any = None, **options: Any) -> str:
        """Trigger a run that is held."""
        await self.hold()
        before = await self.queued()
        run_id = await self.api.triggered(self.tenant, payload, **options)
        assert await self.queued() == before + 1
        return run_id

    async def either(self, store: str, payload: Any = None, **options: Any) -> str:
        """Trigger a run that the store named "created" or "held" has."""
        return await (self.held if store == "held" else self.created)(payload, **options)

    async def queued(self) -> int:
        return (await self.api.admin("GET", "buffer")).json()["queued"]

    async def drain(self, most: int | None = None) -> int:
        """Create the runs of all that is due, of at most so many; return of how many."""
        buffer, handle = self._drains.buffer, self._drains.drain_handler()
        assert buffer is not None
        drained = 0
        while drained != most and (entry := await buffer.pop(self.tenant.org_id, self.tenant.env_id)) is not None:
            assert await handle([entry]) == [None]
            assert await buffer.ack(entry) == "held"
            drained += 1
        return drained

    async def get(self, path: str, **query: Any) -> httpx.Response:
        return await self.api.get(self.tenant, path, **query)

    async def post(self, path: str, body: Any = None) -> httpx.Response:
        return await self.api.post(self.tenant, path, body)

    async def put(self, path: str, body: Any) -> httpx.Response:
        return await self.request("PUT", path, body)

    async def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return await self.api.client.request(method, path, json=body, headers=bearer(self.tenant))

    async def run(self, run_id: str) -> dict[str, Any]:
        return await self.api.run(self.tenant, run_id)

    @property
    def _tripped(self) -> str:
        return Keyspace(PARTITIONS).of(self.tenant.org_id).tripped(self.tenant.env_id)


@pytest.fixture
async def diverting(
    start: Start, tenant: Tenant, database: Database, redis_client: Redis, redis_url: str
) -> AsyncIterator[Diverting]:
    await Tenants(database).set_flags(tenant.org_id, {"mollifierEnabled": True})
    async with start(redis_url=redis_url, **DIVERT) as api:
        yield Diverting(api, tenant, redis_client, database)
