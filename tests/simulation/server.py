"""The buffer's server, which is its model, and the client that a process has of it: the real `Server` stands on the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, Self, cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mollifier.server import Command, Reply
from tests.model.scripts import ScriptModel
from tests.model.server import ModelServer
from tests.simulation.history import Step
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Cut, Link, Silence

START_US = 1_800_000_000_000_000
"""The moment at which virtual time begins, microseconds since the epoch."""

_GROWING = {"accept", "claim", "patch", "trip"}
"""Scripts that begin with a write for which a full server has no room."""
_NO_ROOM = "OOM command not allowed when used memory > 'maxmemory'."

OnStep = Callable[[Step], None]


class BufferServer(ModelServer):
    """Runs commands at the moment they arrive, and tells of every script that ran.

    `full`: it has no memory left to give. `unconfirmed` is how often what is written is not on disk in time.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        link: Link,
        *,
        model: type[ScriptModel],
        chance: Random,
        unconfirmed: float,
        on_step: OnStep,
    ) -> None:
        super().__init__(START_US, model)
        self._chance = chance
        self._unconfirmed = unconfirmed
        self.link = link
        self.full = False
        self.listeners: list[Subscription] = []
        self._loop = loop
        self._on_step = on_step
        self._by = ""
        self.store.on_publish = self._publish

    @property
    def now_us(self) -> int:
        return START_US + int(self._loop.time() * 1_000_000)

    def turn(self) -> None:
        """Let it be now; what has lived until now is gone."""
        if self.store.now_us != self.now_us:
            self.store.now_us = self.now_us
            self.store.expire()

    def execute_for(self, by: str, command: Command) -> Reply:
        """Execute one command of one process."""
        self.turn()
        self._by = by
        match command[0]:
            case "WAITAOF":
                return [int(self._chance.random() >= self._unconfirmed), 0]
            case _:
                return self.execute(command)

    def run_script(self, name: str, named: Mapping[str, Any]) -> Reply:
        if self.full and name in _GROWING:
            return ResponseError(_NO_ROOM)
        reply = super().run_script(name, named)
        self._on_step(Step(0, self.store.now_us, self._by, name, named, reply, _runs(name, named, reply)))
        return reply

    def fall(self) -> None:
        """Die: what is stored is on disk, scripts and subscriptions are not."""
        self.link.fall()
        self.forget_scripts()
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener.end()

    def _publish(self, channel: str) -> None:
        for listener in self.listeners:
            self._loop.outside(self.link.weather.latency_s[1], listener.tell)


def _runs(name: str, named: Mapping[str, Any], reply: Reply) -> tuple[str, ...]:
    """Name the runs that a script was about."""
    if name == "ack":
        return tuple(named["runs"][::4])
    if name == "pop":
        return tuple(run.decode() for run in (*(taken[0] for taken in reply[1]), *reply[2], *reply[4]))
    run_id = named.get("run_id", "")
    return (run_id,) if run_id else ()


class Client:
    """What one process has of the server; stands in the place of a `redis.asyncio.Redis`."""

    def __init__(self, server: BufferServer, process: str) -> None:
        self.server = server
        self.process = process

    def pipeline(self, *, transaction: bool) -> Pipeline:
        assert not transaction
        return Pipeline(self)

    def pubsub(self, *, ignore_subscribe_messages: bool) -> Subscription:
        assert ignore_subscribe_messages
        return Subscription(self)

    def as_redis(self) -> Redis:
        return cast("Redis", self)


class Pipeline:
    """Commands that travel together. A long way may come between two of them: other processes' commands do."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._commands: list[Command] = []

    def execute_command(self, *command: Any) -> None:
        self._commands.append(command)

    async def execute(self, *, raise_on_error: bool) -> list[Reply]:
        assert not raise_on_error
        server, process = self._client.server, self._client.process
        replies: list[Reply] = []

        def some(commands: Sequence[Command]) -> list[Reply]:
            replies.extend(server.execute_for(process, command) for command in commands)
            return replies

        middle = server.link.split(len(self._commands))
        parts = [self._commands[:middle], self._commands[middle:]] if middle else [self._commands]
        return await _asking(server.link.ask(*(partial(some, part) for part in parts)))


class Subscription:
    """Listens for messages while the server lives."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._told: asyncio.Future[str] | None = None
        self._messages = 0
        self._is_over = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self in self._client.server.listeners:
            self._client.server.listeners.remove(self)

    async def subscribe(self, channel: str) -> None:
        server = self._client.server
        await _asking(server.link.ask(lambda: server.listeners.append(self)))

    async def get_message(self, *, timeout: float) -> str | None:
        """Return the next message, None after so many seconds of silence."""
        if not self._messages and not self._is_over:
            self._told = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout):
                    await self._told
            except TimeoutError:
                return None
        if self._is_over:
            raise RedisConnectionError("the server died")
        self._messages -= 1
        return "work"

    def tell(self) -> None:
        self._messages += 1
        self._awake()

    def end(self) -> None:
        self._is_over = True
        self._awake()

    def _awake(self) -> None:
        if self._told is not None and not self._told.done():
            self._told.set_result("")


async def _asking(answer: Any) -> Any:
    """Wait for an answer; raise what the real client raises where none comes."""
    try:
        return await answer
    except Cut as error:
        raise RedisConnectionError(str(error)) from error
    except Silence as error:
        raise RedisTimeoutError(str(error)) from error
