"""How fuzz tests run: histories one after another, each from a seed of its own that replays it.

`MOLLIFIER_FUZZ_SECONDS` is how long to go on, over all tests of the core; `MOLLIFIER_FUZZ_SEED` is where to begin. A failure names the seed of
its history: with that one and no seconds, the very history runs again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Awaitable, Callable

TESTS = 2


async def fuzz(play: Callable[[random.Random], Awaitable[None]]) -> int:
    """Play histories until the time is over, one at least; return how many."""
    seconds = float(os.environ.get("MOLLIFIER_FUZZ_SECONDS", "5")) / TESTS
    first = int(os.environ.get("MOLLIFIER_FUZZ_SEED") or random.randrange(2**32))
    print(f"from MOLLIFIER_FUZZ_SEED={first}")  # noqa: T201 - what a failing test has printed is shown
    ends = time.monotonic() + seconds
    seed = first
    while True:
        try:
            await play(random.Random(seed))
        except BaseException as error:
            error.add_note(f"replay this history: MOLLIFIER_FUZZ_SEED={seed} MOLLIFIER_FUZZ_SECONDS=0 make fuzz")
            raise
        seed += 1
        if time.monotonic() >= ends:
            return seed - first
