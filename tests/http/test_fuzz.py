"""Random requests made from the served OpenAPI document: whatever comes in, each answer is one that the document declares."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.specs.openapi.checks import (
    positive_data_acceptance,  # pyright: ignore[reportUnknownVariableType] - the library types it in part
)

from mollifier.http.server import ApiServer
from mollifier.model import Tenant
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from mollifier.settings import Settings
from tests.http.conftest import ADMIN_TOKEN, TASK

SECONDS = float(os.environ.get("MOLLIFIER_FUZZ_SECONDS", "5"))
SEED = int(os.environ.get("MOLLIFIER_FUZZ_SEED", "0")) or random.randrange(2**32)
ROUND = settings(
    max_examples=25,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


# Every check holds but this one: what makes a request a 422 is more than a schema can say, as a parent that does not exist.
NOT_CHECKED: list[Any] = [positive_data_acceptance]

# A stream of one line is the JSON of that line.
schemathesis.serializer.alias("application/x-ndjson", "application/json")


@pytest.fixture
def served(database_url: str) -> Iterator[tuple[str, Tenant]]:
    """An API in a thread, for clients that block, and a tenant of it."""

    async def prepare() -> Tenant:
        async with Database(database_url) as database:
            await record_tasks(database, {TASK: "tests"})
            return await Tenants(database).create_tenant("acme")

    tenant = asyncio.run(prepare())
    server = ApiServer(Settings(database_url=database_url, admin_token=ADMIN_TOKEN))
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server.run_until_stopped(lambda _: ready.set())))
    thread.start()
    assert ready.wait(30)
    yield server.url, tenant
    server.should_exit = True
    thread.join()


@pytest.mark.fuzz
def test_every_answer_to_a_random_request_stands_every_check(served: tuple[str, Tenant]) -> None:
    url, tenant = served
    schema: Any = schemathesis.openapi.from_url(f"{url}/schema/openapi.json")
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]
    existing = {"taskId": TASK, "id": tenant.org_id, "batchId": announced(url, tenant)}
    end = time.monotonic() + SECONDS
    turn = 0
    while time.monotonic() < end:
        operation = operations[turn % len(operations)]
        one_round(operation, url, tenant, existing, SEED + turn)
        turn += 1


def announced(url: str, tenant: Tenant) -> str:
    """Return a batch that takes items."""
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    return httpx.post(f"{url}/api/v3/batches", json={"runCount": 1000}, headers=headers).json()["id"]


def one_round(operation: Any, url: str, tenant: Tenant, existing: Mapping[str, str], seed_of_round: int) -> None:
    key = ADMIN_TOKEN if operation.path.startswith("/admin") else tenant.api_key

    @seed(seed_of_round)
    @ROUND
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        # Half of them name what exists, so that they get beyond a 404.
        for name, value in existing.items():
            if name in (case.path_parameters or {}) and crc32(repr(case.body).encode()) % 2:
                case.path_parameters[name] = value
        case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {key}"}, excluded_checks=NOT_CHECKED)

    check()
