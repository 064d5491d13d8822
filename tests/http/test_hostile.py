"""Hostile payloads, directly created and held alike: each comes back byte for byte, or gets a clear 4xx and changes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec
import pytest
from redis.asyncio import Redis

from mollifier.facade import Mollifier
from mollifier.fields import DEPTH_MAX
from mollifier.keys import Keyspace
from mollifier.model import Tenant
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.server import connect
from mollifier.settings import Settings
from tests.core.support import until
from tests.http.conftest import ADMIN_TOKEN, Api, Start, fields_of, raw_member
from tests.http.stores import dump

pytestmark = pytest.mark.leaves_keys

PARTITIONS = 4
MIB = 1024 * 1024
BODY_LIMIT_BYTES = Settings().body_limit_bytes
ENVELOPE = len(b'{"payload":}')


class Kept(NamedTuple):
    """A payload that is taken; its run shows `shown`, or the payload's own bytes."""

    name: str
    payload: bytes
    shown: bytes | None = None
    options: bytes = b"{}"


class Refused(NamedTuple):
    """A body that is not taken, and the status and the field that say why."""

    name: str
    body: bytes
    status: int
    field: str


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def largest() -> bytes:
    """A payload with which the body is as large as a body may be."""
    return b'"%s"' % (b"x" * (BODY_LIMIT_BYTES - ENVELOPE - 2))


KEPT = [
    Kept("an escaped NUL", rb'"a\u0000b"'),
    Kept("an escaped NUL in a name", rb'{"\u0000":"\u0000"}'),
    Kept("a whole surrogate pair, escaped", rb'"\ud83d\ude00"'),
    Kept("the largest double", b"1.7976931348623157e308"),
    Kept("1e308", b"1e308"),
    Kept("more than any double", b"[1e309,-1e309]"),
    Kept("2^53 + 1", b"9007199254740993"),
    Kept("2^63 + 1", b"9223372036854775809"),
    Kept("an integer of 400 digits", b"7" * 400),
    Kept("negative zero", b"-0.0"),
    Kept("a number with more digits than a double", b"0.1000000000000000055511151231257827021181583404541015625"),
    Kept("as deep as it may be", nested(DEPTH_MAX - 1)),
    Kept("one name twice", b'{"a":1,"a":2}'),
    Kept("names that look like others'", b'{"__proto__":{},"constructor":[],"payload":null,"options":{}}'),
    Kept("an empty object", b"{}"),
    Kept("an empty array", b"[]"),
    Kept("empty things in one another", b'{"a":[],"b":{},"":[[],{}]}'),
    Kept("an empty string", b'""'),
    Kept("null", b"null"),
    Kept("spaces within", b'{ "a" :\t[ 1 ,\r\n2 ] }'),
    Kept("a BOM as a character", b'"\xef\xbb\xbf"'),
    Kept("noncharacters", '"\ufffe\uffff\U0010ffff"'.encode()),
    Kept("characters that turn the text around", '"\u202e\u2066\u200f"'.encode()),
    Kept("what looks like a script", b'"*3\\r\\n$3\\r\\nSET\\r\\n\'; DROP TABLE runs; --"'),
    Kept("as large as a body may be", largest()),
    Kept("text with NUL", rb'"\u0000 text"', options=b'{"payloadType":"text/plain"}'),
    Kept("JSON as text", rb'"{\"a\": 1e309}"', rb'{"a": 1e309}', b'{"payloadType":"application/json"}'),
]

REFUSED = [
    Refused("nothing at all", b"", 400, "body"),
    Refused("spaces only", b" \n", 400, "body"),
    Refused("a raw NUL in a string", b'{"payload":"\0"}', 400, "body"),
    Refused("a raw NUL between", b'{"payload":1\0}', 400, "body"),
    Refused("half of a surrogate pair as bytes", b'{"payload":"\xed\xa0\x80"}', 400, "body"),
    Refused("half of a surrogate pair, escaped", rb'{"payload":["\ud800"]}', 400, "body"),
    Refused(
        "half of a pair in a super+json",
        rb'{"payload":"{\"json\":\"\\ud800\"}","options":{"payloadType":"application/super+json"}}',
        422,
        "payload",
    ),
    Refused("bytes that are no UTF-8", b'{"payload":"\xff\xfe"}', 400, "body"),
    Refused("an overlong encoding", b'{"payload":"\xc0\x80"}', 400, "body"),
    Refused("a BOM before the body", b'\xef\xbb\xbf{"payload":1}', 400, "body"),
    Refused("UTF-16", '{"payload":1}'.encode("utf-16"), 400, "body"),
    Refused("NaN", b'{"payload":NaN}', 400, "body"),
    Refused("Infinity", b'{"payload":-Infinity}', 400, "body"),
    Refused("a number with a leading zero", b'{"payload":01}', 400, "body"),
    Refused("a comment", b'{"payload":1/**/}', 400, "body"),
    Refused("one comma too many", b'{"payload":[1,]}', 400, "body"),
    Refused("single quotes", b"{'payload':1}", 400, "body"),
    Refused("cut off", b'{"payload":{"a":[1,2', 400, "body"),
    Refused("two bodies", b'{"payload":1}{"payload":2}', 400, "body"),
    Refused("an array", b"[]", 422, "body"),
    Refused("a string", b'"payload"', 422, "body"),
    Refused("one level too deep", b'{"payload":%s}' % nested(DEPTH_MAX), 400, "body"),
    Refused("10,000 levels deep", b'{"payload":%s}' % nested(10_000), 400, "body"),
    Refused("10,000 levels that never close", b'{"payload":' + b"[" * 10_000, 400, "body"),
    Refused("metadata 10,000 levels deep", b'{"options":{"metadata":%s}}' % nested(10_000), 400, "body"),
    Refused("one byte too large", b'{"payload":%s }' % largest(), 413, "body"),
    Refused("NUL in a tag", rb'{"options":{"tags":["a\u0000"]}}', 422, "options.tags[0]"),
    Refused("NUL in a key", rb'{"options":{"idempotencyKey":"\u0000"}}', 422, "options.idempotencyKey"),
    Refused("half of a pair in a key", rb'{"options":{"idempotencyKey":"\ud800"}}', 422, "options.idempotencyKey"),
    Refused("half of a pair in a tag", rb'{"options":{"tags":"\udfff"}}', 422, "options.tags"),
    Refused("a priority of 2^63 + 1", b'{"options":{"priority":9223372036854775809}}', 422, "options.priority"),
    Refused("maxAttempts of 1e308", b'{"options":{"maxAttempts":1e308}}', 422, "options.maxAttempts"),
    Refused("maxDuration of -0.0", b'{"options":{"maxDuration":-0.0}}', 422, "options.maxDuration"),
    Refused(
        "a payload of its type that is none",
        b'{"payload":{},"options":{"payloadType":"application/json"}}',
        422,
        "payload",
    ),
]


