"""The API over real HTTP, in the test's own loop, on a real Valkey and a real Postgres."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import func, select, update

from mollifier.http.server import ApiServer
from mollifier.model import Tenant
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.tables import runs
from mollifier.postgres.tenants import Tenants
from mollifier.settings import Settings

TASK = "echo"
ADMIN_TOKEN = "admin"

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
