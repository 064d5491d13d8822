"""A server whose scripts live by a clock that the test sets, so that boundaries are hit exactly.

Only what scripts do with time is replaced, by a shim between them and `redis`: TIME answers the test's moment, and lifetimes
are kept in a hash and end by that moment. A key is gone once the moment has passed the last millisecond of its life, as on the real server.
"""

from __future__ import annotations

from collections.abc import Sequence

from redis.asyncio import Redis

from mollifier.errors import BufferUnavailableError
from mollifier.model import Verdict
from mollifier.scripts import trip
from tests.core.support import ShimmedServer

NOW_US = "virtual:now_us"
ENDS_MS = "virtual:ends_ms"

SHIM = f"""
local server = redis
local now_us = tonumber(server.call('GET', '{NOW_US}'))
local now = math.floor(now_us / 1000)
local function gone(key)
  server.call('DEL', key)
  server.call('HDEL', '{ENDS_MS}', key)
end
local function ends(key) return tonumber(server.call('HGET', '{ENDS_MS}', key) or nil) end
local function live_until(key, ms) server.call('HSET', '{ENDS_MS}', key, string.format('%.0f', ms)) end
for _, key in ipairs(KEYS) do
  local last = ends(key)
  if last and now > last then gone(key) end
end
local shim = {{}}
function shim.TIME()
  return {{string.format('%.0f', math.floor(now_us / 1000000)), string.format('%.0f', now_us % 1000000)}}
end
function shim.PEXPIRE(key, ms, condition)
  if server.call('EXISTS', key) == 0 then return 0 end
  if condition == 'GT' and (ends(key) or math.huge) >= now + ms then return 0 end
  live_until(key, now + ms)
  return 1
end
function shim.PERSIST(key) return server.call('HDEL', '{ENDS_MS}', key) end
function shim.PTTL(key)
  if server.call('EXISTS', key) == 0 then
    server.call('HDEL', '{ENDS_MS}', key)
    return -2
  end
  local last = ends(key)
  return last and last - now or -1
end
function shim.DEL(key)
  server.call('HDEL', '{ENDS_MS}', key)
  return server.call('DEL', key)
end
function shim.SET(key, value, option, ms)
  if option == 'KEEPTTL' then return server.call('SET', key, value) end
  server.call('HDEL', '{ENDS_MS}', key)
  if option == 'PXAT' and tonumber(ms) <= now then return server.call('DEL', key) end
  server.call('SET', key, value)
  if option == 'PX' then live_until(key, now + ms) end
  if option == 'PXAT' then live_until(key, tonumber(ms)) end
  assert(not option or option == 'PX' or option == 'PXAT', 'the shim knows no SET with ' .. tostring(option))
end
local redis = {{ pcall = server.pcall }}
function redis.call(command, ...)
  if shim[command] then return shim[command](...) end
  assert(not string.find(command, 'EXPIRE') and not string.find(command, 'EX$'), 'the shim knows no ' .. command)
  return server.call(command, ...)
end
"""


class Window:
    """How triggers are counted: the arguments of the script."""

    def __init__(self, *, bucket_us: int, buckets: int, threshold: int, hold_ms: int) -> None:
        self.bucket_us = bucket_us
        self.buckets = buckets
        self.threshold = threshold
        self.hold_ms = hold_ms

    def __repr__(self) -> str:
        return f"{self.buckets} x {self.bucket_us} us, threshold {self.threshold}, hold {self.hold_ms} ms"


class VirtualEvaluator:
    """Runs the real script on the real server at moments of the test's choice."""

    def __init__(self, redis: Redis) -> None:
        self._server = ShimmedServer(redis, SHIM)

    async def arrive(self, env: str, window: Window, moments_us: Sequence[int]) -> list[Verdict]:
        """Have triggers arrive at these moments, microseconds since the epoch; one round trip for all of them."""
        return [verdict for (verdict,) in await self._arrive(env, window, moments_us, 1)]

    async def arrive_together(self, env: str, window: Window, moment_us: int, number: int) -> Sequence[Verdict]:
        """Have so many triggers arrive in one call at this moment."""
        (verdicts,) = await self._arrive(env, window, [moment_us], number)
        return verdicts

    async def _arrive(
        self, env: str, window: Window, moments_us: Sequence[int], number: int
    ) -> list[tuple[Verdict, ...]]:
        call = trip(
            rate=f"rate:{env}",
            tripped=f"tripped:{env}",
            bucket_us=window.bucket_us,
            buckets=window.buckets,
            threshold=window.threshold,
            hold_ms=window.hold_ms,
            number=number,
        )
        commands = [
            command
            for moment_us in moments_us
            for command in (
                ("SET", NOW_US, moment_us),
                ("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.args),
            )
        ]
        replies = (await self._server.run_many(commands))[1::2]
        broken = [reply for reply in replies if isinstance(reply, Exception)]
        if broken:
            raise BufferUnavailableError(str(broken[0]))
        return [call.parse(reply) for reply in replies]


class Model:
    """What the script is to answer, said naively: all arrivals are kept, and every one of them is looked at each time."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._arrivals: list[int] = []
        self._held_until_ms = -1

    def arrive(self, moment_us: int) -> Verdict:
        self._arrivals.append(moment_us)
        bucket = moment_us // self._window.bucket_us
        recent = [a for a in self._arrivals if abs(bucket - a // self._window.bucket_us) < self._window.buckets]
        now_ms = moment_us // 1000
        if len(recent) > self._window.threshold:
            self._held_until_ms = now_ms + self._window.hold_ms
        return Verdict(tripped=now_ms <= self._held_until_ms, count=len(recent))


def most_in_any_span(moments_us: Sequence[int], span_us: int) -> int:
    """Return the largest number of moments that lie in one half-open span of this length."""
    most, start = 0, 0
    ordered = sorted(moments_us)
    for end, moment_us in enumerate(ordered):
        while ordered[start] <= moment_us - span_us:
            start += 1
        most = max(most, end - start + 1)
    return most
