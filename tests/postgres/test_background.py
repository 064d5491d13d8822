"""Loops beside the main work, and how work is brought to an end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from mollifier.postgres.background import wind_up


async def losing(cancellations: int) -> None:
    """Go on for ever, losing so many cancellations on the way."""
    for _ in range(cancellations):
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    await asyncio.Event().wait()


async def started(cancellations: int) -> asyncio.Task[None]:
    task = asyncio.create_task(losing(cancellations))
    await asyncio.sleep(0)
    return task


async def test_work_that_loses_a_cancellation_is_cancelled_again() -> None:
    task = await started(2)

    ended = await wind_up(task, busy=lambda: False, timeout_s=20, again_s=0.001)

    assert ended
    assert task.cancelled()


async def test_work_that_is_busy_is_cancelled_once_and_left_behind_at_the_deadline() -> None:
    task = await started(1)

    ended = await wind_up(task, busy=lambda: True, timeout_s=0.05, again_s=0.001)

    assert not ended
    assert task.cancelling() == 1
    task.cancel()
