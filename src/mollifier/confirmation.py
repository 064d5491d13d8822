"""Having what is written confirmed: on disk (WAITAOF), or on so many replicas (WAIT), before anybody is answered.

Without it an accept is answered as soon as the buffer's server has it in memory and has handed it to the operating system: a crash of
that machine may take it back (docs/reliability.md has the figures). The question travels at the end of the writes' own pipeline, for
it is about the writes of its connection: one round trip for both.

Who answers with what another connection has written asks as well. So each question comes after a write of its own, which changes nothing:
the server writes in one order, so once that one is safe everything before it is. A server that refuses it, its memory full, confirms
nothing.

The server answers it when the disk or the replicas have caught up, a Redis with `appendfsync everysec` after up to a second, and reads
nothing from that connection meanwhile. So confirmed writes have pipelines of their own, or the gate would wait behind them; and as each
of the few may be gone for a second, they leave one after another in growing gaps: the first at once, the next 8 ms later, then 16, up to
512, together a second. What comes up meanwhile goes with the next, so every write in a burst is on its way within half a second,
however many there are, and a server that confirms at once is asked again as soon as it has answered. (Against leaving at once while
there is room, that takes half a second off the median at 400 writes a second.)

A reply is worth what the server makes of it: Valkey, and Redis before 8.0, answer WAITAOF under `everysec` before they have synced. Under
`always` every server syncs before it answers anything. The doctor tells.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from mollifier.errors import BufferUnavailableError
from mollifier.keys import CONFIRMATION
from mollifier.scripts import Call, command, result
from mollifier.server import Command, Reply, Server
from mollifier.settings import Confirmation, Settings

T = TypeVar("T")

_FIRST_GAP_S = 0.004
_WRITE: Command = ("SET", CONFIRMATION, "")


class Written(msgspec.Struct, Generic[T], frozen=True):
    """What a call answered, and whether what it wrote, or found written, was confirmed in time."""

    result: T
    confirmed: bool


class ConfirmedScripts:
    """Runs calls and has what they write confirmed, as `settings().confirmation` says, within `accept_confirm_timeout_ms`."""

    def __init__(self, redis: Redis, settings: Callable[[], Settings]) -> None:
        self._server = _ConfirmingServer(redis, settings)

    async def run_many(self, calls: Sequence[Call[T]]) -> list[Written[T] | BufferUnavailableError]:
        """Run calls in one round trip, two when the server does not know a script; each has its own outcome.

        Raises BufferUnavailableError when the server gave no replies at all.
        """
        written = await self._run([command("EVALSHA", call.script.sha, call) for call in calls])
        unknown = [index for index, (reply, _) in enumerate(written) if isinstance(reply, NoScriptError)]
        if unknown:
            by_source = [command("EVAL", calls[index].script.source, calls[index]) for index in unknown]
            for index, again in zip(unknown, await self._run(by_source), strict=True):
                written[index] = again
        return [_written(call, *each) for call, each in zip(calls, written, strict=True)]

    async def read(self, command: Command) -> Written[Reply]:
        """Run a command that reads; what it has found, whoever wrote that, is confirmed or not.

        The reply may be an error. Raises BufferUnavailableError when the server gave no replies at all.
        """
        ((reply, confirmed),) = await self._run([command])
        return Written(reply, confirmed)

    async def _run(self, commands: Sequence[Command]) -> list[tuple[Reply, bool]]:
        *replies, written, confirmation = await self._server.run_many(commands)
        confirmed = not isinstance(written, RedisError) and self._server.is_met_by(confirmation)
        return [(reply, confirmed) for reply in replies]


class _ConfirmingServer(Server):
    """Ends each pipeline with a write of its own, and the question whether that, and so all before it, is safe."""

    def __init__(self, redis: Redis, settings: Callable[[], Settings]) -> None:
        super().__init__(redis)
        self._settings = settings
        self._left_at_s = -math.inf

    def is_met_by(self, reply: Reply) -> bool:
        """Tell whether the reply to that question is what was asked for; an error is not."""
        match self._settings().confirmation, reply:
            case Confirmation(aof=True), [int() as on_disk, *_]:
                return on_disk > 0
            case Confirmation(aof=False, replicas=wanted), int():
                return reply >= wanted
            case _:
                return False

    def _last(self) -> Sequence[Command]:
        settings = self._settings()
        timeout_ms = settings.accept_confirm_timeout_ms
        if settings.confirmation.aof:
            return _WRITE, ("WAITAOF", 1, 0, timeout_ms)
        return _WRITE, ("WAIT", settings.confirmation.replicas, timeout_ms)

    def _may_send(self) -> bool:
        loop = asyncio.get_running_loop()
        gap_s = _FIRST_GAP_S * 2 ** len(self._under_way) if self._under_way else 0
        early_s = self._left_at_s + gap_s - loop.time()
        if early_s <= 0:
            self._left_at_s = loop.time()
            return True
        if self._sending is None:
            self._sending = loop.call_later(early_s, self._send)
        return False


def _written(call: Call[T], reply: Any, confirmed: bool) -> Written[T] | BufferUnavailableError:  # noqa: FBT001 - one of a pair
    outcome = result(call, reply)
    return outcome if isinstance(outcome, BufferUnavailableError) else Written(outcome, confirmed)
