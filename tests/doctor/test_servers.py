"""The doctor at real servers: each set up badly in one way, and what it says of that."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.doctor import diagnose
from mollifier.doctor.findings import Finding
from mollifier.embedded import EmbeddedStack, fresh_database
from mollifier.model import EntryKind
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import migrate_async
from mollifier.server import Server, connect
from mollifier.settings import Settings
from mollifier.sweeps import SweepReport
from tests.conftest import skipping_without_wheels
from tests.core.support import execute, hold, state_of, take, until
from tests.postgres.support import execute as execute_sql
from tests.servers import valkey

Findings = dict[str, Finding]
WELL = ("--appendonly", "yes", "--maxmemory", "8gb", "--maxmemory-policy", "noeviction")


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[Redis]:
    redis = connect(url)
    try:
        yield redis
    finally:
        await redis.aclose()


async def examined(url: str | None = None, database: Database | None = None, **settings: object) -> Findings:
    """What the doctor finds at these servers in divert mode, by check."""
    given = Settings(**{"enabled": True, "divert": True, "redis_url": url, **settings})  # pyright: ignore[reportArgumentType] - as above
    if url is None:
        return {each.check: each for each in await diagnose(given, server=None, database=database)}
    async with connected(url) as redis:
        return {each.check: each for each in await diagnose(given, server=Server(redis), database=database)}


def of_buffer(findings: Findings) -> dict[str, str]:
    """What is not in order about the buffer's server."""
    return {
        name: each.severity.value
        for name, each in findings.items()
        if name.startswith("buffer.") and each.severity != "ok"
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {}),
        (("--appendonly", "no"), {"buffer.persistence": "critical"}),
        (("--appendonly", "no", "--save", "900 1"), {"buffer.persistence": "warning"}),
        (("--appendfsync", "no"), {"buffer.persistence": "warning"}),
        (("--appendfsync", "always"), {}),
        (("--maxmemory-policy", "allkeys-lru"), {"buffer.eviction": "critical"}),
        (("--maxmemory", "0"), {"buffer.memory": "info"}),
        (("--maxmemory", "1200kb"), {"buffer.memory": "critical", "buffer.caps": "warning"}),
        (("--maxmemory", "2gb"), {"buffer.caps": "warning"}),
        (("--maxclients", "16"), {"buffer.connections": "warning"}),
        (("--rename-command", "CONFIG", ""), {"buffer.persistence": "unknown"}),
        (("--rename-command", "EVAL", ""), {"buffer.access": "critical"}),
        (("--rename-command", "RANDOMKEY", ""), {"buffer.tenancy": "unknown"}),
        (("--replicaof", "127.0.0.1", "1"), {"buffer.role": "critical"}),
        (
            ("--cluster-enabled", "yes"),
            {
                "buffer.role": "warning",
                "buffer.access": "critical",
                "buffer.layout": "unknown",
                "buffer.caps": "unknown",
            },
        ),
    ],
    ids=str,
)
async def test_a_server_set_up_badly_is_found_out(options: tuple[str, ...], expected: dict[str, str]) -> None:
    with valkey(*WELL, *options) as server:
        assert of_buffer(await examined(server.url)) == expected


async def test_a_managed_server_that_refuses_every_question_about_itself_fails_nothing() -> None:
    refusing = ("-config", "-info", "-dbsize", "-randomkey", "-pubsub", "-get", "-zcard")
    with valkey(*WELL, "--user", "default", "on", "nopass", "~*", "&*", "+@all", *refusing) as server:
        found = of_buffer(await examined(server.url))
    assert set(found.values()) == {"unknown"}
    assert {
        "buffer.persistence",
        "buffer.eviction",
        "buffer.memory",
        "buffer.replicas",
        "buffer.tenancy",
    } <= found.keys()


async def test_a_user_who_may_not_use_the_buffers_keys_is_found_out() -> None:
    with valkey(*WELL, "--user", "default", "on", "nopass", "~cache:*", "&*", "+@all") as server:
        assert of_buffer(await examined(server.url))["buffer.access"] == "critical"


@pytest.mark.parametrize(("confirm", "command"), [("aof", "waitaof"), ("replicas:1", "wait")])
async def test_a_user_who_may_not_have_accepts_confirmed_is_found_out_where_they_are_to_be(
    confirm: str, command: str
) -> None:
    with valkey(*WELL, "--user", "default", "on", "nopass", "~*", "&*", "+@all", f"-{command}") as server:
        access = (await examined(server.url, accept_confirm=confirm))["buffer.access"]
        assert access.severity == "critical"
        assert f"'{command}'" in access.what
        assert (await examined(server.url))["buffer.access"].severity == "ok"


