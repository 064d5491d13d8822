"""The pooled client: a reply belongs to the question that was asked, whatever was cancelled before."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import PythonRespSerializer

from mollifier.buffer import Buffer
from mollifier.errors import BufferUnavailableError
from mollifier.server import Server, connect
from tests.core.support import ORG, SETTINGS, hold

CONNECTIONS = 4
AT_LEAST = 500
LATEST_TURN = 24
"""Turns of the event loop: a call takes about half as many, so that some are cancelled before they ask, some while they wait, some never."""


arguments = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])) | st.binary() | st.integers() | st.floats(allow_nan=False)
)


@given(commands=st.lists(st.tuples(st.sampled_from(["GET", b"EVALSHA", "CONFIG GET"]), arguments), min_size=1))
def test_commands_are_packed_byte_for_byte_as_the_client_packs_them_itself(
    commands: list[tuple[str | bytes, list[str | bytes | int | float]]],
) -> None:
    connection: Any = connect("redis://somewhere:1").connection_pool.make_connection()  # pyright: ignore[reportUnknownMemberType] - untyped
    plain: Any = PythonRespSerializer(6_000, connection.encoder.encode)
    named = [(name, *rest) for name, rest in commands]

    assert b"".join(connection.pack_commands(named)) == b"".join(part for one in named for part in plain.pack(*one))
    assert b"".join(connection.pack_command(*named[0])) == b"".join(plain.pack(*named[0]))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_cancelled_calls_never_leave_their_reply_to_the_next(seed: int, redis_url: str) -> None:
    chance = random.Random(seed)
    run_ids = [f"run_{number}" for number in range(CONNECTIONS)]
    cancelled = answered = 0
    async with connect(redis_url) as redis:
        # Few connections, so that each is used again at once.
        redis.connection_pool.max_connections = CONNECTIONS
        server = Server(redis)
        buffer = Buffer(server, lambda: SETTINGS)
        await hold(buffer, *run_ids)

        async def read(run_id: str) -> None:
            entry = await buffer.get_entry(ORG, run_id)
            assert entry is not None
            assert entry.run_id == run_id

        async def ask(question: str) -> None:
            questions = [f"{question}-{number}" for number in range(chance.randint(1, 100))]
            replies = await server.run_many([("ECHO", each) for each in questions])
            assert replies == [each.encode() for each in questions]

        rounds = itertools.count()
        while min(cancelled, answered) < AT_LEAST:
            number = next(rounds)
            calls = [
                *(asyncio.create_task(read(run_id)) for run_id in run_ids),
                *(asyncio.create_task(ask(f"{number}-{call}")) for call in range(CONNECTIONS)),
            ]
            moments = {call: chance.randrange(LATEST_TURN) for call in calls if chance.random() < 0.7}
            for turn in range(LATEST_TURN):
                await asyncio.sleep(0)
                for call in calls:
                    if moments.get(call) == turn:
                        call.cancel()
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, asyncio.CancelledError):
                    cancelled += 1
                else:
                    assert outcome is None
                    answered += 1


async def reads_by_the_server(server: Server) -> int:
    return (await server.run("INFO", "stats"))["total_reads_processed"]


async def test_commands_that_callers_send_at_the_same_moment_travel_together(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        server = Server(redis)
        before = await reads_by_the_server(server)

        replies = await asyncio.gather(*(server.run("ECHO", str(number)) for number in range(200)))

        assert replies == [str(number).encode() for number in range(200)]
        # One for all the commands, the rest for what a new connection asks and for the count itself.
        assert await reads_by_the_server(server) - before < 20


async def test_a_command_whose_caller_has_given_up_is_not_sent_any_more(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        server = Server(redis)
        call = asyncio.create_task(server.run("SET", "given-up", "1"))
        await asyncio.sleep(0)

        call.cancel()

        assert await server.run("GET", "given-up") is None


async def test_a_fault_is_raised_to_each_caller_by_itself() -> None:
    async with connect("redis://127.0.0.1:1") as redis:
        server = Server(redis)

        outcomes = await asyncio.gather(server.run("PING"), server.run("PING"), return_exceptions=True)

        assert [type(outcome) for outcome in outcomes] == [BufferUnavailableError, BufferUnavailableError]
        assert outcomes[0] is not outcomes[1]


async def test_listening_ends_at_whatever_moment_it_is_cancelled(redis_url: str) -> None:
    for turns in range(40):
        async with connect(redis_url) as redis:
            listening = asyncio.create_task(Server(redis).listen("channel", lambda: None))
            for _ in range(turns):
                await asyncio.sleep(0)
            listening.cancel()
            ended, _ = await asyncio.wait((listening,), timeout=10)
            assert ended
            assert listening.cancelled()
