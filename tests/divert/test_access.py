"""The buffer's server as a user that may do no more than the documentation says: everything works, and nothing else is open to it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from mollifier.buffer import Disposal, Revival
from mollifier.doctor.buffer_facts import buffer_facts
from mollifier.model import MetadataOperation, RunFilter
from mollifier.server import Server, connect
from mollifier.settings import Confirmation
from tests.core.support import execute
from tests.divert.conftest import ENVIRONMENT, House
from tests.servers import valkey

ROOT = Path(__file__).parent.parent.parent
PAGE = "docs/security.md"
USER, PASSWORD = "mollifier", "hunter2"
pytestmark = pytest.mark.leaves_keys


def rules() -> tuple[list[str], list[str], list[str]]:
    """Return what the page tells the server to allow: for the API and the workers, for the doctor beside it, and to have accepts confirmed."""
    (block,) = re.findall(r"^```acl\n(.*?)^```", (ROOT / PAGE).read_text(), re.DOTALL | re.MULTILINE)
    first, second, third = block.splitlines()
    word, user, *rest = first.replace(">PASSWORD", f">{PASSWORD}").split()
    assert (word, user) == ("user", USER)
    return rest, second.split(), third.split()


ALLOWED, FOR_THE_DOCTOR, FOR_CONFIRMING = rules()


def commands_in(rule: list[str]) -> set[str]:
    return {part[1:].upper().replace("|", " ") for part in rule if part.startswith("+")}


@pytest.fixture
async def restricted(redis_url: str, redis_client: Redis) -> AsyncIterator[str]:
    """The URL of the server for the user of the page; whatever it was refused fails the test."""
    await execute(redis_client, "ACL", "LOG", "RESET")
    await execute(redis_client, "ACL", "SETUSER", USER, "reset", *ALLOWED)
    yield redis_url.replace("unix://", f"unix://{USER}:{PASSWORD}@")
    refused = await execute(redis_client, "ACL", "LOG")
    await execute(redis_client, "ACL", "DELUSER", USER)
    await execute(redis_client, "ACL", "LOG", "RESET")
    assert refused == []


@pytest.fixture
async def confined(house: House, restricted: str) -> AsyncIterator[House]:
    """The house, its server's user confined to what the page allows, and its tenant tripped."""
    confined = House(replace(house.settings, redis_url=restricted), house.database)
    await confined.trip()
    yield confined
    await confined.mollifier.aclose()


async def test_everything_works_with_no_more_than_the_page_allows(confined: House) -> None:
    runs, buffer = confined.runs, confined.buffer
    await buffer.claim_layout()
    await buffer.ping()
    run_id, cached = await confined.trigger_all(idempotency_key="k", metadata=b"{}")
    assert (cached, await confined.created(run_id)) == (False, None)
    assert await confined.trigger_all(idempotency_key="k") == (run_id, True)

    assert await runs.get(ENVIRONMENT, run_id) is not None
    await runs.add_tags(ENVIRONMENT, run_id, ["a"])
    await runs.change_metadata(ENVIRONMENT, run_id, [MetadataOperation(type="set", key="a", value=b"1")])
    assert await runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")
    await runs.cancel(ENVIRONMENT, await confined.trigger())
    assert len((await runs.list(ENVIRONMENT, RunFilter(page_size=10))).runs) == 2
    assert len(await buffer.list_entries(ENVIRONMENT.org_id, ENVIRONMENT.id)) > 0

    for not_before_ms in (None, 1):
        entry = await buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
        assert entry is not None
        assert await buffer.extend_many([entry]) == ["held"]
        assert await buffer.requeue(entry, not_before_ms=not_before_ms) == "held"
    await buffer.reclaim_expired()
    sweeper = confined.mollifier.sweeper()
    assert await sweeper.sweep()
    await sweeper.stop()
    await confined.drain()
    run = await confined.created(run_id)
    assert run is not None
    assert run.snapshot.tags == ("a",)
    await confined.trigger()
    entry = await buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await buffer.fail(entry, "never") == "held"
    assert len((await buffer.list_letters()).letters) == 1
    assert await buffer.get_letter(entry.run_id) is not None
    (revived,) = await buffer.revive_many([entry.run_id])
    assert (isinstance(revived, Revival) and revived.reply) == "revived"
    again = await buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert again is not None
    assert await buffer.fail(again, "never") == "held"
    (discarded,) = await buffer.discard_many([entry.run_id])
    assert (isinstance(discarded, Disposal) and discarded.reply) == "discarded"