async def test_a_server_one_has_to_log_in_to_is_critical_with_the_servers_own_words() -> None:
    with valkey(*WELL, "--requirepass", "secret") as server:
        found = (await examined(server.url))["buffer.reachable"]
        assert found.severity == "critical"
        assert "authenticated" in found.what
        assert of_buffer(await examined(server.url.replace("unix://", "unix://:secret@"))) == {}


async def test_a_server_that_is_not_there_is_critical(tmp_path: Path) -> None:
    assert of_buffer(await examined(f"unix://{tmp_path}/nobody")) == {"buffer.reachable": "critical"}


async def test_a_server_that_hangs_is_critical_once_the_deadline_has_passed() -> None:
    with valkey() as server:
        server.process.send_signal(signal.SIGSTOP)
        async with connected(server.url) as redis:
            findings = await diagnose(
                Settings(redis_url=server.url), server=Server(redis), database=None, deadline_s=0.2
            )
    found = {each.check: each for each in findings}["buffer.reachable"]
    assert (found.severity, found.what) == ("critical", "cannot be asked: no answer within 0.2 s")


async def test_a_replica_that_follows_is_seen() -> None:
    with (
        valkey(*WELL, "--repl-diskless-sync-delay", "0", tcp=True) as primary,
        valkey("--replicaof", "127.0.0.1", str(primary.port), tcp=True),
    ):

        async def follows() -> bool:
            found = (await examined(primary.url))["buffer.replicas"]
            return found.what == "replicas: 1, none behind"

        await until(follows)


async def test_another_number_of_partitions_is_found_and_what_is_held_counted_by_the_buffers_own(
    redis_client: Redis, redis_url: str
) -> None:
    made = Settings(enabled=True, redis_url=redis_url, partitions=16)
    buffer = Buffer(Server(redis_client), lambda: made)
    await buffer.claim_layout()
    await hold(buffer, "run_a", "run_b", org="org_in_a_far_partition")

    found = await examined(redis_url, partitions=64)

    assert found["buffer.layout"].severity == "critical"
    assert found["buffer.layout"].fix == "set MOLLIFIER_PARTITIONS=16"
    assert found["system.leftovers"].what.startswith("2 queued")


@pytest.mark.leaves_keys
async def test_keys_of_another_application_are_found_without_enumerating_and_none_is_named_in_full(
    redis_client: Redis, redis_url: str
) -> None:
    buffer = Buffer(Server(redis_client), lambda: Settings(redis_url=redis_url))
    await buffer.claim_layout()
    await hold(buffer, "run_a")
    assert (await examined(redis_url))["buffer.tenancy"].severity == "ok"
    for number in range(10):
        await redis_client.set(f"session:secret{number}", "x")
    before = await execute(redis_client, "INFO", "commandstats")

    found = (await examined(redis_url))["buffer.tenancy"]

    assert found.severity == "warning"
    assert "(session:...)" in found.what
    assert "secret" not in found.what
    after = await execute(redis_client, "INFO", "commandstats")
    assert not {"cmdstat_keys", "cmdstat_scan"} & (after.keys() - before.keys())


@pytest.mark.leaves_keys
async def test_keys_in_another_database_of_the_server_are_found(redis_client: Redis, redis_url: str) -> None:
    async with connected(redis_url.replace("db=0", "db=3")) as other:
        await other.set("anything", "x")
        assert "db3" in (await examined(redis_url))["buffer.tenancy"].what


async def test_looking_changes_nothing(redis_client: Redis, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url)
    buffer = Buffer(Server(redis_client), lambda: settings)
    await buffer.claim_layout()
    await hold(buffer, "run_a")
    before = await state_of(redis_client)
    await examined(redis_url)
    assert await state_of(redis_client) == before


async def test_a_drainer_that_listens_is_seen(redis_client: Redis, redis_url: str) -> None:
    async def drainers() -> str:
        return (await examined(redis_url, database_url="postgresql:///unused"))["system.drainers"].severity.value

    assert await drainers() == "critical"
    listening = asyncio.create_task(Server(redis_client).listen("mollifier:wake", lambda: None))
    try:

        async def seen() -> bool:
            return await drainers() != "critical"

        await until(seen)
    finally:
        listening.cancel()
        await asyncio.wait((listening,))


async def test_held_entries_that_nobody_drains_are_found(redis_client: Redis, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url)
    buffer = Buffer(Server(redis_client), lambda: settings)
    await buffer.claim_layout()
    await hold(buffer, "run_a", kind=EntryKind.HELD)
    found = (await examined(redis_url, enabled=False))["system.leftovers"]
    assert found.severity == "warning"
    assert "MOLLIFIER_DRAINER_ENABLED=1" in found.fix
    await execute(redis_client, "FLUSHALL")


