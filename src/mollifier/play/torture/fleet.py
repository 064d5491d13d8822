"""The API and worker processes of a torture: each has its place, where it is killed, frozen and started again."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from mollifier.processes import Child, Processes

_TURN_S = 0.2


class Place:
    """Where one process of the fleet runs. `start` starts one; whoever does something to it holds `lock`.

    `child` is None between its death and its next start.
    """

    def __init__(self, child: Child, start: Callable[[], Awaitable[Child]]) -> None:
        self.child: Child | None = child
        self.start = start
        self.lock = asyncio.Lock()


class Fleet:
    """The processes by kind, in order. `kills` counts those that were killed here."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.apis: list[Place] = []
        self.workers: list[Place] = []
        self.kills: Counter[str] = Counter()
        self._restarts: set[asyncio.Task[None]] = set()

    async def start(self, *, workers: int, apis: int) -> Sequence[str]:
        """Start so many of each; return the URLs of the API once every process of it is ready. Raises ProcessError."""
        for _ in range(workers):
            self.workers.append(Place(await self._processes.start_worker(), self._processes.start_worker))
        children = await self._processes.start_apis([0] * apis)
        urls = self._processes.api_urls
        for child, url in zip(children, urls, strict=True):
            self.apis.append(Place(child, self._starting_api(urlsplit(url).port or 0)))
        await self._processes.ready()
        return urls

    async def kill(self, place: Place, away_s: float) -> None:
        """Kill the process and start another one in its place after a while; returns once it is dead."""
        async with place.lock:
            if place.child is None:
                return
            child, place.child = place.child, None
            self.kills[child.name] += 1
            await self._processes.kill(child)
        restart = asyncio.create_task(self._start_again(place, away_s))
        self._restarts.add(restart)
        restart.add_done_callback(self._restarts.discard)

    async def freeze(self, place: Place, seconds: float) -> None:
        """Stop the process for a while, as a machine does that swaps or a virtual one that is moved."""
        async with place.lock:
            if place.child is None:
                return
            place.child.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                place.child.signal(signal.SIGCONT)

    async def complete(self) -> None:
        """Return when there is a process in every place."""
        await asyncio.gather(*tuple(self._restarts))
        await self._processes.ready()

    async def watch(self) -> NoReturn:
        """Wait for ever. Raises ProcessError as soon as a process ends that nobody here has killed."""
        while True:
            for place in (*self.apis, *self.workers):
                if place.child is not None and place.child.process.returncode is not None and not place.lock.locked():
                    raise place.child.failure()
            await asyncio.sleep(_TURN_S)

    def _starting_api(self, port: int) -> Callable[[], Coroutine[Any, Any, Child]]:
        async def start() -> Child:
            return await self._processes.start_api(port)

        return start

    async def _start_again(self, place: Place, away_s: float) -> None:
        await asyncio.sleep(away_s)
        async with place.lock:
            place.child = await place.start()
