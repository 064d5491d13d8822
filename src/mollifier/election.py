"""Who sweeps: one process at a time, by a claim on the buffer's server that runs out unless it is renewed."""

from __future__ import annotations

import math
from collections.abc import Callable

from mollifier.buffer import Buffer

CLAIM_MS = 15_000


class Election:
    """One process's part in it. `token` names the process; `monotonic` returns seconds.

    The claim runs on the server's clock, from when it was renewed there. Here it is reckoned from before that was asked for, so this
    process takes itself for deposed before another is elected.
    """

    def __init__(self, buffer: Buffer, token: str, monotonic: Callable[[], float], claim_ms: int = CLAIM_MS) -> None:
        self._buffer = buffer
        self._monotonic = monotonic
        self._claim_s = claim_ms / 1000
        self._renewed_at_s = -math.inf
        self.token = token

    @property
    def renewal_s(self) -> float:
        """How long to wait before the claim is renewed, or tried for, again: three tries for the life of one."""
        return self._claim_s / 3

    @property
    def is_ours(self) -> bool:
        """True as long as no other process can have been elected."""
        return self._monotonic() < self._renewed_at_s + self._claim_s

    async def holds(self) -> bool:
        """Tell whether this process is elected; the server is asked where that was not just done. Raises BufferUnavailableError."""
        now_s = self._monotonic()
        if now_s >= self._renewed_at_s + self.renewal_s:
            is_ours = await self._buffer.claim_sweep(self.token, int(self._claim_s * 1000))
            self._renewed_at_s = now_s if is_ours else -math.inf
        return self.is_ours

    def doubt(self) -> None:
        """Take this process for deposed until the server is asked again."""
        self._renewed_at_s = -math.inf

    async def resign(self) -> None:
        """Let another process be elected at once. Raises BufferUnavailableError."""
        if self.is_ours:
            self.doubt()
            await self._buffer.release_sweep(self.token)
