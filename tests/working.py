"""A worker that runs in the test's own process and loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from mollifier.drainer import Drainer
from mollifier.settings import Settings
from mollifier.worker import run_worker_process


class Working:
    """A worker that runs in this process: its drainer, if it has one, once it has started."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.drainer: Drainer | None = None

    def on_start(self, drainer: Drainer | None) -> None:
        self.drainer = drainer
        self.started.set()


@asynccontextmanager
async def working(settings: Settings, **observed: Any) -> AsyncGenerator[Working]:
    worker, stop = Working(), asyncio.Event()
    running = asyncio.create_task(run_worker_process(settings, on_start=worker.on_start, stop=stop, **observed))
    started = asyncio.create_task(worker.started.wait())
    try:
        await asyncio.wait((running, started), timeout=20, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        yield worker
    finally:
        started.cancel()
        stop.set()
        await asyncio.wait_for(running, 20)