async def test_dead_letters_are_found(redis_client: Redis, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url)
    buffer = Buffer(Server(redis_client), lambda: settings)
    await buffer.claim_layout()
    await hold(buffer, "run_a", kind=EntryKind.HELD)
    assert await buffer.fail(await take(buffer), "error") == "held"
    found = (await examined(redis_url))["system.dead_letters"]
    assert (found.severity, found.what) == ("warning", "1 dead letter")
    await execute(redis_client, "FLUSHALL")


async def test_what_the_last_sweep_found_is_told(redis_client: Redis, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url)
    buffer = Buffer(Server(redis_client), lambda: settings)
    await buffer.claim_layout()
    await hold(buffer, "run_a")
    before = (await examined(redis_url))["system.sweeper"]
    assert (before.severity, before.what) == (
        "warning",
        "the buffer holds 1 entries and has not been swept within a week",
    )
    now_ms = await buffer.now_ms()
    for mismatches, severity in (({"late": 1}, "warning"), ({}, "ok")):
        assert await buffer.claim_sweep("token", 10_000)
        assert await buffer.record_sweep("token", SweepReport(at_ms=now_ms - 60_000, mismatches=mismatches))
        found = (await examined(redis_url))["system.sweeper"]
        assert (found.severity, found.what.split(" ago")[0][-4:]) == (severity, "60 s")


async def test_a_host_clock_that_is_off_is_found(redis_url: str, database: Database) -> None:
    settings = Settings(redis_url=redis_url)
    async with connected(redis_url) as redis:
        findings = await diagnose(
            settings, server=Server(redis), database=database, clock=lambda: time.time() - 90, starting=True
        )
    found = {each.check: each for each in findings}["system.clocks"]
    assert found.severity == "critical"
    assert found.what.count("ahead") == 2


# --- the database --------------------------------------------------------------------------------------------------


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[Database]:
    async with Database(database_url, pool_size=1) as database:
        yield database


async def test_a_database_that_does_not_sync_to_disk_is_found(database: Database) -> None:
    found = await examined(database=database)
    assert found["database.durability"].severity == "critical"
    assert found["database.durability"].what == "fsync and full_page_writes off"
    assert found["database.migrations"].severity == "ok"
    assert found["database.transport"].what == "on this machine"


async def test_a_schema_that_is_behind_is_found(empty_database_url: str) -> None:
    async with Database(empty_database_url, pool_size=1) as database:
        found = await examined(database=database)
        assert found["database.migrations"].severity == "critical"
        assert found["database.migrations"].fix == "run `mollifier migrate`"
        # Nobody has recorded workers there yet.
        assert found["system.drainers"].severity == "unknown"


async def test_a_schema_that_is_ahead_is_found(database: Database) -> None:
    await execute_sql(database, "UPDATE mollifier_schema SET version_num = '9999'")
    found = (await examined(database=database))["database.migrations"]
    assert found.severity == "critical"
    assert "9999" in found.what


async def test_a_read_only_database_is_found(database_url: str) -> None:
    url = f"{database_url}&options=-c%20default_transaction_read_only%3Don"
    async with Database(url, pool_size=1) as database:
        assert (await examined(database=database))["database.writable"].severity == "critical"


async def test_a_database_that_is_not_there_is_critical() -> None:
    async with Database("postgresql://127.0.0.1:1/none", pool_size=1) as database:
        assert (await examined(database=database))["database.reachable"].severity == "critical"


@pytest.fixture(scope="module")
def durable_url() -> Iterator[str]:
    """A Postgres as one should run it."""
    with skipping_without_wheels(), EmbeddedStack(valkey=False) as stack:
        yield stack.database_url


async def test_a_database_as_it_should_be_has_nothing_but_ok(durable_url: str) -> None:
    url = await fresh_database(durable_url)
    await migrate_async(url)
    async with Database(url, pool_size=1) as database:
        found = await examined(database=database)
    wrong = [each for each in found.values() if each.check.startswith("database.") and each.severity != "ok"]
    assert wrong == []


async def test_a_session_that_does_not_wait_for_its_commits_is_found(durable_url: str) -> None:
    async with Database(f"{durable_url}&options=-c%20synchronous_commit%3Doff", pool_size=1) as database:
        found = (await examined(database=database))["database.durability"]
        assert (found.severity, found.what) == ("critical", "synchronous_commit is off")
        assert (await examined(database=database, divert=False))["database.durability"].severity == "warning"
