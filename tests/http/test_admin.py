"""The admin API: who may, what it makes, what it refuses."""

from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.caps import CAPS
from mollifier.model import Tenant
from mollifier.server import Server
from mollifier.settings import Settings, variable
from mollifier.sweeps import SweepReport
from tests.http.conftest import ADMIN_TOKEN, Api, Start, bearer, fields_of

ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "organizations", None),
    ("POST", "organizations", {"name": "x"}),
    ("GET", "organizations/{id}", None),
    ("GET", "organizations/{id}/projects", None),
    ("POST", "organizations/{id}/projects", {"name": "x"}),
    ("GET", "projects/{id}/environments", None),
    ("POST", "projects/{id}/environments", {"name": "x"}),
    ("GET", "environments/{id}/keys", None),
    ("POST", "environments/{id}/keys", {}),
    ("POST", "environments/{id}/keys/{id}/rotate", {}),
    ("DELETE", "environments/{id}/keys/{id}", None),
    ("GET", "flags", None),
    ("PUT", "flags", {"a": 1}),
    ("DELETE", "flags/a", None),
    ("GET", "organizations/{id}/flags", None),
    ("PUT", "organizations/{id}/flags", {"a": 1}),
    ("DELETE", "organizations/{id}/flags/a", None),
    ("GET", "buffer", None),
    ("GET", "buffer/entries?env={id}", None),
    ("GET", "dead-letters", None),
    ("GET", "dead-letters/{id}", None),
    ("POST", "dead-letters/{id}/replay", None),
    ("DELETE", "dead-letters/{id}", None),
    ("POST", "dead-letters/replay", {"runIds": ["x"]}),
    ("POST", "dead-letters/delete", {"runIds": ["x"]}),
]


async def made(api: Api, path: str, body: Any = None) -> dict[str, Any]:
    answer = await api.admin("POST", path, {} if body is None else body)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_only_the_administrator_may(api: Api, tenant: Tenant, subtests: pytest.Subtests) -> None:
    for method, path, body in ROUTES:
        with subtests.test(f"{method} {path}"):
            url = f"/admin/api/v1/{path.format(id=tenant.org_id)}"
            assert (await api.client.request(method, url, json=body)).status_code == 401
            other = await api.client.request(method, url, json=body, headers=bearer(tenant))
            assert (other.status_code, fields_of(other)) == (401, ["authorization"])
            assert other.headers["www-authenticate"].startswith("Bearer")
    assert len((await api.admin("GET", "organizations")).json()) == 1


async def test_a_token_may_hold_any_letters(start: Start) -> None:
    async with start(admin_token="schlüssel") as api:
        for token, status in (("schlüssel", 200), ("schlussel", 401)):
            headers = {b"Authorization": f"Bearer {token}".encode()}
            answer = await api.client.get("/admin/api/v1/organizations", headers=headers)
            assert answer.status_code == status


async def test_without_a_token_the_admin_api_is_closed_and_says_how_to_open_it(start: Start) -> None:
    async with start(admin_token=None) as api:
        for method, path, body in ROUTES:
            answer = await api.admin(method, path.format(id="x"), body)
            assert answer.status_code == 403
            assert "MOLLIFIER_ADMIN_TOKEN" in answer.json()["error"]


async def test_a_tenant_is_made_step_by_step_and_its_key_works_until_it_is_revoked(api: Api) -> None:
    org = await made(api, "organizations", {"name": "Acme"})
    project = await made(api, f"organizations/{org['id']}/projects", {"name": "Shop"})
    environment = await made(api, f"projects/{project['id']}/environments", {"name": "staging"})
    key = await made(api, f"environments/{environment['id']}/keys")
    assert (await api.admin("GET", f"organizations/{org['id']}")).json() == org
    assert (await api.admin("GET", f"organizations/{org['id']}/projects")).json() == [project]
    assert (await api.admin("GET", f"projects/{project['id']}/environments")).json() == [environment]
    (listed,) = (await api.admin("GET", f"environments/{environment['id']}/keys")).json()
    assert "key" not in listed
    assert key["key"].startswith(listed["prefix"])

    tenant = Tenant(org_id=org["id"], project_id=project["id"], env_id=environment["id"], api_key=key["key"])
    await api.triggered(tenant)
    revoked = await api.admin("DELETE", f"environments/{environment['id']}/keys/{key['id']}")
    assert (revoked.status_code, "revokedAt" in revoked.json()) == (200, True)
    assert (await api.trigger(tenant)).status_code == 401


