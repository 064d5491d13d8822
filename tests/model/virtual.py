"""The real server under a clock that the test moves, and the whole of its state in one round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from redis import Redis

from mollifier.scripts import load
from mollifier.server import Command, Reply, Server, connect
from tests.core.support import SCRIPT_NAMES
from tests.core.virtual_time import ENDS_MS, NOW_US, SHIM

_TIME = f"""
local now = tonumber(redis.call('GET', '{NOW_US}'))
return {{string.format('%.0f', math.floor(now / 1000000)), string.format('%.0f', now % 1000000)}}
"""
_TURN = f"""
redis.call('SET', '{NOW_US}', ARGV[1])
local now_ms = math.floor(ARGV[1] / 1000)
local ends = redis.call('HGETALL', '{ENDS_MS}')
for i = 1, #ends, 2 do
  if tonumber(ends[i + 1]) < now_ms then
    redis.call('DEL', ends[i])
    redis.call('HDEL', '{ENDS_MS}', ends[i])
  end
end
"""
_DUMP = f"""
local found = {{}}
for _, key in ipairs(redis.call('KEYS', 'mollifier:*')) do
  local kind = redis.call('TYPE', key).ok
  local value
  if kind == 'hash' then value = redis.call('HGETALL', key)
  elseif kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  else value = redis.call('GET', key) end
  found[#found + 1] = {{key, kind, redis.call('HGET', '{ENDS_MS}', key), value}}
end
return found
"""
_OWN = {"time": _TIME, "turn": _TURN, "dump": _DUMP}

UNUSED = connect("unix:///unused")
"""A client that a server has to be given, and that nothing is asked of."""

Edit = Callable[[str, str], str]
"""Takes a script's name and its source, and returns the source to run."""


def unedited(_name: str, source: str) -> str:
    return source


class VirtualServer(Server):
    """Runs every script under the shim, on a client that blocks: nothing else has to go on meanwhile. Call `prepare` first."""

    def __init__(self, client: Redis, edit: Edit = unedited) -> None:
        super().__init__(UNUSED)
        self._client: Any = client
        self._sha: dict[str, str] = {}
        for name in SCRIPT_NAMES:
            script = load(name)
            self._sha[script.sha] = self._load(f"{SHIM}\n{edit(name, script.source)}")
        for name, own in _OWN.items():
            self._sha[name] = self._load(own)

    def prepare(self, now_us: int) -> None:
        """Empty the server and set its clock."""
        self._client.flushall()
        self.turn(now_us)

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        if not commands:
            return []
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*self._shimmed(command))
        return pipeline.execute(raise_on_error=False)

    def turn(self, now_us: int) -> None:
        """Set the clock; what has lived until then is gone."""
        self.execute("EVALSHA", self._sha["turn"], 0, now_us)

    def dump(self) -> list[Any]:
        """Return every key with its type, the last millisecond of its life and its value."""
        return self.execute("EVALSHA", self._sha["dump"], 0)

    def drop(self, key: str) -> None:
        """Have a key vanish, as by eviction."""
        self.execute("DEL", key)
        self.execute("HDEL", ENDS_MS, key)

    def forget(self, key: str, member: str) -> None:
        """Have a member of a sorted set vanish."""
        self.execute("ZREM", key, member)
        if not self.execute("EXISTS", key):
            self.drop(key)

    def execute(self, *command: str | bytes | int) -> Any:
        """Run one command as it is."""
        return self._client.execute_command(*command)

    def _shimmed(self, command: Command) -> Command:
        if command == ("TIME",):
            return ("EVALSHA", self._sha["time"], 0)
        if command[0] == "EVALSHA":
            return ("EVALSHA", self._sha[str(command[1])], *command[2:])
        return command

    def _load(self, source: str) -> str:
        return self.execute("SCRIPT", "LOAD", source).decode()
