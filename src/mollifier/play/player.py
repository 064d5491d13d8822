"""The open-loop player: a call leaves at its own time, whatever became of the calls before it.

A closed loop (so many workers, each waiting for its answer) slows down with the system under test and so hides exactly the bursts
that are to be seen. Here nothing waits for an answer; how late calls leave is measured, so that a player that cannot keep up shows.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

READ_AHEAD_CALLS = 2000
_SLICE_CALLS = 20
_SLACK_S = 0.005


class Timed(Protocol):
    """Anything with a moment to leave at, in seconds since the start of the play."""

    @property
    def at_s(self) -> float:
        """Seconds since the start of the play."""
        ...


C = TypeVar("C", bound=Timed)


class Player(Generic[C]):
    """Plays calls in order: `send` is started for each at its time or as soon after as the loop allows, never before.

    `lags_s` has how late each left. Calls are read ahead while there is time to spare, so that making them does not delay them.
    """

    def __init__(
        self,
        send: Callable[[C], Coroutine[Any, Any, None]],
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._send = send
        self._clock = clock
        self._sleep = sleep
        self.lags_s = array("d")

    async def play(self, calls: Iterable[C]) -> None:
        """Play all calls and wait for the last answer. Calls that are in flight when this is cancelled are cancelled too."""
        source = iter(calls)
        ahead = deque[C]()
        _read(source, ahead, READ_AHEAD_CALLS)
        start_s = self._clock()
        async with asyncio.TaskGroup() as in_flight:
            while ahead or _read(source, ahead, 1):
                due_s = start_s + ahead[0].at_s
                while (wait_s := due_s - self._clock()) > 0:
                    if wait_s > _SLACK_S and len(ahead) < READ_AHEAD_CALLS and _read(source, ahead, _SLICE_CALLS):
                        continue
                    await self._sleep(wait_s)
                self.lags_s.append(self._clock() - due_s)
                in_flight.create_task(self._send(ahead.popleft()))
                await self._sleep(0)


def _read(source: Iterator[C], ahead: deque[C], calls: int) -> bool:
    """Read up to so many more calls; tell whether there was one."""
    before = len(ahead)
    for call in source:
        ahead.append(call)
        calls -= 1
        if calls == 0:
            break
    return len(ahead) > before
