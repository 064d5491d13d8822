"""4. Handling: what a drainer is given to do with entries, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from mollifier.errors import NonRetryableError
from mollifier.model import Entry

Outcome = BaseException | None
"""What became of one entry: None when it was handled, otherwise why not."""

Handler = Callable[[Sequence[Entry]], Awaitable[Sequence[Outcome]]]
"""Handles entries of one environment, oldest first; returns one outcome each, in order. Raising speaks for all of them."""

GiveUp = Callable[[Entry, BaseException], Awaitable[bool]]
"""Makes an entry's failure visible elsewhere, so that the entry can go; False when it must stay as failed.

Raises EngineUnavailableError when that cannot be told now: the entry then comes back, and its failure is no attempt.
"""


async def outcomes_of(handler: Handler, entries: Sequence[Entry]) -> Sequence[Outcome]:
    """Have the entries handled; one outcome each, whatever the handler raises or answers."""
    try:
        outcomes = list(await handler(entries))
    except asyncio.CancelledError as error:
        # Cancelled from outside, this task ends; a handler in which something else was cancelled has merely failed.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return [error] * len(entries)
    except Exception as error:  # noqa: BLE001 - whatever a handler raises is an outcome
        return [error] * len(entries)
    if len(outcomes) != len(entries):
        mismatch = NonRetryableError(f"the handler answered {len(outcomes)} outcomes for {len(entries)} entries")
        return [mismatch] * len(entries)
    return outcomes
