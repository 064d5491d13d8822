"""Deadlines that measure who is asked, not this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

_SLICES = 5
_LATE_MS = 2
_LATE_WEIGHT = 0.05


async def within(deadline_ms: float, operation: Awaitable[T]) -> T:
    """Await the operation for at most `deadline_ms`; raise TimeoutError, the operation cancelled, after that.

    A plain timeout counts the time that the event loop was too busy to read a reply which had long arrived, or to send the question.
    Here the deadline is spent in slices. A slice that ends late tells that the loop was at other work meanwhile, so it counts for a
    twentieth: a healthy server is not blamed for a busy process, and one that hangs is still given up when the process never rests.
    An operation that was cancelled by somebody else has no answer either: that too is a TimeoutError.
    """
    task = asyncio.ensure_future(operation)
    loop = asyncio.get_running_loop()
    slice_s = deadline_ms / 1000 / _SLICES
    spent = 0.0
    try:
        while spent < _SLICES:
            started_s = loop.time()
            done, _ = await asyncio.wait((task,), timeout=slice_s)
            if done:
                if task.cancelled():
                    raise TimeoutError("cancelled before it had an answer")
                return task.result()
            late = loop.time() - started_s - slice_s > _LATE_MS / 1000
            spent += _LATE_WEIGHT if late else 1
        raise TimeoutError(f"no answer within {deadline_ms:g} ms")
    finally:
        if not task.done():
            task.add_done_callback(_forget)
            task.cancel()


def _forget(task: asyncio.Future[Any]) -> None:
    """Take note of how an operation ended that nobody waits for any more, or asyncio complains of its unread exception."""
    if not task.cancelled():
        task.exception()
