"""Tasks for worker processes that tests start and kill."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mollifier.tasks import TaskContext


async def wait_for_second_attempt(payload: str, context: TaskContext) -> int:
    """Say in the file that the attempt has begun; the first never ends."""
    with Path(payload).open("a") as file:
        file.write(f"{context.attempt}\n")
    if context.attempt == 1:
        await asyncio.sleep(3600)
    return context.attempt
