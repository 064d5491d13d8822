"""An outage on purpose: the embedded Postgres is away for a while in the middle of a play, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from mollifier._guard.server import children_of
from mollifier.embedded import EmbeddedError, Stack
from mollifier.play.outage_kind import OutageKind

OUTAGE_S = 10.0
# Before it, API keys and tasks have to become known: no system can take triggers of callers whom it has never seen.
BEFORE_AND_AFTER_S = 1.0
Tell = Callable[[str], object]


class Outage:
    """Takes Postgres away `after_s` seconds into a play, for `seconds`; `tell` is told of it.

    Raises EmbeddedError where its processes cannot be found to be frozen (elsewhere than on Linux).
    """

    def __init__(
        self,
        stack: Stack,
        kind: OutageKind,
        *,
        after_s: float,
        tell: Tell,
        seconds: float = OUTAGE_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if kind is OutageKind.FREEZE and not Path("/proc/self/stat").exists():
            raise EmbeddedError("Postgres can be frozen on Linux only; --outage shutdown works here.")
        self._stack = stack
        self._kind = kind
        self._after_s = after_s
        self._tell = tell
        self._seconds = seconds
        self._sleep = sleep

    @asynccontextmanager
    async def meanwhile(self) -> AsyncGenerator[None]:
        """Let it happen while the block runs; at its end Postgres is there again, also where the block fails."""
        happening = asyncio.create_task(self._happen())
        try:
            yield
            await happening
        finally:
            happening.cancel()
            with suppress(asyncio.CancelledError):
                await happening

    async def _happen(self) -> None:
        await self._sleep(self._after_s)
        how = "shut down" if self._kind is OutageKind.SHUTDOWN else "frozen"
        self._tell(f"Postgres is {how} for {self._seconds:g} s")
        if self._kind is OutageKind.SHUTDOWN:
            await self._stack.stop("postgres")
            await self._sleep(self._seconds)
            await self._stack.start("postgres")
        else:
            pids = processes_of(self._stack)
            try:
                signal_all(pids, signal.SIGSTOP)
                await self._sleep(self._seconds)
            finally:
                signal_all(pids, signal.SIGCONT)
        self._tell("Postgres is back")


def processes_of(stack: Stack) -> Sequence[int]:
    """Return Postgres's processes, the one that starts the others first. Raises EmbeddedError when it is not running."""
    if stack.postgres_pid is None:
        raise EmbeddedError("Postgres is not running: there is nothing to be frozen.")
    return [stack.postgres_pid, *children_of(stack.postgres_pid)]


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    """Signal them in this order: once the first has stopped, no more of them are started."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