async def test_accepts_are_confirmed_with_no_more_than_the_page_allows_for_that(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with valkey("--appendonly", "yes", "--appendfsync", "always") as server:
        async with connect(server.url) as admin:
            await execute(admin, "ACL", "SETUSER", USER, "reset", *ALLOWED, *FOR_CONFIRMING)
            restricted = server.url.replace("unix://", f"unix://{USER}:{PASSWORD}@")
            confined = House(replace(house.settings, redis_url=restricted, accept_confirm="aof"), house.database)
            await confined.trip()
            try:
                run_id, cached = await confined.trigger_all(idempotency_key="k")
                assert (cached, await confined.created(run_id)) == (False, None)
                assert await confined.trigger_all(idempotency_key="k") == (run_id, True)
                assert await confined.created(run_id) is None
            finally:
                await confined.mollifier.aclose()
            assert await execute(admin, "ACL", "LOG") == []
    assert "mollifier.failed_open" not in caplog.messages


async def test_whatever_else_is_on_the_server_is_out_of_reach(
    redis_url: str, redis_client: Redis, restricted: str
) -> None:
    await execute(redis_client, "SET", "somebody:else", "1")
    async with connect(restricted) as client:
        for command in (
            ("GET", "somebody:else"),
            ("EVAL", "return redis.call('DEL', KEYS[1])", 1, "somebody:else"),
            ("SUBSCRIBE", "somebody:else"),
            ("KEYS", "*"),
            ("SCAN", 0),
            ("FLUSHALL",),
            ("CONFIG", "SET", "maxmemory", "1"),
            ("ACL", "LIST"),
            ("CLIENT", "LIST"),
            ("SHUTDOWN",),
        ):
            with pytest.raises(NoPermissionError):
                await execute(client, *command)
    assert await execute(redis_client, "GET", "somebody:else") == b"1"
    await execute(redis_client, "ACL", "LOG", "RESET")


async def test_the_doctor_finds_everything_with_what_the_page_allows_it_beside(
    redis_client: Redis, restricted: str
) -> None:
    await execute(redis_client, "ACL", "SETUSER", USER, *FOR_THE_DOCTOR)
    async with connect(restricted) as client:
        facts = await buffer_facts(Server(client), restricted, lambda: 0.0, Confirmation())
    assert None not in (facts.appendfsync, facts.snapshots, facts.partitions, facts.keys, facts.sample, facts.drainers)
    assert facts.refused is None


def test_the_page_allows_what_the_scripts_call() -> None:
    scripts = "".join(script.read_text() for script in (ROOT / "src/mollifier/lua").rglob("*.lua"))
    called = set(re.findall(r"redis\.p?call\('([A-Z]+)'", scripts))
    assert called - commands_in(ALLOWED) == set(), f"say in {PAGE} that the user needs it"


def test_the_page_allows_nothing_that_nobody_calls() -> None:
    package = ROOT / "src" / "mollifier"
    sources = "".join(file.read_text() for file in (*package.rglob("*.py"), *package.rglob("*.lua")))
    spelled = set(re.findall(r"[\"']([A-Z]+)[\"']", sources))
    # The client's own: it says who it is, and subscribes.
    by_the_client = {"CLIENT", "SUBSCRIBE", "UNSUBSCRIBE"}
    allowed = commands_in(ALLOWED) | commands_in(FOR_THE_DOCTOR) | commands_in(FOR_CONFIRMING)
    words: set[Any] = {command.split()[0] for command in allowed}
    assert words - spelled - by_the_client == set()
