"""What the core's tests share: settings, the state of a server as plain values, and scripts run under a shim."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from redis.asyncio import Redis

from mollifier.buffer import Accepted, Binding, Buffer
from mollifier.keys import PartitionKeys, idempotency_digest
from mollifier.model import Entry, EntryKind
from mollifier.scripts import load
from mollifier.server import Command, Reply, Server
from mollifier.settings import Settings

ORG, ENV = "org", "env"
SETTINGS = Settings(enabled=True, redis_url="unix:///unused", partitions=4)
SCRIPT_NAMES = sorted(
    file.name.removesuffix(".lua")
    for file in (resources.files("mollifier") / "lua").iterdir()
    if file.name.endswith(".lua")
)

State = dict[str, Any]


async def state_of(redis: Redis) -> State:
    """Return everything on the server: hashes as dicts, sorted sets as lists of (member, score), strings as bytes."""
    state: State = {}
    for key in await execute(redis, "KEYS", "*"):
        match await execute(redis, "TYPE", key):
            case b"hash":
                value: Any = await execute(redis, "HGETALL", key)
            case b"zset":
                scored: list[Any] = await redis.zrange(key, 0, -1, withscores=True)  # pyright: ignore[reportUnknownMemberType] - untyped options
                value = [tuple(pair) for pair in scored]
            case b"string":
                value = await execute(redis, "GET", key)
            case other:
                value = other
        state[key.decode()] = value
    return state


async def execute(redis: Redis, *command: str | bytes | float) -> Any:
    """Run one raw command."""
    untyped: Any = redis
    return await untyped.execute_command(*command)


async def lifetime_ms(redis: Redis, key: str) -> int | None:
    """Return how long the key has to live, None for ever. Fails when there is no such key."""
    left = int(await execute(redis, "PTTL", key))
    assert left != -2, f"{key} does not exist"
    return left if left >= 0 else None


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.002)


async def hold(
    buffer: Buffer,
    *run_ids: str,
    env: str = ENV,
    org: str = ORG,
    kind: EntryKind = EntryKind.AUDIT,
    payload: bytes = b"payload",
) -> None:
    """Accept these runs in this order."""
    for run_id in run_ids:
        assert isinstance(await buffer.accept(run_id, env, org, payload, kind=kind), Accepted)


def bound(task_id: str, key: str, env: str = ENV) -> list[Binding]:
    """An idempotency key, to be bound for an hour."""
    return [Binding(idempotency_digest(env, task_id, key), int((time.time() + 3600) * 1000))]


async def take(buffer: Buffer, env: str = ENV, org: str = ORG) -> Entry:
    """Pop an entry that is there."""
    entry = await buffer.pop(org, env)
    assert entry is not None
    return entry


async def drain_ids(buffer: Buffer, env: str = ENV, org: str = ORG) -> list[str]:
    """Pop and ack until nothing is due; return the run ids in the order in which they came."""
    ids: list[str] = []
    while (entry := await buffer.pop(org, env)) is not None:
        assert await buffer.ack(entry) == "held"
        ids.append(entry.run_id)
    return ids


async def expire_lease(redis: Redis, keys: PartitionKeys, run_id: str) -> None:
    """Arrange that the run's lease ran out long ago."""
    assert await execute(redis, "ZADD", keys.draining, "XX", "CH", 1, run_id) == 1


class ShimmedServer(Server):
    """Runs every script with Lua source put before it, which may stand between the script and `redis`."""

    def __init__(self, redis: Redis, shim: str) -> None:
        super().__init__(redis)
        self._sources: Mapping[str, str] = {load(n).sha: f"{shim}\n{load(n).source}" for n in SCRIPT_NAMES}

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        return await super().run_many([self._shimmed(command) for command in commands])

    def _shimmed(self, command: Command) -> Command:
        if command[0] != "EVALSHA":
            return command
        return ("EVAL", self._sources[str(command[1])], *command[2:])
