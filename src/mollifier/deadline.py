"""Deadlines that measure the server, not this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

_SLICES = 5


async def within(deadline_ms: float, operation: Awaitable[T]) -> T:
    """Await the operation for at most `deadline_ms`; raise TimeoutError, the operation cancelled, after that.

    A plain timeout counts the time that the event loop was too busy to read a reply which had long arrived. Here the deadline is
    spent in slices, each of which ends on a turn of the loop: however late a slice ends, it counts for its own length only, and
    the loop reads its sockets before the next one starts. A healthy server is thus never blamed for a busy process.
    """
    task = asyncio.ensure_future(operation)
    try:
        for _ in range(_SLICES):
            done, _ = await asyncio.wait((task,), timeout=deadline_ms / 1000 / _SLICES)
            if done:
                return task.result()
        raise TimeoutError(f"no answer within {deadline_ms:g} ms")
    finally:
        if not task.done():
            task.cancel()
