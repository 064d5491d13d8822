"""Confirmed accepts: answered once they are on disk, or on the replicas; told apart from those of which that is not known."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Acceptance, Accepted, Binding, Buffer, DuplicateKey, DuplicateRun, Unconfirmed
from mollifier.deadline import within
from mollifier.errors import BufferUnavailableError
from mollifier.keys import idempotency_digest
from mollifier.model import EntryKind
from mollifier.server import Server, connect
from mollifier.settings import Settings
from tests.core.support import ENV, ORG, execute, until
from tests.servers import Valkey, valkey

FAR_FUTURE_MS = 4_000_000_000_000


def acceptance(run_id: str, *, kind: EntryKind = EntryKind.HELD, key: str | None = None) -> Acceptance:
    bindings = [Binding(idempotency_digest(ENV, "task", key), FAR_FUTURE_MS)] if key else []
    return Acceptance(run_id=run_id, env_id=ENV, org_id=ORG, payload=b"payload", kind=kind, bindings=bindings)


@asynccontextmanager
async def confirming(server: Valkey, confirm: str, timeout_ms: int = 4_000) -> AsyncGenerator[tuple[Buffer, Redis]]:
    """A buffer on this server whose held entries are to be confirmed, and its client."""
    settings = Settings(
        redis_url=server.url, partitions=4, accept_confirm=confirm, accept_confirm_timeout_ms=timeout_ms
    )
    redis = connect(server.url)
    try:
        yield Buffer(Server(redis), lambda: settings), redis
    finally:
        await redis.aclose()


async def accept(buffer: Buffer, *acceptances: Acceptance) -> list[object]:
    return list(await buffer.accept_many(acceptances))


@pytest.fixture(scope="module")
def every_second() -> Iterator[Valkey]:
    with valkey("--appendonly", "yes", "--appendfsync", "everysec") as server:
        yield server


@pytest.fixture(scope="module")
def never_synced() -> Iterator[Valkey]:
    """A server on which nothing is ever known to be on disk, so that whoever waits for that waits for the deadline."""
    with valkey("--appendonly", "yes", "--appendfsync", "no") as server:
        yield server


@pytest.mark.parametrize("policy", ["always", "everysec"])
async def test_an_accept_that_reaches_the_disk_is_confirmed(policy: str) -> None:
    with valkey("--appendonly", "yes", "--appendfsync", policy) as server:
        async with confirming(server, "aof") as (buffer, _):
            assert await accept(buffer, acceptance("run")) == [Accepted("run", 1)]


async def test_an_accept_of_which_the_disk_is_not_known_in_time_is_stored_and_unconfirmed(never_synced: Valkey) -> None:
    async with confirming(never_synced, "aof", timeout_ms=20) as (buffer, redis):
        assert await accept(buffer, acceptance("run")) == [Unconfirmed("run")]
        assert await buffer.get_entry(ORG, "run") is not None
        await execute(redis, "FLUSHALL")


@pytest.mark.parametrize("confirm", ["aof", "replicas:1"])
async def test_a_server_that_cannot_confirm_at_all_stores_and_confirms_nothing(confirm: str) -> None:
    with valkey("--appendonly", "no") as server:
        async with confirming(server, confirm, timeout_ms=20) as (buffer, _):
            assert await accept(buffer, acceptance("run")) == [Unconfirmed("run")]
            assert await buffer.get_entry(ORG, "run") is not None


async def test_an_accept_is_confirmed_once_the_replica_has_it_and_not_while_that_hangs() -> None:
    numbers = itertools.count()
    with (
        valkey("--repl-diskless-sync-delay", "0", tcp=True) as primary,
        valkey("--replicaof", "127.0.0.1", str(primary.port), tcp=True) as replica,
    ):
        async with (
            confirming(primary, "replicas:1") as (patient, _),
            confirming(primary, "replicas:1", timeout_ms=50) as (hasty, _),
            confirming(replica, "none") as (copy, _),
        ):

            async def is_confirmed() -> bool:
                (outcome,) = await accept(patient, acceptance(f"run-{next(numbers)}"))
                return isinstance(outcome, Accepted)

            # A replica that has just come up needs a while before it says what it has.
            await until(is_confirmed)
            (first,) = await accept(patient, acceptance("first"))
            assert isinstance(first, Accepted)
            assert await copy.get_entry(ORG, "first") is not None

            replica.process.send_signal(signal.SIGSTOP)
            assert await accept(hasty, acceptance("second")) == [Unconfirmed("second")]

            replica.process.send_signal(signal.SIGCONT)
            await until(is_confirmed)


DIGEST = idempotency_digest(ENV, "task", "key")


async def test_what_was_held_before_is_confirmed_to_whoever_it_answers(every_second: Valkey) -> None:
    async with confirming(every_second, "none") as (buffer, redis), confirming(every_second, "aof") as (other, _):
        await accept(buffer, acceptance("run", key="key"))
        outcomes = await accept(other, acceptance("run"), acceptance("other", key="key"))
        assert outcomes == [DuplicateRun("run"), DuplicateKey("run", DIGEST)]
        assert await other.confirm(ORG, ["run"])
        assert not await other.confirm(ORG, ["run", "nobody"])
        await execute(redis, "FLUSHALL")


async def test_what_was_held_before_is_unconfirmed_also_to_a_connection_that_has_not_written_it(
    never_synced: Valkey,
) -> None:
    async with (
        confirming(never_synced, "none") as (buffer, redis),
        confirming(never_synced, "aof", timeout_ms=20) as (first, _),
        confirming(never_synced, "aof", timeout_ms=20) as (second, _),
    ):
        await accept(buffer, acceptance("run", key="key"))
        outcomes = await accept(first, acceptance("run"), acceptance("other", key="key"))
        assert outcomes == [
            DuplicateRun("run", is_confirmed=False),
            DuplicateKey("run", DIGEST, is_confirmed=False),
        ]
        assert not await second.confirm(ORG, ["run"])
        await execute(redis, "FLUSHALL")


async def test_a_server_with_no_room_for_a_write_to_ask_by_confirms_nothing(every_second: Valkey) -> None:
    async with confirming(every_second, "aof") as (buffer, redis):
        assert await accept(buffer, acceptance("run")) == [Accepted("run", 1)]
        await execute(redis, "CONFIG", "SET", "maxmemory", 1)
        try:
            assert not await buffer.confirm(ORG, ["run"])
        finally:
            await execute(redis, "CONFIG", "SET", "maxmemory", 0)
        await execute(redis, "FLUSHALL")


async def test_audit_copies_are_not_confirmed(never_synced: Valkey) -> None:
    async with confirming(never_synced, "aof") as (buffer, redis):
        assert await accept(buffer, acceptance("run", kind=EntryKind.AUDIT)) == [Accepted("run", 1)]
        await execute(redis, "FLUSHALL")


async def test_a_server_that_forgot_the_scripts_is_sent_them_and_confirms_what_they_write(every_second: Valkey) -> None:
    async with confirming(every_second, "aof") as (buffer, redis):
        await execute(redis, "SCRIPT", "FLUSH")
        outcomes = await accept(buffer, acceptance("a"), acceptance("b"))
        assert [type(outcome) for outcome in outcomes] == [Accepted, Accepted]
        await execute(redis, "FLUSHALL")


async def test_nobody_else_waits_behind_an_accept_that_waits_for_the_disk(never_synced: Valkey) -> None:
    async with confirming(never_synced, "aof") as (buffer, redis):
        waiting = [asyncio.create_task(accept(buffer, acceptance(f"run-{n}"))) for n in range(100)]

        async def are_stored() -> bool:
            return len(await buffer.list_entries(ORG, ENV)) == len(waiting)

        # Reading, gate and drainer use the same client.
        await until(are_stored)
        assert not any(task.done() for task in waiting)

        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await execute(redis, "FLUSHALL")


async def test_accepts_of_a_burst_share_the_wait_for_the_disk(every_second: Valkey) -> None:
    calls = 1_000
    async with confirming(every_second, "aof") as (buffer, redis):
        await execute(redis, "CONFIG", "RESETSTAT")

        async def one(number: int) -> list[object]:
            # Not all in one turn of the loop, for then they would travel in one pipeline anyway.
            await asyncio.sleep(number / calls)
            return await accept(buffer, acceptance(f"run-{number}"))

        outcomes = await asyncio.gather(*(one(number) for number in range(calls)))

        assert {type(outcome) for (outcome,) in outcomes} == {Accepted}
        stats = await execute(redis, "INFO", "commandstats")
        assert stats["cmdstat_waitaof"]["calls"] <= calls / 10
        await execute(redis, "FLUSHALL")


async def test_an_accept_that_was_given_up_harms_none_that_comes_after(every_second: Valkey) -> None:
    async with confirming(every_second, "aof") as (buffer, redis):
        for turns in range(20):
            given_up = asyncio.create_task(accept(buffer, acceptance(f"given-up-{turns}")))
            for _ in range(turns):
                await asyncio.sleep(0)
            given_up.cancel()
            with suppress(asyncio.CancelledError):
                await given_up
        (outcome,) = await accept(buffer, acceptance("after"))
        assert isinstance(outcome, Accepted)
        assert outcome.run_id == "after"
        await execute(redis, "FLUSHALL")


async def test_a_server_that_is_gone_while_an_accept_waits_is_unavailable() -> None:
    with valkey("--appendonly", "yes", "--appendfsync", "no") as server:
        async with confirming(server, "aof") as (buffer, _):
            waiting = asyncio.create_task(accept(buffer, acceptance("run")))

            async def is_stored() -> bool:
                return await buffer.get_entry(ORG, "run") is not None

            await until(is_stored)
            server.process.kill()
            with pytest.raises(BufferUnavailableError):
                await within(10_000, waiting)
