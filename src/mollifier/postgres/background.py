"""Loops beside the main work: each repeats one operation for as long as the process lives, whatever befalls it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mollifier.errors import EngineUnavailableError

_log = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]
T = TypeVar("T")
OUTAGE_PAUSE_MIN_S = 0.1
OUTAGE_PAUSE_MAX_S = 5.0


async def keep(
    operation: Callable[[], Awaitable[object]],
    *,
    what: str,
    every_s: float,
    first_after_s: float = 0.0,
    after_failure_s: float | None = None,
    sleep: Sleep = asyncio.sleep,
) -> None:
    """Repeat the operation until cancelled, waiting in between, longer or shorter after a failure if asked.

    A failure is logged when it begins and when it is over, not each time; `what` is what it calls the operation.
    """
    failing = False
    await sleep(first_after_s)
    while True:
        try:
            await operation()
        except Exception as error:  # noqa: BLE001 - the loop outlives every failure of its operation
            if not failing:
                known = isinstance(error, EngineUnavailableError)
                fields = {"operation": what, "error": str(error)}
                _log.warning("mollifier.failing", extra={"fields": fields}, exc_info=None if known else error)
            failing = True
            await sleep(every_s if after_failure_s is None else after_failure_s)
        else:
            if failing:
                _log.info("mollifier.recovered", extra={"fields": {"operation": what}})
            failing = False
            await sleep(every_s)


async def through_outage(operation: Callable[[], Awaitable[T]], *, what: str, sleep: Sleep = asyncio.sleep) -> T:
    """Repeat the operation until the database can be reached; return its result, or raise its other exceptions."""
    pause_s = OUTAGE_PAUSE_MIN_S
    while True:
        try:
            return await operation()
        except EngineUnavailableError as error:
            fields = {"operation": what, "error": str(error)}
            _log.warning("mollifier.waiting_for_database", extra={"fields": fields})
            await sleep(pause_s)
            pause_s = min(pause_s * 2, OUTAGE_PAUSE_MAX_S)


async def wind_up(
    task: asyncio.Task[object], *, busy: Callable[[], bool], timeout_s: float, again_s: float = 1.0
) -> bool:
    """Cancel the task and wait until it has ended, for `timeout_s` at most; return whether it has.

    Before Python 3.12 a cancellation that arrives together with a reply is lost in `asyncio.wait_for`, which every query waits in. So
    a task that has not ended is cancelled again every `again_s`, unless it is `busy` bringing its work to an end.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    task.cancel()
    while not task.done() and (left_s := deadline - loop.time()) > 0:
        await asyncio.wait((task,), timeout=min(again_s, left_s))
        if not task.done() and not busy():
            task.cancel()
    return task.done()