class Path:
    """One of the two ways that a trigger can take, and what brings its run into the database."""

    def __init__(self, api: Api, tenant: Tenant, mollifier: Mollifier | None) -> None:
        self.api = api
        self.tenant = tenant
        self._mollifier = mollifier

    async def settle(self) -> None:
        """Have every held run created."""
        if self._mollifier is None or self._mollifier.buffer is None:
            return
        buffer = self._mollifier.buffer
        assert (await buffer.counts()).left > 0, "nothing has been held"
        drainer = self._mollifier.drainer()
        drainer.start()

        async def is_empty() -> bool:
            return (await buffer.counts()).left == 0

        await until(is_empty)
        await drainer.stop()


@pytest.fixture
def diverting(database_url: str, redis_url: str) -> Settings:
    return Settings(
        enabled=True,
        divert=True,
        redis_url=redis_url,
        database_url=database_url,
        admin_token=ADMIN_TOKEN,
        partitions=PARTITIONS,
        # What is held must not depend on how busy the machine is that runs the tests.
        gate_deadline_ms=10_000,
        accept_deadline_ms=10_000,
    )


@pytest.fixture(params=["created directly", "held"])
async def path(
    request: pytest.FixtureRequest, start: Start, tenant: Tenant, database: Database, diverting: Settings
) -> AsyncIterator[Path]:
    if request.param == "created directly":
        async with start() as api:
            yield Path(api, tenant, None)
        return
    mollifier = Mollifier(diverting, engine=PostgresRunEngine(database), tasks=PostgresTaskCatalog(database))
    redis = connect(diverting.redis_url or "")
    async with start(**msgspec.structs.asdict(diverting)) as api:
        await api.admin("PUT", f"organizations/{tenant.org_id}/flags", {"mollifierEnabled": True})
        await redis.set(Keyspace(PARTITIONS).of(tenant.org_id).tripped(tenant.env_id), "1", px=600_000)
        yield Path(api, tenant, mollifier)
    await redis.aclose()
    await mollifier.aclose()


async def test_a_hostile_payload_comes_back_byte_for_byte(path: Path, subtests: pytest.Subtests) -> None:
    run_ids: dict[str, str] = {}
    for case in KEPT:
        with subtests.test("taken", case=case.name):
            options = b',"options":' + case.options if case.options != b"{}" else b""
            answer = await path.api.trigger(path.tenant, b'{"payload":%s%s}' % (case.payload, options))
            assert answer.status_code == 200, answer.text[:500]
            run_ids[case.name] = answer.json()["id"]
            await shows(path, case, run_ids[case.name])
    await path.settle()
    for case in KEPT:
        with subtests.test("settled", case=case.name):
            await shows(path, case, run_ids[case.name])


async def shows(path: Path, case: Kept, run_id: str) -> None:
    run = await path.api.get(path.tenant, f"/api/v3/runs/{run_id}")
    assert run.status_code == 200, run.text[:500]
    assert raw_member(run, "payload") == (case.payload if case.shown is None else case.shown)


async def test_a_hostile_body_gets_a_4xx_that_names_the_field_and_changes_nothing(
    path: Path, database: Database, redis_client: Redis, subtests: pytest.Subtests
) -> None:
    before = await dump(database, redis_client)
    for case in REFUSED:
        with subtests.test(case.name):
            answer = await path.api.trigger(path.tenant, case.body)
            assert (answer.status_code, fields_of(answer)) == (case.status, [case.field])
            assert len(answer.json()["error"]) > len("no")
    assert await dump(database, redis_client) == before
