"""Time that passes in steps, for a drainer on a real server: only when there is nothing to do but to wait, and then up to the next wake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mollifier.drainer import Drainer

_LOOPS = 2
"""A drainer that has nothing to do sleeps twice: before it looks for work, and before it extends its leases."""


class SteppedTime:
    """A clock in seconds, and the sleepers that wait for it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        sleeper = (self.now_s + seconds, asyncio.get_running_loop().create_future())
        self._sleepers.append(sleeper)
        try:
            await sleeper[1]
        finally:
            self._sleepers.remove(sleeper)

    async def pass_until(self, drainer: Drainer, holds: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> None:
        """Let time pass, as fast as the drainer gets its work done, until the condition holds; `timeout_s` is this machine's time."""
        async with asyncio.timeout(timeout_s):
            while not await holds():
                await self._step(drainer)

    async def pass_s(self, drainer: Drainer, seconds: float) -> None:
        """Let so many seconds pass."""
        end_s = self.now_s + seconds

        async def is_over() -> bool:
            return self.now_s >= end_s

        await self.pass_until(drainer, is_over)

    async def _step(self, drainer: Drainer) -> None:
        quiet_turns = 0
        while quiet_turns < 5:
            await asyncio.sleep(0)
            is_quiet = drainer.in_flight == 0 and len(self._sleepers) == _LOOPS
            quiet_turns = quiet_turns + 1 if is_quiet else 0
        self.now_s, sleeper = min(self._sleepers, key=lambda each: each[0])
        sleeper.set_result(None)
