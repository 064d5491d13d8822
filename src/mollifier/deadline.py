"""Asking somebody who may not answer: a deadline that measures who is asked, not this process, and a breaker that stops asking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from mollifier.backoff import Backoff
from mollifier.circuit import Circuit, Question, State
from mollifier.errors import BufferNotAskedError, BufferRefusedError

T = TypeVar("T")

_SLICES = 5
_LATE_MS = 2
_LEAST_WEIGHT = 0.05
PAUSES_MS = (200, 1_000)
"""The first and the longest pause of a breaker before it finds out whether there are answers again."""


async def within(deadline_ms: float, operation: Awaitable[T]) -> T:
    """Await the operation for at most `deadline_ms`; raise TimeoutError, the operation cancelled, after that.

    A plain timeout counts the time that the event loop was too busy to read a reply which had long arrived, or to send the question.
    Here the deadline is spent in slices, and of each counts what its thread did not compute in, for that long somebody was waited for. A
    slice that ends late was at other work in one piece, computing or not. Each counts for a twentieth at least: a healthy server is not
    blamed for a busy process, and one that hangs is still given up when the process never rests.
    Where the loop's time is not the real one, the loop says how long it has computed (`computed_s()`, in seconds).
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
        self._computed_s: Callable[[], float] = getattr(self._loop, "computed_s", time.thread_time)
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
        self._began_s, self._had_computed_s = self._loop.time(), self._computed_s()
        # The last one is as long as what is left.
        self._length_s = self._slice_s * min(1.0, _SLICES - self._spent)
        self._timer = self._loop.call_later(self._length_s, self._end)

    def _end(self) -> None:
        passed_s, computed_s = self._loop.time() - self._began_s, self._computed_s() - self._had_computed_s
        is_late = passed_s > self._length_s + _LATE_MS / 1000
        waited = 0.0 if is_late else min(1.0, (passed_s - computed_s) / self._slice_s)
        self._spent += max(_LEAST_WEIGHT, waited)
        # What is left counts for less than any slice does: it is not worth a timer.
        if self._spent + _LEAST_WEIGHT < _SLICES:
            self._begin()
        else:
            self.stop()


class Breaker:
    """Stops asking a server that does not answer, so that nobody waits for a deadline that will pass anyway.

    Its `circuit` says when; by default after five failures in a row, for a fifth of a second that doubles up to a second. An error
    is an answer where the server gave it (BufferRefusedError).

    With a `probe`, no question finds out whether the server answers again: the first that is refused after the pause has the probe asked
    beside it, and waits for nothing. Without one, that question itself is asked. `behind` is a breaker with a probe whose refusals hold
    here, too, for these questions have the same server to ask, and more patience.
    """

    def __init__(
        self,
        circuit: Circuit | None = None,
        *,
        probe: Callable[[], Awaitable[object]] | None = None,
        behind: Breaker | None = None,
    ) -> None:
        self._circuit = circuit or Circuit(Backoff(*PAUSES_MS))
        self._probe = probe
        self.behind = behind
        self._probing: asyncio.Task[None] | None = None

    @property
    def on_trial(self) -> bool:
        """True while nothing but the probe tells that there are answers again."""
        return self._circuit.on_trial

    def admits(self) -> bool:
        """Tell whether a question would be asked now; where the answer is no, see to it that it will be yes again."""
        if self.behind is not None and not self.behind.admits():
            return False
        if self._probe is None or self._circuit.state is not State.OPEN:
            return self._circuit.room() > 0
        if self._circuit.room() > 0:
            self._probing = asyncio.create_task(
                self._find_out(self._probe, self._circuit.ask()), name="mollifier-probe"
            )
        return False

    async def ask(self, question: Callable[[], Awaitable[T]], *, is_answer: Callable[[T], bool] = lambda _: True) -> T:
        """Ask and return the answer, or what is none although it came back, as `is_answer` tells.

        Raises what the question raises, and BufferNotAskedError when it is not asked.
        """
        if not self.admits():
            raise BufferNotAskedError("not asked: it has given no answers of late")
        asked = self._circuit.ask()
        try:
            answer = await question()
        except BufferRefusedError:
            asked.answered()
            raise
        except Exception:
            asked.failed()
            raise
        else:
            if is_answer(answer):
                asked.answered()
            else:
                asked.failed()
            return answer
        finally:
            # Cancelled, it has told nothing.
            asked.dropped()

    def close(self) -> None:
        """Give up finding out."""
        if self._probing is not None:
            self._probing.cancel()

    async def _find_out(self, probe: Callable[[], Awaitable[object]], asked: Question) -> None:
        try:
            await probe()
        except Exception:  # noqa: BLE001 - whatever is wrong, it does not answer
            asked.failed()
        else:
            asked.answered()
        finally:
            asked.dropped()


def forget(task: asyncio.Future[Any]) -> None:
    """Take note of how an operation ended that nobody waits for any more, or asyncio complains of its unread exception: a done callback."""
    if not task.cancelled():
        task.exception()
