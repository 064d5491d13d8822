"""Nobody reaches another tenant: every route of the served document, for everything that a tenant has, with everybody else's key.

A route that is added is in the document and so in these tests; one whose path or body names something new fails them until it is told
here what that is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.http.app import create_app
from mollifier.model import Tenant
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from mollifier.server import Server
from mollifier.settings import Settings
from tests.http.conftest import ADMIN_TOKEN, TASK, Api, Start, bearer, change_run
from tests.http.routes import PUBLIC, Route, routes
from tests.http.stores import dump

SECRET = "what only its owner may read"
KEY_OF_CREATED, KEY_OF_HELD = "of a created run", "of a held run"
# Whatever comes after the first trigger is held, for as long as the test takes.
DIVERT: dict[str, Any] = {
    "enabled": True,
    "divert": True,
    "trip_threshold": 1,
    "trip_window_ms": 3_600_000,
    "hold_ms": 3_600_000,
    "gate_deadline_ms": 30_000,
    "accept_deadline_ms": 30_000,
}
pytestmark = pytest.mark.leaves_keys

ALL = routes()
OF_ENVIRONMENTS = [route for route in ALL if route.security == "environmentKey"]
OF_ADMINISTRATORS = [route for route in ALL if route.security == "adminToken"]


@dataclass(frozen=True)
class Owner:
    """A tenant and everything it has. `ids` are by what the segment of a path before them is called."""

    tenant: Tenant
    ids: Mapping[str, Sequence[str]]

    @property
    def names(self) -> set[str]:
        """Whatever must not appear in anybody else's answer."""
        hidden = {"runs", "batches", "environments", "organizations", "projects", "keys"}
        return {SECRET} | {name for kind in hidden for name in self.ids[kind]}


async def furnish(api: Api, tenant: Tenant, database: Database, redis: Redis) -> Owner:
    """Give the tenant runs that are created and held, delayed and not, ended, dead, in batches and with keys."""

    async def announced() -> str:
        return (await api.post(tenant, "/api/v3/batches", {"runCount": 5})).json()["id"]

    async def batch() -> str:
        return (await api.post(tenant, "/api/v2/tasks/batch", {"items": [{"task": TASK, "payload": SECRET}]})).json()[
            "id"
        ]

    async def several(key: str) -> list[str]:
        return [
            await api.triggered(tenant, SECRET, idempotencyKey=key, tags=["secret"]),
            await api.triggered(tenant, SECRET, delay="1h", metadata={"of": SECRET}),
        ]

    created = await several(KEY_OF_CREATED)
    ended = await api.triggered(tenant, SECRET)
    await change_run(database, ended, status="COMPLETED")
    batches = [await announced(), await batch()]
    await api.admin("PUT", f"organizations/{tenant.org_id}/flags", {"mollifierEnabled": True})
    await api.triggered(tenant)
    dead = await api.triggered(tenant, SECRET)
    buffer = Buffer(Server(redis), Settings)
    entry = await buffer.pop(tenant.org_id, tenant.env_id)
    assert entry is not None
    assert (entry.run_id, await buffer.fail(entry, SECRET)) == (dead, "held")
    held = await several(KEY_OF_HELD)
    batches.append(await batch())
    counts = (await api.admin("GET", "buffer")).json()
    assert counts["queued"] == 3
    (key,) = (await api.admin("GET", f"environments/{tenant.env_id}/keys")).json()
    ids = {
        "runs": [*created, *held, ended, dead],
        "dead-letters": [dead],
        "batches": batches,
        "idempotencyKeys": [quote(key, safe="") for key in (KEY_OF_CREATED, KEY_OF_HELD)],
        "tasks": [TASK],
        "organizations": [tenant.org_id],
        "projects": [tenant.project_id],
        "environments": [tenant.env_id],
        "keys": [key["id"]],
        "flags": ["mollifierEnabled"],
    }
    return Owner(tenant, ids)


@dataclass(frozen=True)
class House:
    """An API in divert mode, a tenant with everything, and one with nothing."""

    api: Api
    owner: Owner
    neighbour: Tenant
    database: Database
    redis: Redis

    async def dump(self) -> Any:
        return await dump(self.database, self.redis)


@pytest.fixture
async def house(start: Start, database: Database, redis_client: Redis, redis_url: str) -> AsyncIterator[House]:
    tenants = Tenants(database)
    tenant, neighbour = await tenants.create_tenant("owner"), await tenants.create_tenant("neighbour")
    async with start(redis_url=redis_url, **DIVERT) as api:
        yield House(api, await furnish(api, tenant, database, redis_client), neighbour, database, redis_client)


async def asked(api: Api, route: Route, path: str, authorization: str | None) -> httpx.Response:
    content, headers = route.content()
    login = {} if authorization is None else {"Authorization": f"Bearer {authorization}"}
    return await api.client.request(route.method, path, content=content, headers={**headers, **login})


def test_every_route_that_is_served_is_in_the_document() -> None:
    app = create_app(Settings(database_url="postgresql://h/d"))
    served = {route.path_format for route in app.routes}
    assert served - {route.path for route in ALL} == PUBLIC


def test_whatever_needs_no_key_is_known_to() -> None:
    assert {route.path for route in ALL if route.security is None} == {"/healthz", "/readyz", "/metrics"}


