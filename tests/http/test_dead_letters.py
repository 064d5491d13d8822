"""Dead letters in the admin API: every way to die is listed with its reason and payload, and ends replayed to a run, or deleted."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.engine import CreateOutcome, Creation
from mollifier.facade import Mollifier
from mollifier.model import Entry, Tenant
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.server import Server
from mollifier.settings import GIVE_UPS_MAX, Settings
from tests.core.support import execute, expire_lease, until
from tests.http.conftest import Api, Start, count_runs, fields_of

PAYLOAD = {"of": "a trigger", "snowman": "\N{SNOWMAN}"}

pytestmark = pytest.mark.leaves_keys


class RefusingEngine(PostgresRunEngine):
    """Creates nothing, not even a failure."""

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        raise RuntimeError("no room today")


class House:
    """An API in divert mode whose tenant bursts: whatever it triggers is held."""

    def __init__(self, api: Api, tenant: Tenant, database: Database, redis: Redis, settings: Settings) -> None:
        self.api = api
        self.tenant = tenant
        self.database = database
        self.redis = redis
        self.settings = settings
        self.buffer = Buffer(Server(redis), lambda: settings)

    async def drain(self, engine: type[PostgresRunEngine] = PostgresRunEngine) -> None:
        """Drain until nothing is due, into an engine of this kind."""
        mollifier = Mollifier(
            self.settings, engine=engine(self.database), tasks=PostgresTaskCatalog(self.database), redis=self.redis
        )
        drainer = mollifier.drainer()
        drainer.start()

        async def is_drained() -> bool:
            # One look may miss an entry that goes back from waiting to its queue meanwhile.
            looks = [await self.buffer.counts() for _ in range(3)]
            return all(counts.left == counts.failed for counts in looks)

        try:
            await until(is_drained)
        finally:
            await drainer.stop()

    async def pop(self) -> Entry:
        entry = await self.buffer.pop(self.tenant.org_id, self.tenant.env_id)
        assert entry is not None
        return entry

    async def entry(self, *change: str | bytes, run_id: str) -> None:
        """Change the entry's hash by hand."""
        command, *rest = change
        await execute(self.redis, command, self.buffer.keyspace.of(self.tenant.org_id).entry(run_id), *rest)

    async def letters(self, **query: str) -> list[dict[str, Any]]:
        answer = await self.api.admin("GET", f"dead-letters?{'&'.join(f'{k}={v}' for k, v in query.items())}")
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    async def status(self, run_id: str) -> str:
        """The run's status as its owner reads it, or the HTTP status where there is none."""
        answer = await self.api.get(self.tenant, f"/api/v3/runs/{run_id}")
        return answer.json()["status"] if isinstance(answer.json().get("status"), str) else str(answer.status_code)


@pytest.fixture
async def house(
    *, start: Start, tenant: Tenant, database: Database, database_url: str, redis_client: Redis, redis_url: str
) -> AsyncIterator[House]:
    settings: dict[str, Any] = {
        "enabled": True,
        "divert": True,
        "redis_url": redis_url,
        "trip_threshold": 1,
        "trip_window_ms": 3_600_000,
        "hold_ms": 3_600_000,
        "gate_deadline_ms": 30_000,
        "accept_deadline_ms": 30_000,
        "drain_max_attempts": 1,
        "drain_max_reclaims": 0,
    }
    async with start(**settings) as api:
        await api.admin("PUT", f"organizations/{tenant.org_id}/flags", {"mollifierEnabled": True})
        await api.triggered(tenant)
        yield House(api, tenant, database, redis_client, Settings(database_url=database_url, **settings))


# --- ways to die ---------------------------------------------------------------------------------------------------


async def exhaust(house: House, run_id: str) -> None:
    await house.drain(RefusingEngine)


async def garble_the_payload(house: House, run_id: str) -> None:
    await house.entry("HSET", "payload", b"\xff no snapshot", run_id=run_id)
    await house.drain()


async def garble_the_fields(house: House, run_id: str) -> None:
    await house.entry("HSET", "seq", b"first", "org", b"\xff", run_id=run_id)
    await house.drain()


async def evict(house: House, run_id: str) -> None:
    await house.entry("DEL", run_id=run_id)
    await house.drain()


async def kill_its_drainers(house: House, run_id: str) -> None:
    keys = house.buffer.keyspace.of(house.tenant.org_id)
    for _ in range(GIVE_UPS_MAX):
        await house.pop()
        await expire_lease(house.redis, keys, run_id)
        assert (await house.buffer.reclaim_expired()).returned == (run_id,)
    await house.pop()
    await expire_lease(house.redis, keys, run_id)
    assert (await house.buffer.reclaim_expired()).failed == (run_id,)


