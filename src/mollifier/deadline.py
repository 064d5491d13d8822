"""Asking somebody who may not answer: a deadline that measures who is asked, not this process, and a breaker that stops asking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from mollifier.errors import BufferUnavailableError

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
    over = asyncio.get_running_loop().create_future()
    # Callbacks, not awaits: the caller's whole chain of coroutines would else be walked at the end of each slice.
    slices = _Slices(deadline_ms / 1000 / _SLICES, over)
    task.add_done_callback(slices.stop)
    try:
        await over
        if not task.done():
            raise TimeoutError(f"no answer within {deadline_ms:g} ms")
        if task.cancelled():
            raise TimeoutError("cancelled before it had an answer")
        return task.result()
    finally:
        slices.stop()
        if not task.done():
            task.add_done_callback(forget)
            task.cancel()


class _Slices:
    """Spends a deadline slice by slice; `over` is done when it is spent, or stopped."""

    def __init__(self, slice_s: float, over: asyncio.Future[None]) -> None:
        self._loop = over.get_loop()
        self._slice_s = slice_s
        self._over = over
        self._spent = 0.0
        self._begin()

    def stop(self, _: object = None) -> None:
        """Spend no more."""
        self._timer.cancel()
        if not self._over.done():
            self._over.set_result(None)

    def _begin(self) -> None:
        self._began_s = self._loop.time()
        self._timer = self._loop.call_later(self._slice_s, self._end)

    def _end(self) -> None:
        late = self._loop.time() - self._began_s - self._slice_s > _LATE_MS / 1000
        self._spent += _LATE_WEIGHT if late else 1
        if self._spent < _SLICES:
            self._begin()
        else:
            self.stop()


class Breaker:
    """Stops asking a server that does not answer, so that nobody waits for a deadline that will pass anyway.

    So many `failures` in a row open it. Open, it lets one question through every `open_s` seconds to find out, and refuses the rest
    at once; an answer closes it. Closed, open, half open: Nygard, "Release It!". `monotonic` returns seconds.
    """

    def __init__(
        self, *, failures: int = 5, open_s: float = 1.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_failures = failures
        self._open_s = open_s
        self._monotonic = monotonic
        self._failures = 0
        self._next_question_s = 0.0

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Ask and return the answer. Raises what the question raises, and BufferUnavailableError when it is not asked."""
        if self._failures >= self._most_failures:
            now_s = self._monotonic()
            if now_s < self._next_question_s:
                raise BufferUnavailableError(f"not asked: {self._failures} questions in a row had no answer")
            self._next_question_s = now_s + self._open_s
        try:
            answer = await question()
        except Exception:
            self._failures += 1
            self._next_question_s = self._monotonic() + self._open_s
            raise
        self._failures = 0
        return answer


def forget(task: asyncio.Future[Any]) -> None:
    """Take note of how an operation ended that nobody waits for any more, or asyncio complains of its unread exception: a done callback."""
    if not task.cancelled():
        task.exception()