async def test_whatever_a_tenant_has_is_not_there_for_another(house: House, subtests: pytest.Subtests) -> None:
    api, owner = house.api, house.owner
    naming = [route for route in OF_ENVIRONMENTS if set(route.kinds.values()) - {"tasks"}]
    assert len(naming) > 10
    before = await house.dump()
    for route in naming:
        with subtests.test(str(route)):
            for path in route.paths(owner.ids):
                methods = [route.method, "HEAD"] if route.method == "GET" else [route.method]
                answer = await asked(api, route, path, house.neighbour.api_key)
                assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
                assert SECRET not in answer.text
                if "HEAD" in methods:
                    assert (await api.client.head(path, headers=bearer(house.neighbour))).status_code == 404
            assert await house.dump() == before
    for route in naming:
        with subtests.test(f"{route}, by its owner"):
            answers = [await asked(api, route, path, owner.tenant.api_key) for path in route.paths(owner.ids)]
            # What an earlier route has cancelled conflicts with a later one.
            assert any(a.is_success or a.status_code == 409 for a in answers), "the request is none that gets anywhere"


async def test_no_other_credentials_open_a_tenant(house: House, subtests: pytest.Subtests) -> None:
    api, owner = house.api, house.owner
    revoked = (await api.admin("POST", f"environments/{owner.tenant.env_id}/keys")).json()
    await api.admin("DELETE", f"environments/{owner.tenant.env_id}/keys/{revoked['id']}")
    (prefix,) = {
        key["prefix"] for key in (await api.admin("GET", f"environments/{owner.tenant.env_id}/keys")).json()[:1]
    }
    nobodys = [None, ADMIN_TOKEN, revoked["key"], prefix, owner.ids["keys"][0], owner.tenant.api_key.lower()]
    before = await house.dump()
    for route in OF_ENVIRONMENTS:
        with subtests.test(str(route)):
            path = next(route.paths(owner.ids))
            for credentials in nobodys:
                assert (await asked(api, route, path, credentials)).status_code == 401
            assert await house.dump() == before
    for route in OF_ADMINISTRATORS:
        with subtests.test(str(route)):
            path = next(route.paths(owner.ids))
            for credentials in (None, owner.tenant.api_key, house.neighbour.api_key, ADMIN_TOKEN.upper()):
                assert (await asked(api, route, path, credentials)).status_code == 401
            assert await house.dump() == before


async def test_an_administrator_reaches_a_key_through_its_own_environment_only(
    house: House, subtests: pytest.Subtests
) -> None:
    api, owner = house.api, house.owner
    crossed = {**owner.ids, "environments": [house.neighbour.env_id], "organizations": [house.neighbour.org_id]}
    before = await house.dump()
    # Flags are names of everybody's, nothing that belongs to one organization.
    nested = [route for route in OF_ADMINISTRATORS if len(route.kinds) > 1 and "flags" not in route.kinds.values()]
    assert len(nested) >= 2
    for route in nested:
        with subtests.test(str(route)):
            for path in route.paths(crossed):
                assert (await asked(api, route, path, ADMIN_TOKEN)).status_code == 404
            assert await house.dump() == before


async def test_routes_that_name_nothing_show_nothing_of_another_tenant(house: House, subtests: pytest.Subtests) -> None:
    api, owner = house.api, house.owner
    cursors = (await api.get(owner.tenant, "/api/v1/runs", **{"page[size]": "2"})).json()["pagination"]
    references = [cursors["next"], *owner.names - {SECRET}, TASK, "secret", KEY_OF_HELD]
    for route in OF_ENVIRONMENTS:
        for name in route.query:
            with subtests.test(f"{route} {name}"):
                for reference in references:
                    answer = await api.get(house.neighbour, next(route.paths(owner.ids)), **{name: reference})
                    assert not hidden_in(answer, owner, reference)


def hidden_in(answer: httpx.Response, owner: Owner, *references: str) -> list[str]:
    """Return what the answer tells of the owner beyond what it was asked with."""
    return [name for name in owner.names - set(references) if name in answer.text]


FOREIGN: dict[str, dict[str, Any]] = {
    "parent": {"options": {"parentRunId": "{run}"}},
    "parent that waits": {"options": {"parentRunId": "{run}", "resumeParentOnCompletion": True}},
    "batch": {"options": {"parentBatch": "{batch}"}},
    "key": {"options": {"idempotencyKey": KEY_OF_HELD}},
    "key of a created run": {"options": {"idempotencyKey": KEY_OF_CREATED}},
}


@pytest.mark.parametrize("reference", FOREIGN)
async def test_a_trigger_that_names_what_another_tenant_has_changes_and_learns_nothing_of_it(
    house: House, reference: str
) -> None:
    api, owner = house.api, house.owner
    before = await seen_by(api, owner)
    for run_id in owner.ids["runs"]:
        for batch_id in owner.ids["batches"]:
            options = {
                name: value.format(run=run_id, batch=batch_id) if isinstance(value, str) else value
                for name, value in FOREIGN[reference]["options"].items()
            }
            answer = await api.trigger(house.neighbour, {"options": options})
            assert answer.is_success or answer.status_code in (404, 422), answer.text
            if answer.is_success:
                assert answer.json()["id"] not in owner.names
                read = await api.get(house.neighbour, f"/api/v3/runs/{answer.json()['id']}")
                assert not hidden_in(read, owner, run_id, batch_id)
                assert read.json()["relatedRuns"].get("parent") is None
    assert await seen_by(api, owner) == before


async def seen_by(api: Api, owner: Owner) -> list[str]:
    """Return all that the owner can read."""
    paths = [f"/api/v3/runs/{run_id}" for run_id in owner.ids["runs"]]
    paths += [f"/api/v2/batches/{batch_id}" for batch_id in owner.ids["batches"]]
    return [(await api.get(owner.tenant, path)).text for path in (*paths, "/api/v1/runs")]