async def test_a_rotated_key_and_its_successor_both_work_until_the_old_one_is_revoked(api: Api, tenant: Tenant) -> None:
    keys = f"environments/{tenant.env_id}/keys"
    (key,) = (await api.admin("GET", keys)).json()
    answer = await api.admin("POST", f"{keys}/{key['id']}/rotate", {"overlap": "2h30m"})
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    created, replaced = answer.json()["created"], answer.json()["replaced"]
    assert (replaced["id"], "key" in replaced) == (key["id"], False)
    listed = (await api.admin("GET", keys)).json()
    assert [("expiresAt" in one, "key" in one) for one in listed] == [(True, False), (False, False)]

    successor = msgspec.structs.replace(tenant, api_key=created["key"])
    for each in (tenant, successor):
        await api.triggered(each)
    await api.admin("DELETE", f"{keys}/{key['id']}")
    assert [(await api.trigger(each)).status_code for each in (tenant, successor)] == [401, 200]


async def test_a_key_is_rotated_once_and_only_for_an_overlap_that_can_be(api: Api, tenant: Tenant) -> None:
    keys = f"environments/{tenant.env_id}/keys"
    (key,) = (await api.admin("GET", keys)).json()
    for overlap in ("soon", "91d", 5, ""):
        answer = await api.admin("POST", f"{keys}/{key['id']}/rotate", {"overlap": overlap})
        assert (answer.status_code, fields_of(answer)) == (422, ["overlap"])
    assert (await api.admin("GET", keys)).json() == [key]
    assert (await api.admin("POST", f"{keys}/{key['id']}/rotate", {"overlap": "0s"})).status_code == 201
    assert (await api.trigger(tenant)).status_code == 401
    again = await api.admin("POST", f"{keys}/{key['id']}/rotate", {})
    assert (again.status_code, fields_of(again)) == (409, ["keyId"])
    assert len((await api.admin("GET", keys)).json()) == 2


async def test_an_environment_is_prod_where_nothing_is_said(api: Api, tenant: Tenant) -> None:
    project = await made(api, f"organizations/{tenant.org_id}/projects", {"name": "Shop"})
    assert (await made(api, f"projects/{project['id']}/environments"))["name"] == "prod"
    again = await api.admin("POST", f"projects/{project['id']}/environments", {})
    assert (again.status_code, fields_of(again)) == (409, ["name"])


async def test_what_does_not_exist_is_a_404(api: Api, subtests: pytest.Subtests) -> None:
    for method, path, body in ROUTES:
        for name in ("nobody", "%00", "a%2Fb", "x" * 300) if "{id}" in path and "?" not in path else ():
            with subtests.test(f"{method} {path}", name=name):
                assert (await api.admin(method, path.format(id=name), body)).status_code == 404


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": None}, {"name": 7}, {"name": "a\0"}, {"name": "x" * 500}])
async def test_a_name_has_to_be_one(api: Api, tenant: Tenant, body: Any) -> None:
    for path in ("organizations", f"organizations/{tenant.org_id}/projects"):
        answer = await api.admin("POST", path, body)
        assert (answer.status_code, fields_of(answer)) == (422, ["name"])
    assert len((await api.admin("GET", "organizations")).json()) == 1


# --- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["everybody", "organization"])
async def test_flags_are_set_and_taken_away_one_by_one(api: Api, tenant: Tenant, owner: str) -> None:
    path = "flags" if owner == "everybody" else f"organizations/{tenant.org_id}/flags"

    async def flags(answer: httpx.Response) -> Any:
        assert answer.status_code == 200, answer.text
        assert (await api.admin("GET", path)).json() == answer.json()
        return answer.json()

    assert await flags(await api.admin("PUT", path, {"mollifierEnabled": True})) == {"mollifierEnabled": True}
    assert await flags(await api.admin("PUT", path, {"a/b": [1, {"x": None}]})) == {
        "mollifierEnabled": True,
        "a/b": [1, {"x": None}],
    }
    assert await flags(await api.admin("DELETE", f"{path}/a%2Fb")) == {"mollifierEnabled": True}
    assert await flags(await api.admin("DELETE", f"{path}/nobody")) == {"mollifierEnabled": True}


