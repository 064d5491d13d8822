"""Random requests made from the served OpenAPI document: whatever comes in, each answer is one that the document declares.

The API diverts, its buffer is a real Valkey, and every trigger is held but the first: what names a run names a held one, half the time.
Every operation gets a few requests that keep to its schema and a few that break it, in an order that follows from the run's seed; then one after
the other gets more, until the time is up.

Every check of the library is asked. To `positive_data_acceptance` a 422 is an answer: what makes one is more than a schema can say, as a parent
that does not exist. Some have nothing to say here: `use_after_free`, `ensure_resource_availability` and `object_level_authorization`
are about requests that follow from one another, which the model-based tests, the simulation and the test of isolation make.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast
from zlib import crc32

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from mollifier.buffer import Buffer
from mollifier.http.server import ApiServer
from mollifier.model import Tenant
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from mollifier.server import Server, connect
from mollifier.settings import Settings
from tests.http.conftest import ADMIN_TOKEN, DIVERT, TASK

pytestmark = pytest.mark.leaves_keys

SECONDS = float(os.environ.get("MOLLIFIER_FUZZ_SECONDS", "5"))
SEED = int(os.environ.get("MOLLIFIER_FUZZ_SEED", "0")) or random.randrange(2**32)
ROUND = settings(
    max_examples=25,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
FIRST_ROUND = settings(ROUND, max_examples=10)

WITHOUT_INPUT = {"/healthz", "/readyz", "/metrics"}
"""Paths at which no request can break the schema."""
CONFIG = schemathesis.Config.from_dict(  # pyright: ignore[reportUnknownMemberType] - the library types it in part
    {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "401", "403", "404", "409", "422"]}}}
)

# A stream of one line is the JSON of that line.
schemathesis.serializer.alias("application/x-ndjson", "application/json")


class House:
    """A served API that holds what is triggered, a tenant who asks, and another one whom the operator is asked about."""

    def __init__(self, url: str, settings: Settings, tenant: Tenant, other: Tenant) -> None:
        self.url = url
        self._settings = settings
        self._tenant = tenant
        self._other = other

    def key(self, path: str) -> str:
        return ADMIN_TOKEN if path.startswith("/admin") else self._tenant.api_key

    def existing(self, path: str) -> Mapping[str, str]:
        """Return a name of something that is there for each parameter of the path."""
        names = {"taskId": TASK, "task": TASK, "taskIdentifier": TASK, "key": "known", "delay": "2h"}
        names |= {"env": self._tenant.env_id, "id": self._other.org_id}
        if "{batchId}" in path:
            names["batchId"] = self._ask("POST", "/api/v3/batches", {"runCount": 1000})["id"]
        if "{runId}" in path:
            held = {"delay": "1h"} if path.endswith("/reschedule") else {}
            names["runId"] = self._dead_letter() if path.startswith("/admin") else self._held(**held)
        if "{key}" in path:
            self._held(idempotencyKey=names["key"])
        if path.endswith("/result"):
            self._ask("POST", f"/api/v2/runs/{names['runId']}/cancel")
        if "/projects/{id}" in path:
            names["id"] = self._other.project_id
        if "/environments/{id}" in path:
            names["id"] = self._other.env_id
        if "{keyId}" in path:
            names["keyId"] = self._ask("POST", f"/admin/api/v1/environments/{self._other.env_id}/keys")["id"]
        return names

    def begin_a_burst(self) -> None:
        """Have every trigger held from now on: one passes."""
        self._held()
        self._held()
        assert self.queued() == 1

    def queued(self) -> int:
        return self._ask("GET", "/admin/api/v1/buffer")["queued"]

    def _held(self, **options: Any) -> str:
        return self._ask("POST", f"/api/v1/tasks/{TASK}/trigger", {"options": {"tags": ["held"], **options}})["id"]

    def _dead_letter(self) -> str:
        """Have what is oldest die, after one more is held."""
        self._held()
        return asyncio.run(self._let_die())

    async def _let_die(self) -> str:
        redis = connect(self._settings.redis_url or "")
        try:
            buffer = Buffer(Server(redis), lambda: self._settings)
            entry = await buffer.pop(self._tenant.org_id, self._tenant.env_id)
            assert entry is not None
            assert await buffer.fail(entry, "it was to die") == "held"
            return entry.run_id
        finally:
            await redis.aclose()

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self.key(path)}"}
        answer = httpx.request(method, f"{self.url}{path}", json=body, headers=headers)
        assert answer.is_success, answer.text
        return answer.json()


@pytest.fixture
def house(database_url: str, redis_url: str) -> Iterator[House]:
    """An API in a thread, for clients that block."""

    async def prepare() -> tuple[Tenant, Tenant]:
        async with Database(database_url) as database:
            await record_tasks(database, {TASK: "tests"})
            tenants = Tenants(database)
            tenant = await tenants.create_tenant("acme")
            await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
            return tenant, await tenants.create_tenant("other")

    tenant, other = asyncio.run(prepare())
    values: dict[str, Any] = {**DIVERT, "trip_threshold": 1, "trip_window_ms": 3_600_000, "hold_ms": 3_600_000}
    holding = Settings(database_url=database_url, redis_url=redis_url, admin_token=ADMIN_TOKEN, **values)
    server = ApiServer(holding)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server.run_until_stopped(lambda _: ready.set())))
    thread.start()
    assert ready.wait(30)
    house = House(server.url, holding, tenant, other)
    house.begin_a_burst()
    yield house
    server.should_exit = True
    thread.join()


@pytest.mark.fuzz
def test_every_answer_to_a_random_request_stands_every_check(house: House) -> None:
    print(f"replay it: make fuzz MOLLIFIER_FUZZ_SEED={SEED} ARGS=tests/http/test_fuzz.py")  # noqa: T201 - to replay
    schema: Any = schemathesis.openapi.from_url(f"{house.url}/schema/openapi.json", config=CONFIG)
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]
    random.Random(SEED).shuffle(operations)
    end = time.monotonic() + SECONDS
    turn = 0
    while turn < len(operations) or time.monotonic() < end:
        operation = operations[turn % len(operations)]
        how = FIRST_ROUND if turn < len(operations) else ROUND
        for mode in GenerationMode:
            if mode.is_positive or operation.path not in WITHOUT_INPUT:
                one_round(operation, house, mode, SEED + turn, how)
        turn += 1
    assert house.queued() > 0


def rename(part: Any, existing: Mapping[str, str]) -> None:
    """Name what exists, at every depth, wherever something is named."""
    if isinstance(part, dict):
        fields = cast("dict[str, Any]", part)
        for name, value in fields.items():
            if name in existing and isinstance(value, str):
                fields[name] = existing[name]
            rename(value, existing)
    elif isinstance(part, list):
        for item in cast("list[Any]", part):
            rename(item, existing)


def name_what_exists(case: Any, existing: Mapping[str, str]) -> None:
    """Name it in every part of the request that keeps to the schema."""
    parts = {"path": case.path_parameters, "query": case.query, "body": case.body}
    for location, component in case.meta.components.items():
        if component.mode.is_positive and location.value in parts:
            rename(parts[location.value], existing)


def one_round(operation: Any, house: House, mode: GenerationMode, seed_of_round: int, how: settings) -> None:
    existing, key = house.existing(operation.path), house.key(operation.path)

    @seed(seed_of_round)
    @how
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # Half of them name what exists, so that they get beyond a 404.
        if crc32(repr((case.path_parameters, case.query, case.body)).encode()) % 2:
            name_what_exists(case, existing)
        # The key is the one header there is: a request that breaks their schema has none, or no key.
        breaks_headers = any(
            location.value == "header" and component.mode.is_negative
            for location, component in case.meta.components.items()
        )
        headers = {} if breaks_headers else {"Authorization": f"Bearer {key}"}
        case.call_and_validate(base_url=house.url, headers=headers)

    check()
