"""The buffer's server, seen from here: commands in, raw replies out, one kind of failure.

Commands that callers send at the same moment travel together, in one pipeline on one connection: in a burst the cost of a round trip
is shared by all who wait for one. A caller that gives up leaves its command where it is: unsent, it is never sent; on its way, its
reply is read and thrown away. So no cancellation ever leaves a reply unread on a connection that another caller gets next.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import RedisError

from mollifier import faults
from mollifier.errors import BufferRefusedError, BufferUnavailableError

Command = tuple[str | bytes | int | float, ...]
Reply = Any

_CONNECTIONS = 64
_CONNECT_TIMEOUT_S = 1.0
_REPLY_TIMEOUT_S = 5.0
_LISTEN_TURN_S = 1.0
PIPELINES = 8
"""How many are under way at once; what comes meanwhile waits for the first to return, and goes with what came with it."""
_PIPELINE_BYTES = 4 * 1024 * 1024
_pack: Callable[..., list[bytes]] = HiredisRespSerializer().pack  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - the client leaves it untyped


class _Question(NamedTuple):
    """One caller's commands, and where it waits for their replies."""

    commands: Sequence[Command]
    replies: asyncio.Future[list[Reply]]


class Server:
    """Runs commands on one Valkey or Redis. The client must answer bytes (`decode_responses=False`)."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._unsent: deque[_Question] = deque()
        self._sending: asyncio.Handle | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def redis(self) -> Redis:
        """The client."""
        return self._redis

    async def run(self, *command: str | bytes | float) -> Reply:
        """Run one command. Raises BufferUnavailableError when there is no answer, or when the answer is an error."""
        (reply,) = await self.run_many([command])
        if isinstance(reply, RedisError):
            raise BufferRefusedError(f"{command[0]}: {reply}") from reply
        return reply

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        """Run many commands in one round trip; a command that fails has its error in its place.

        Raises BufferUnavailableError when the server gave no answers at all.
        """
        if not commands:
            return []
        faults.reached("before", commands)
        loop = asyncio.get_running_loop()
        question = _Question(commands, loop.create_future())
        self._unsent.append(question)
        if self._sending is None:
            self._sending = loop.call_soon(self._send)
        replies = await question.replies
        faults.reached("after", commands)
        return replies

    def _send(self) -> None:
        """Send what has come up since the last turn of the loop."""
        self._sending = None
        while self._unsent and len(self._under_way) < PIPELINES and self._may_send():
            questions = self._next_pipeline()
            if questions:
                task = asyncio.create_task(self._ask(questions), name="mollifier-pipeline")
                self._under_way.add(task)
                task.add_done_callback(self._returned)

    def _may_send(self) -> bool:
        """Tell whether the next pipeline may leave now, while there is room for it; whoever says no sees to it that it leaves later."""
        return True

    def _last(self) -> Sequence[Command]:
        """Return commands for the end of each pipeline; their replies follow those of each question in it."""
        return ()

    def _next_pipeline(self) -> list[_Question]:
        questions: list[_Question] = []
        size_bytes = 0
        while self._unsent and size_bytes < _PIPELINE_BYTES:
            question = self._unsent.popleft()
            if not question.replies.done():
                questions.append(question)
                size_bytes += sum(_size_bytes(command) for command in question.commands)
        return questions

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            self._send()

    async def _ask(self, questions: Sequence[_Question]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for question in questions:
            for command in question.commands:
                pipeline.execute_command(*command)  # pyright: ignore[reportUnknownMemberType] - the client types no raw command
        for command in self._last():
            pipeline.execute_command(*command)  # pyright: ignore[reportUnknownMemberType] - as above
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except Exception as error:  # noqa: BLE001 - each caller raises it for itself
            for question in questions:
                if not question.replies.done():
                    question.replies.set_exception(_as_failure(error))
            return
        except BaseException:
            for question in questions:
                question.replies.cancel()
            raise
        start = 0
        last = replies[sum(len(question.commands) for question in questions) :]
        for question in questions:
            end = start + len(question.commands)
            if not question.replies.done():
                question.replies.set_result([*replies[start:end], *last])
            start = end

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


def _as_failure(error: Exception) -> Exception:
    """Return the failure to raise to one caller: a fault of the server's, or of this program's own."""
    if not isinstance(error, RedisError | OSError):
        return error
    failure = BufferUnavailableError(str(error))
    failure.__cause__ = error
    return failure


def _size_bytes(command: Command) -> int:
    return sum(len(part) for part in command if isinstance(part, str | bytes))


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
    pool.connection_class = _packing_in_c(pool.connection_class)
    return Redis.from_pool(pool)


def _packing_in_c(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return the kind of connection with its commands packed by hiredis, as the client does it where it is not asynchronous.

    A tenth of what a process does that holds or drains is packing, when each argument is packed by itself.
    """

    class Packing(kind):
        def pack_command(self, *args: Any) -> list[bytes]:
            return _pack(*args)

        def pack_commands(self, commands: Iterable[Iterable[Any]]) -> list[bytes]:
            return [b"".join([packed for command in commands for packed in _pack(*command)])]

    return Packing