DEATHS: Mapping[str, Any] = {
    "attempts exhausted, and not even the failure could be written": (
        exhaust,
        "failed",
        "no room today",
        "SYSTEM_FAILURE",
    ),
    "undecodable payload": (garble_the_payload, "failed", "not a snapshot", "404"),
    "malformed fields": (garble_the_fields, "malformed", "fields 'org' and 'env'", "404"),
    "evicted": (evict, "evicted", "payload is lost", "404"),
    "reclaim limit": (kill_its_drainers, "reclaim_limit", "its lease ran out", "SYSTEM_FAILURE"),
}


@pytest.mark.parametrize("death", DEATHS)
async def test_whatever_it_died_of_a_letter_is_listed_with_the_reason_shown_with_its_payload_and_deleted(
    house: House, death: str
) -> None:
    die, reason, said, status = DEATHS[death]
    run_id = await house.api.triggered(house.tenant, PAYLOAD)
    await die(house, run_id)

    (listed,) = await house.letters()
    shown = (await house.api.admin("GET", f"dead-letters/{run_id}")).json()
    assert {key: shown[key] for key in listed} == listed
    assert (listed["runId"], listed["orgId"], listed["envId"]) == (run_id, house.tenant.org_id, house.tenant.env_id)
    assert listed["reason"] == reason
    assert said in listed["error"]
    assert datetime.fromisoformat(listed["diedAt"])
    assert "payload" not in listed
    match death:
        case "evicted":
            assert shown.keys() & {"payload", "payloadBase64", "payloadBytes"} == set()
        case "undecodable payload":
            assert base64.b64decode(shown["payloadBase64"]) == b"\xff no snapshot"
        case _:
            assert (json.loads(shown["payload"]), shown["payloadType"]) == (PAYLOAD, "application/json")
            assert listed["taskId"] == "echo"
    assert await house.status(run_id) == status
    assert (await house.api.admin("GET", "buffer")).json()["failed"] == 1

    deleted = await house.api.admin("DELETE", f"dead-letters/{run_id}")
    assert (deleted.status_code, deleted.json()) == (200, listed)
    assert await house.letters() == []
    assert await house.status(run_id) == "404"
    assert (await house.api.admin("GET", "buffer")).json()["failed"] == 0
    for method, path in (("DELETE", ""), ("GET", ""), ("POST", "/replay")):
        answer = await house.api.admin(method, f"dead-letters/{run_id}{path}")
        assert (answer.status_code, fields_of(answer)) == (404, ["runId"])


@pytest.mark.parametrize("death", [name for name in DEATHS if DEATHS[name][3] == "SYSTEM_FAILURE"])
async def test_a_replayed_letter_reads_as_queued_and_becomes_its_run(house: House, death: str) -> None:
    run_id = await house.api.triggered(house.tenant, PAYLOAD)
    await DEATHS[death][0](house, run_id)
    assert await house.status(run_id) == "SYSTEM_FAILURE"

    replayed = await house.api.admin("POST", f"dead-letters/{run_id}/replay")

    assert (replayed.status_code, replayed.json()["runId"]) == (200, run_id)
    assert await house.letters() == []
    assert await house.status(run_id) == "QUEUED"
    before = await count_runs(house.database)
    await house.drain()
    assert await count_runs(house.database) == before + 1
    run = await house.api.run(house.tenant, run_id)
    assert (run["status"], run["payload"]) == ("QUEUED", PAYLOAD)


async def test_a_malformed_entry_is_refused_with_what_is_wrong_until_it_was_mended(house: House) -> None:
    run_id = await house.api.triggered(house.tenant, PAYLOAD)
    entry = await house.buffer.get_entry(house.tenant.org_id, run_id)
    assert entry is not None
    await garble_the_fields(house, run_id)
    for change, said in (
        (("org", house.tenant.org_id), "field 'seq' is not a number"),
        (("seq", str(entry.sequence)), None),
    ):
        refused = await house.api.admin("POST", f"dead-letters/{run_id}/replay")
        assert (refused.status_code, fields_of(refused)) == (409, ["runId"])
        await house.entry("HSET", *change, run_id=run_id)
        assert (said or "reads as one again") in (await house.letters())[0]["error"]
    assert (await house.api.admin("POST", f"dead-letters/{run_id}/replay")).status_code == 200
    await house.drain()
    assert (await house.api.run(house.tenant, run_id))["payload"] == PAYLOAD


async def test_what_is_gone_and_what_never_reads_is_refused_with_the_reason(house: House) -> None:
    run_id = await house.api.triggered(house.tenant, PAYLOAD)
    await evict(house, run_id)
    refused = await house.api.admin("POST", f"dead-letters/{run_id}/replay")
    assert (refused.status_code, fields_of(refused)) == (409, ["runId"])
    assert "payload is lost" in refused.json()["error"]
    assert len(await house.letters()) == 1


