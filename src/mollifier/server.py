"""The buffer's server, seen from here: commands in, raw replies out, one kind of failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from mollifier.errors import BufferUnavailableError

Command = tuple[str | bytes | int | float, ...]
Reply = Any

_CONNECTIONS = 64
_CONNECT_TIMEOUT_S = 1.0
_REPLY_TIMEOUT_S = 5.0
_LISTEN_TURN_S = 1.0


class Server:
    """Runs commands on one Valkey or Redis. The client must answer bytes (`decode_responses=False`)."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def run(self, *command: str | bytes | float) -> Reply:
        """Run one command. Raises BufferUnavailableError when there is no answer, or when the answer is an error."""
        (reply,) = await self.run_many([command])
        if isinstance(reply, RedisError):
            raise BufferUnavailableError(f"{command[0]}: {reply}") from reply
        return reply

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        """Run many commands in one round trip; a command that fails has its error in its place.

        Raises BufferUnavailableError when the server gave no answers at all.
        """
        if not commands:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)  # pyright: ignore[reportUnknownMemberType] - the client types no raw command
        try:
            return await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            raise BufferUnavailableError(str(error)) from error

    async def listen(self, channel: str, on_message: Callable[[], None]) -> None:
        """Call `on_message` for each message of the channel, until cancelled. Raises BufferUnavailableError when it ends otherwise."""
        subscription = self._redis.pubsub(ignore_subscribe_messages=True)  # pyright: ignore[reportUnknownMemberType] - as above
        try:
            async with subscription:
                await subscription.subscribe(channel)
                # Asked each time: the client may lose a cancellation that arrives while it connects.
                while not _cancelled():
                    # Silence is no failure: the reply's deadline is for commands.
                    if await subscription.get_message(timeout=_LISTEN_TURN_S) is not None:
                        on_message()
        except (RedisError, OSError) as error:
            if not _cancelled():
                raise BufferUnavailableError(str(error)) from error
        raise asyncio.CancelledError

    async def now_ms(self) -> int:
        """Return the server's clock, milliseconds since the epoch."""
        seconds, microseconds = await self.run("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000


def _cancelled() -> bool:
    """True when the cancellation of the current task was asked for, whether or not it has arrived."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def connect(redis_url: str) -> Redis:
    """Return a client of the buffer's server, not yet connected: bounded, without retries, so that a fault is seen at once."""
    pool = BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType] - the client leaves its options untyped
        redis_url,
        max_connections=_CONNECTIONS,
        timeout=_REPLY_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=_REPLY_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    return Redis.from_pool(pool)
