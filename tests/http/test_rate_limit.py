"""The limit of an API key's requests over HTTP: told in every answer, shared by replicas, and none where nobody can count."""

from __future__ import annotations

import re
from typing import Any

import httpx
import msgspec
import pytest

from mollifier.errors import SettingsError
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from tests.http.conftest import Api, Start, bearer, count_runs

# One window is longer than any test; a busy machine must not let a request pass uncounted.
LIMITED: dict[str, Any] = {"request_limit": 3, "request_limit_window_s": 3600, "gate_deadline_ms": 30_000}


def quota_in(answer: httpx.Response) -> tuple[int, int, int, int]:
    """Return limit, window, what remains and when there is more, as the answer's headers have them."""
    policy = re.fullmatch(r'"key";q=(\d+);w=(\d+)', answer.headers["ratelimit-policy"])
    left = re.fullmatch(r'"key";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert policy
    assert left
    return int(policy[1]), int(policy[2]), int(left[1]), int(left[2])


async def test_every_answer_tells_what_is_left_and_beyond_the_limit_it_is_a_429(
    start: Start, tenant: Tenant, redis_url: str, database: Database
) -> None:
    async with start(redis_url=redis_url, **LIMITED) as api:
        answers = [
            await api.trigger(tenant),
            await api.get(tenant, "/api/v3/runs/none"),
            await api.trigger(tenant, b"{"),
        ]
        assert [answer.status_code for answer in answers] == [200, 404, 400]
        assert [quota_in(answer)[:3] for answer in answers] == [(3, 3600, left) for left in (2, 1, 0)]
        refused = await api.trigger(tenant)
        read = await api.client.head("/api/v1/runs", headers=bearer(tenant))
    assert (refused.status_code, read.status_code) == (429, 429)
    assert refused.headers["content-type"] == "application/problem+json"
    limit, window_s, left, wait_s = quota_in(refused)
    assert (limit, window_s, left) == (3, 3600, 0)
    assert 0 < wait_s <= 3780
    assert refused.headers["retry-after"] == str(wait_s)
    assert "3 requests" in refused.json()["error"]
    assert await count_runs(database) == 1


async def test_each_key_has_a_limit_of_its_own_which_replicas_share(
    start: Start, tenant: Tenant, redis_url: str, database: Database
) -> None:
    secret = (await Tenants(database).create_key(tenant.env_id)).secret
    other = msgspec.structs.replace(tenant, api_key=secret)
    async with start(redis_url=redis_url, **LIMITED) as one, start(redis_url=redis_url, **LIMITED) as another:
        statuses = [(await api.trigger(tenant)).status_code for api in (one, another, one, another)]
        assert statuses == [200, 200, 200, 429]
        assert (await another.trigger(other)).status_code == 200


async def test_what_has_no_key_has_no_limit(start: Start, tenant: Tenant, redis_url: str) -> None:
    async with start(redis_url=redis_url, **LIMITED) as api:
        for _ in range(5):
            for answer in (
                await api.admin("GET", "organizations"),
                await api.client.get("/healthz"),
                await api.trigger(msgspec.structs.replace(tenant, api_key="unknown")),
            ):
                assert answer.status_code in (200, 401)
                assert "ratelimit" not in answer.headers
        assert (await api.trigger(tenant)).status_code == 200


async def test_off_nothing_is_told(api: Api, tenant: Tenant) -> None:
    answer = await api.trigger(tenant)
    assert not [name for name in answer.headers if name.startswith("ratelimit")]


async def test_without_the_buffers_server_requests_pass(start: Start, tenant: Tenant) -> None:
    async with start(redis_url="redis://127.0.0.1:1", **LIMITED) as api:
        answers = [await api.trigger(tenant) for _ in range(6)]
    assert {answer.status_code for answer in answers} == {200}
    assert not [answer for answer in answers if "ratelimit" in answer.headers]


async def test_a_limit_without_a_server_to_count_on_stops_the_boot(start: Start) -> None:
    with pytest.raises(SettingsError, match="MOLLIFIER_REDIS_URL") as caught:
        async with start(**LIMITED):
            pass
    assert caught.value.variable == "MOLLIFIER_REQUEST_LIMIT"
