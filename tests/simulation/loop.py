"""An event loop whose time is a number: nobody sleeps, nothing is read or written, and chance decides who goes first.

Asyncio's own tasks, futures, events and timeouts run on it unchanged. Time stands still while anything can be done, then jumps to the
next timer. A seed that decides the order of what is ready at one moment explores interleavings; without one the order is that of
asyncio, first come, first served.

Callbacks belong to whoever was the `owner` in the context they were made in. What belongs to a frozen owner is kept until it thaws:
a process that is stopped does nothing, and one that is dead does nothing ever again, no `finally` of its either.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Choose = Callable[[int], int]
"""Takes how many there are and returns the place of the one to go next."""


class Call:
    """One callback to come; the loop's handle for it."""

    __slots__ = ("_cancelled", "args", "callback", "context", "when_s")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context, when_s: float) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.when_s = when_s
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self.when_s


class Owner(Protocol):
    """Whose code a callback runs; while it is frozen, its callbacks go to `kept`."""

    frozen: bool
    kept: list[Call]


owner: ContextVar[Owner | None] = ContextVar("owner", default=None)


class StandstillError(RuntimeError):
    """Nothing is left to happen, and what was waited for has not."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs one coroutine to its end in virtual time, which begins at 0 seconds."""

    def __init__(self, choose: Choose | None = None) -> None:
        self._choose = choose
        self._now_s = 0.0
        self._ready: deque[Call] = deque()
        self._timers: list[tuple[float, int, Call]] = []
        self._numbers = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self._outside = Context()
        self.failure: BaseException | None = None

    def computed_s(self) -> float:
        """Return how long this has computed: no virtual time passes meanwhile."""
        return 0.0

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine to its end. Raises what it raises, and `failure` as soon as somebody has set it."""
        with _Running(self):
            task = self.create_task(main)
            while not task.done():
                if not self._turn():
                    raise StandstillError(f"at {self._now_s:.6f} s")
                if self.failure is not None:
                    raise self.failure
            return task.result()

    def unwind(self) -> None:
        """Cancel everything that is left and let it end: nothing that was begun is left to the garbage collector.

        Owners must have thawed. A task that does not end of it is given up.
        """
        with _Running(self):
            for _ in range(20):
                left = [task for task in self._tasks if not task.done()]
                if not left:
                    return
                for task in left:
                    task.cancel()
                while self._ready:
                    self._turn()

    def thaw(self, one: Owner) -> None:
        """Have a frozen owner go on."""
        one.frozen = False
        self._ready.extend(one.kept)
        one.kept.clear()

    def outside(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> None:
        """Call something after a while that is nobody's, and cannot be frozen."""
        self.call_at(self._now_s + delay_s, callback, *args, context=self._outside)

    def _turn(self) -> bool:
        """Run one callback; False when there is none."""
        ready = self._ready
        if not ready and not self._wake():
            return False
        if self._choose is not None and len(ready) > 1:
            ready.rotate(-self._choose(len(ready)))
        call = ready.popleft()
        if not call.cancelled():
            whose = call.context.get(owner)
            if whose is not None and whose.frozen:
                whose.kept.append(call)
            else:
                call.context.run(call.callback, *call.args)
        return True

    def _wake(self) -> bool:
        """Let the next moment come, with everything that it has; False when there is none."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers:
            return False
        self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            self._ready.append(heapq.heappop(timers)[2])
        return True

    # --- what asyncio asks of a loop -------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now_s

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        call = Call(callback, args, copy_context() if context is None else context, self._now_s)
        self._ready.append(call)
        return call

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        call = Call(callback, args, copy_context() if context is None else context, when)
        self._numbers += 1
        heapq.heappush(self._timers, (when, self._numbers, call))
        return call

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: Context | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context, **options)
        self._tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failure = self.failure or context.get("exception") or RuntimeError(str(context.get("message")))

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False


class _Running:
    """Makes the loop the running one of this thread."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        asyncio._set_running_loop(self._loop)  # pyright: ignore[reportPrivateUsage] - it is there for those who write loops

    def __exit__(self, *_: object) -> None:
        asyncio._set_running_loop(None)  # pyright: ignore[reportPrivateUsage] - as above
