"""The run API while the buffer's server is away: what Postgres has is answered, and what may be held is no 404."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from mollifier.embedded import EmbeddedStack, Stack
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from mollifier.server import connect
from tests.conftest import skipping_without_wheels
from tests.http.conftest import DIVERT, Diverting, Start

ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/v3/runs/{}", None),
    ("GET", "/api/v1/runs/{}/result", None),
    ("POST", "/api/v2/runs/{}/cancel", {}),
    ("POST", "/api/v1/runs/{}/tags", {"tags": ["x"]}),
    ("GET", "/api/v1/runs/{}/metadata", None),
    ("PUT", "/api/v1/runs/{}/metadata", {"metadata": {"a": 1}}),
    ("POST", "/api/v1/runs/{}/reschedule", {"delay": "1h"}),
    ("POST", "/api/v1/runs/{}/replay", {}),
]


@pytest.fixture
async def valkey() -> AsyncIterator[Stack]:
    """A Valkey of the test's own, to be stopped."""
    with skipping_without_wheels():
        async with EmbeddedStack(durable=False, postgres=False) as stack:
            yield stack


@pytest.fixture
async def stranded(start: Start, tenant: Tenant, database: Database, valkey: Stack) -> AsyncIterator[Diverting]:
    await Tenants(database).set_flags(tenant.org_id, {"mollifierEnabled": True})
    async with start(redis_url=valkey.redis_url, **DIVERT) as api, connect(valkey.redis_url) as redis:
        yield Diverting(api, tenant, redis, database)


async def test_what_may_be_held_is_a_503_that_says_when_to_come_again_and_what_is_created_is_answered(
    stranded: Diverting, valkey: Stack, subtests: pytest.Subtests
) -> None:
    root = await stranded.created()
    held = await stranded.held(parentRunId=root)
    child = await stranded.created(parentRunId=held)
    await valkey.stop("valkey")

    for method, path, body in ROUTES:
        for run_id in (held, "run_nobody"):
            with subtests.test(path, run_id=run_id):
                answer = await stranded.request(method, path.format(run_id), body)
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
    with subtests.test("a created run"):
        run = await stranded.run(child)
        assert run["relatedRuns"]["root"]["id"] == root
        assert "parent" not in run["relatedRuns"]
        assert (await stranded.run(root))["relatedRuns"] == {}
        assert (await stranded.post(f"/api/v1/runs/{child}/tags", {"tags": ["x"]})).status_code == 200
