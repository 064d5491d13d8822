"""Waiting for a system to get somewhere, for as long as it moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

INTERVAL_S = 0.1
T = TypeVar("T")


async def until(
    look: Callable[[], Awaitable[T]],
    is_done: Callable[[T], bool],
    patience_s: Callable[[T], float],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """Look until it is done, or until what is seen has not changed for as long as `patience_s` says; return what was seen last."""
    seen, changed_s = await look(), clock()
    while not is_done(seen) and clock() - changed_s < patience_s(seen):
        await sleep(INTERVAL_S)
        now = await look()
        if now != seen:
            seen, changed_s = now, clock()
    return seen
