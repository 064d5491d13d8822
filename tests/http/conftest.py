"""The API over real HTTP, in the test's own loop, on a real Valkey and a real Postgres."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from mollifier.http.server import ApiServer
from mollifier.model import Tenant
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
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
        sent = {"Authorization": f"Bearer {tenant.api_key}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return await self.client.post(f"/api/v1/tasks/{task}/trigger", json=body or {}, headers=sent)

    async def get_run(self, tenant: Tenant, run_id: str) -> httpx.Response:
        return await self.client.get(f"/api/v3/runs/{run_id}", headers=bearer(tenant))


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
def start(database: Database, database_url: str) -> Start:
    """Start an API on the test's database with the given settings; without `redis_url`, it has no buffer."""

    @asynccontextmanager
    async def started(**settings: Any) -> AsyncGenerator[Api]:
        server = ApiServer(Settings(**{"database_url": database_url, "admin_token": ADMIN_TOKEN, **settings}))
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