async def test_many_are_replayed_and_deleted_by_name_each_by_itself(house: House) -> None:
    run_ids = [await house.api.triggered(house.tenant, n) for n in range(4)]
    await house.drain(RefusingEngine)
    await house.entry("DEL", run_id=run_ids[0])

    answer = await house.api.admin("POST", "dead-letters/replay", {"runIds": [*run_ids[:3], "nobody"]})
    assert answer.json()["replayed"] == run_ids[1:3]
    refused = {each["runId"]: each["error"] for each in answer.json()["refused"]}
    assert refused.keys() == {run_ids[0], "nobody"}
    assert "no dead letter" in refused["nobody"]

    answer = await house.api.admin("POST", "dead-letters/delete", {"runIds": [run_ids[3], run_ids[1]]})
    assert (answer.json()["deleted"], [each["runId"] for each in answer.json()["refused"]]) == (
        [run_ids[3]],
        [run_ids[1]],
    )
    assert [letter["runId"] for letter in await house.letters()] == [run_ids[0]]
    await house.drain()
    assert [await house.status(run_id) for run_id in run_ids] == ["404", "QUEUED", "QUEUED", "404"]


async def test_letters_are_listed_page_by_page_and_of_one_owner(house: House, neighbour: Tenant) -> None:
    run_ids = [await house.api.triggered(house.tenant, n) for n in range(3)]
    await house.drain(RefusingEngine)
    mine = {"org": house.tenant.org_id, "env": house.tenant.env_id}
    others = {"org": neighbour.org_id, "env": neighbour.env_id}
    for query in ({}, mine, {"org": mine["org"]}, {"env": mine["env"]}):
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            path = f"dead-letters?limit=2&{'&'.join(f'{k}={v}' for k, v in (query | cursor).items())}"
            page = (await house.api.admin("GET", path)).json()
            seen += [letter["runId"] for letter in page["data"]]
            if "next" not in page["pagination"]:
                break
            cursor = {"after": page["pagination"]["next"]}
        assert sorted(seen) == sorted(run_ids)
    for query in (others, {"org": others["org"]}, {"env": others["env"]}, {**mine, "env": others["env"]}):
        assert await house.letters(**query) == []


async def test_a_query_that_cannot_be_is_a_422(house: House, subtests: pytest.Subtests) -> None:
    for query, field in (
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("after=x", "after"),
        ("after=" + "x" * 2000, "after"),
        ("org=a%00", "org"),
        ("env=" + "x" * 300, "env"),
    ):
        with subtests.test(query[:20]):
            answer = await house.api.admin("GET", f"dead-letters?{query}")
            assert (answer.status_code, fields_of(answer)) == (422, [field])


async def test_a_body_that_names_no_runs_changes_nothing(house: House, subtests: pytest.Subtests) -> None:
    await house.api.triggered(house.tenant)
    await house.drain(RefusingEngine)
    bodies: list[tuple[Any, str]] = [
        ({}, "runIds"),
        ({"runIds": []}, "runIds"),
        ({"runIds": None}, "runIds"),
        ({"runIds": 5}, "runIds"),
        ({"runIds": [""]}, "runIds[0]"),
        ({"runIds": ["a", 7]}, "runIds[1]"),
        ({"runIds": [f"run-{n}" for n in range(1001)]}, "runIds"),
        ({"all": True}, "runIds"),
        ([], "body"),
    ]
    for body, field in bodies:
        for verb in ("replay", "delete"):
            with subtests.test(verb, body=str(body)[:30]):
                answer = await house.api.admin("POST", f"dead-letters/{verb}", body)
                assert (answer.status_code, fields_of(answer)) == (422, [field])
    assert len(await house.letters()) == 1


async def test_a_moment_beyond_any_calendar_is_left_out(house: House) -> None:
    run_id = await house.api.triggered(house.tenant)
    await house.entry("HSET", "accepted_ms", b"9" * 15, run_id=run_id)
    entries = (await house.api.admin("GET", f"buffer/entries?env={house.tenant.env_id}")).json()["data"]
    assert [(entry["runId"], "acceptedAt" in entry) for entry in entries] == [(run_id, False)]
    await house.drain(RefusingEngine)
    assert "acceptedAt" not in (await house.letters())[0]


async def test_without_a_buffer_there_are_no_dead_letters_to_ask_for(api: Api) -> None:
    for method, path, body in (
        ("GET", "dead-letters", None),
        ("GET", "dead-letters/x", None),
        ("POST", "dead-letters/x/replay", None),
        ("DELETE", "dead-letters/x", None),
        ("POST", "dead-letters/replay", {"runIds": ["x"]}),
        ("POST", "dead-letters/delete", {"runIds": ["x"]}),
    ):
        answer = await api.admin(method, path, body)
        assert answer.status_code == 404
        assert "MOLLIFIER_REDIS_URL" in answer.json()["error"]
