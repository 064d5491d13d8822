"""The server's adapter: one kind of failure, and calls that are given up leave nothing to the next one."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.errors import BufferUnavailableError
from mollifier.model import Entry
from mollifier.server import Server, connect
from tests.core.support import ENV, ORG, SETTINGS, execute, hold


@pytest.fixture
def server(redis_client: Redis) -> Server:
    return Server(redis_client)


async def test_answers_come_in_the_order_of_the_commands(server: Server) -> None:
    assert await server.run_many([("ECHO", str(n)) for n in range(5)]) == [b"0", b"1", b"2", b"3", b"4"]


async def test_no_commands_are_no_round_trip() -> None:
    async with connect("unix:///nowhere/valkey.sock") as redis:
        assert await Server(redis).run_many([]) == []


async def test_a_command_that_fails_has_its_error_in_its_place(server: Server) -> None:
    first, second, third = await server.run_many([("ECHO", "a"), ("LPUSH",), ("ECHO", "b")])
    assert (first, third) == (b"a", b"b")
    assert isinstance(second, Exception)


async def test_a_single_command_that_fails_raises_with_its_name(server: Server) -> None:
    with pytest.raises(BufferUnavailableError, match=r"^LPUSH: "):
        await server.run("LPUSH")


async def test_the_servers_clock_is_in_milliseconds(server: Server, redis_client: Redis) -> None:
    seconds, _ = await execute(redis_client, "TIME")
    assert int(seconds) * 1000 <= await server.now_ms() < (int(seconds) + 60) * 1000


async def test_a_client_that_is_made_but_not_used_opens_no_connection(redis_client: Redis, redis_url: str) -> None:
    async def opened() -> int:
        return (await execute(redis_client, "INFO", "stats"))["total_connections_received"]

    before = await opened()
    async with connect(redis_url) as redis:
        Buffer(Server(redis), lambda: SETTINGS)
        assert await opened() == before


async def test_a_call_that_was_given_up_never_leaves_its_answer_to_another(redis_client: Redis, redis_url: str) -> None:
    async with connect(redis_url) as redis:
        buffer = Buffer(Server(redis), lambda: SETTINGS)
        names = [f"run-{n}" for n in range(100)]
        await hold(buffer, *names)
        for turns in (2, 10, 40):
            await execute(redis_client, "CLIENT", "PAUSE", 100, "ALL")
            calls = [asyncio.create_task(buffer.get_entry(ORG, name)) for name in names]
            for _ in range(turns):
                await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            replies = await asyncio.gather(*calls, return_exceptions=True)
            answered = {n: reply.run_id for n, reply in enumerate(replies) if isinstance(reply, Entry)}
            assert set(answered) >= set(range(1, len(names), 2))
            assert all(run_id == names[n] for n, run_id in answered.items())
            entries = await asyncio.gather(*(buffer.get_entry(ORG, name) for name in names))
            assert [entry.run_id for entry in entries if isinstance(entry, Entry)] == names


async def test_a_call_that_is_cancelled_at_any_moment_leaves_a_client_that_works(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        buffer = Buffer(Server(redis), lambda: SETTINGS)
        for turns in range(40):
            call = asyncio.create_task(buffer.accept(f"cancelled-{turns}", ENV, ORG, b"payload"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait((call,))
            name = f"next-{turns}"
            await hold(buffer, name)
            entry = await buffer.get_entry(ORG, name)
            assert entry is not None
            assert entry.run_id == name
