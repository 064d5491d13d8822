"""4. The sweeper: looks through the whole buffer every now and then, in one process of all, and off the server's back.

Every process that drains runs one; a claim on the server decides which of them sweeps (`election.py`), and passes on when that process
stops or dies. A sweep (`sweep.py`) is done in pieces, with a pause after each in proportion to its work, and before each the claim is
looked at: a process that was frozen meanwhile breaks its sweep off. What it may still have on its way then harms nothing, for a repair
looks again at what is there; and its report is refused. What the last sweep found is stored for everybody to see.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress

from mollifier import ids
from mollifier.backoff import Backoff
from mollifier.buffer import Buffer
from mollifier.election import CLAIM_MS, Election
from mollifier.errors import BufferUnavailableError
from mollifier.inspection import STALLED_MS
from mollifier.settings import Settings
from mollifier.sweep import Sweep
from mollifier.telemetry import Telemetry

_PAUSE_PER_RUN_S = 0.000_1
"""A hundred runs are a millisecond's work for the server, and ten of pause."""
_UNWIND_S = 1.0


class Sweeper:
    """Sweeps one buffer, every `sweep_interval_s`, while this process is elected. Start it once; stop it.

    `claim_ms` is how long after its death another process takes over, `sleep` takes seconds, `monotonic` returns seconds.
    """

    def __init__(
        self,
        buffer: Buffer,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        claim_ms: int = CLAIM_MS,
        stalled_ms: int = STALLED_MS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        new_token: Callable[[], str] = ids.token,
    ) -> None:
        self._buffer = buffer
        self._settings = settings
        self._telemetry = telemetry
        self._stalled_ms = stalled_ms
        self._sleep = sleep
        self._monotonic = monotonic
        self._election = Election(buffer, new_token(), monotonic, claim_ms)
        self._task: asyncio.Task[None] | None = None

    @property
    def is_elected(self) -> bool:
        """True while this process is the one that sweeps."""
        return self._election.is_ours

    def start(self) -> None:
        """Start the loop; starting it twice starts one."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="mollifier-sweep")

    async def stop(self) -> None:
        """Break off, let another process sweep at once, and return; a server that does not answer is not waited for."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait((task,), timeout=_UNWIND_S)
        self._telemetry.swept(None)
        with suppress(BufferUnavailableError, TimeoutError):
            async with asyncio.timeout(_UNWIND_S):
                await self._election.resign()

    async def sweep(self) -> bool:
        """Sweep once, if this process is elected; False when it is not, or not to the end. Raises BufferUnavailableError."""
        if not await self._election.holds():
            return False
        sweep = Sweep(self._buffer, self._telemetry, stalled_ms=self._stalled_ms)
        async with aclosing(sweep.pieces()) as pieces:
            async for runs in pieces:
                await self._sleep(runs * _PAUSE_PER_RUN_S)
                if not await self._election.holds():
                    return False
        report = sweep.report
        if report is None or not await self._buffer.record_sweep(self._election.token, report):
            self._election.doubt()
            return False
        self._telemetry.swept(report)
        return True

    async def _run(self) -> None:
        backoff = Backoff()
        due_s = -math.inf
        while asyncio.current_task() is self._task:
            pause_s = self._election.renewal_s
            try:
                if await self._election.holds() and self._monotonic() >= due_s and await self.sweep():
                    due_s = self._monotonic() + self._settings().sweep_interval_s
                if self.is_elected:
                    pause_s = min(pause_s, max(0.0, due_s - self._monotonic()))
                backoff.reset()
            except Exception as error:  # noqa: BLE001 - the loop outlives any fault
                self._telemetry.faulted("sweep", error)
                pause_s = backoff.next_ms() / 1000
            if not self.is_elected:
                self._telemetry.swept(None)
            await self._sleep(pause_s)