@pytest.mark.parametrize("owner", ["everybody", "organization"])
async def test_flags_that_cannot_be_stored_are_refused(
    api: Api, tenant: Tenant, owner: str, subtests: pytest.Subtests
) -> None:
    path = "flags" if owner == "everybody" else f"organizations/{tenant.org_id}/flags"
    bad = [b"{", b"[]", b'{"": 1}', b'{"a": "\\u0000"}', b'{"a\\u0000": 1}', b'{"a": 1e309}', b'{"a": "\\ud800"}']
    for body in bad:
        with subtests.test(str(body)):
            headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", "content-type": "application/json"}
            answer = await api.client.put(f"/admin/api/v1/{path}", content=body, headers=headers)
            assert answer.status_code in (400, 422)
    assert (await api.admin("GET", path)).json() == {}


# --- the buffer ----------------------------------------------------------------------------------------------------


async def test_what_the_buffer_holds_is_counted_and_listed(start: Start, tenant: Tenant, redis_url: str) -> None:
    strict: dict[str, Any] = {"trip_threshold": 1, "trip_window_ms": 3_600_000, "hold_ms": 3_600_000}
    async with start(redis_url=redis_url, enabled=True, **strict) as api:
        await api.admin("PUT", f"organizations/{tenant.org_id}/flags", {"mollifierEnabled": True})
        run_ids = [await api.triggered(tenant, n) for n in range(4)][1:]
        counts = (await api.admin("GET", "buffer")).json()
        caps = counts.pop("caps")
        assert {cap["setting"]: cap["held"] for cap in caps} == {variable(cap): 0 for cap in CAPS}
        assert {**counts, "oldestMs": 0} == {
            "queued": 3,
            "waiting": 0,
            "draining": 0,
            "failed": 0,
            "organizations": [tenant.org_id],
            "oldestMs": 0,
            "heldEntries": 0,
            "heldBytes": 0,
            "sweep": None,
        }
        path = f"buffer/entries?env={tenant.env_id}"
        listed = (await api.admin("GET", path)).json()["data"]
        assert [entry["runId"] for entry in listed] == run_ids
        assert (listed[0]["state"], listed[0]["attempts"], listed[0]["orgId"]) == ("QUEUED", 0, tenant.org_id)
        page = (await api.admin("GET", f"{path}&limit=1&offset=1")).json()["data"]
        assert [entry["runId"] for entry in page] == run_ids[1:2]


async def test_what_the_last_sweep_found_is_shown_whoever_swept(
    start: Start, redis_client: Redis, redis_url: str
) -> None:
    buffer = Buffer(Server(redis_client), lambda: Settings(redis_url=redis_url))
    report = SweepReport(
        at_ms=1_900_000_000_000,
        stale=2,
        oldest_ms=45_000,
        entries=3,
        held_bytes=99,
        dead_letters=1,
        orphans={"queue": 1},
        mismatches={"missing": 2},
        repaired={"missing": 2, "buried": 1},
    )
    assert await buffer.claim_sweep("token", 10_000)
    assert await buffer.record_sweep("token", report)
    async with start(redis_url=redis_url) as api:
        assert (await api.admin("GET", "buffer")).json()["sweep"] == {
            "at": "2030-03-17T17:46:40Z",
            "stale": 2,
            "oldestMs": 45_000,
            "entries": 3,
            "heldBytes": 99,
            "deadLetters": 1,
            "orphans": {"queue": 1},
            "mismatches": {"missing": 2},
            "repaired": {"missing": 2, "buried": 1},
        }


async def test_entries_are_listed_of_one_environment_that_exists(start: Start, tenant: Tenant, redis_url: str) -> None:
    async with start(redis_url=redis_url, enabled=True) as api:
        assert (await api.admin("GET", "buffer/entries?env=nobody")).status_code == 404
        for query, field in (
            ("", "env"),
            ("?env=", "env"),
            ("?env=a%00", "env"),
            (f"?env={tenant.env_id}&limit=0", "limit"),
            (f"?env={tenant.env_id}&limit=x", "limit"),
            (f"?env={tenant.env_id}&offset=-1", "offset"),
        ):
            answer = await api.admin("GET", f"buffer/entries{query}")
            assert (answer.status_code, fields_of(answer)) == (422, [field])


async def test_without_a_buffer_there_is_none_to_look_into(api: Api, tenant: Tenant) -> None:
    for path in ("buffer", f"buffer/entries?env={tenant.env_id}"):
        answer = await api.admin("GET", path)
        assert answer.status_code == 404
        assert "MOLLIFIER_REDIS_URL" in answer.json()["error"]
