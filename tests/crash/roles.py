"""What the processes of these tests are: an API, a worker that drains, and the heir of dead workers.

Each is forked from a parent that has imported everything already, which takes a hundredth of the time that a start takes. It hears its
orders over one end of a pipe and ends when the other end is closed.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from mollifier.drainer import Drainer
from mollifier.facade import Mollifier
from mollifier.http.app import create_app
from mollifier.http.server import ApiServer
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.worker import run_worker
from mollifier.settings import Settings
from mollifier.tasks import discover
from tests.core.observed import Observed
from tests.crash.points import Fault, Fuse

TASKS = "tests.crash.tasks"
Orders = Callable[..., object]

# What only the first application in a process has to work out is worked out before the fork.
create_app(Settings(database_url="postgresql://nowhere"))
gc.collect()
gc.freeze()


class Control:
    """This process's end of the pipe. An order is a method's name and its arguments; each is answered with what the method returns."""

    def __init__(self, pipe: Connection, log: Path) -> None:
        self._pipe = pipe
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for stream in (1, 2):
            os.dup2(output, stream)
        self.fuse = Fuse(lambda point: self.tell("reached", point))
        self.fuse.install()
        self.ending = asyncio.Event()

    def tell(self, what: str, value: object = None) -> None:
        """Tell the parent."""
        self._pipe.send((what, value))

    def listen(self, **others: Orders) -> None:
        """Obey from now on, within the running loop; besides `arm`, `passed` and `end` what `others` has."""
        orders = {"arm": self.fuse.arm, "passed": lambda: list(self.fuse.passed), **others}

        def obey() -> None:
            try:
                name, *arguments = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            if name == "end":
                self.ending.set()
                return
            answer = orders[name](*arguments)
            if inspect.isawaitable(answer):
                task = asyncio.ensure_future(answer)
                task.add_done_callback(lambda task: self.tell(name, task.result()))
            else:
                self.tell(name, answer)

        asyncio.get_running_loop().add_reader(self._pipe.fileno(), obey)

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Run to the end."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)


def api(pipe: Connection, log: Path, settings: Settings) -> None:
    """Serve the API; tell its URL when it is ready."""
    control = Control(pipe, log)

    async def serve() -> None:
        server = ApiServer(settings)
        control.listen()
        serving = asyncio.ensure_future(server.run_until_stopped(lambda url: control.tell("ready", url)))
        await control.ending.wait()
        server.should_exit = True
        await serving

    control.run(serve())


def worker(pipe: Connection, log: Path, settings: Settings, fault: Fault | None) -> None:
    """Drain; when it stops, tell how many entries were settled which way."""
    control = Control(pipe, log)

    async def work() -> None:
        observed = Observed()
        async with AsyncExitStack() as stack:
            drainer = await _drainer(settings, stack, observed)

            async def stop() -> dict[str, int]:
                await drainer.stop()
                counts = observed.points("mollifier.drain.entries")
                return {dict(labels)["outcome"]: int(count) for labels, count in counts.items()}

            control.listen(stop=stop)
            control.fuse.arm(fault)
            drainer.start()
            control.tell("ready")
            await control.ending.wait()
            await drainer.stop()

    control.run(work())


def heir(pipe: Connection, log: Path, each: Sequence[Settings]) -> None:
    """Drain one buffer per settings, and execute what is in their database."""
    control = Control(pipe, log)

    async def work() -> None:
        async with AsyncExitStack() as stack:
            control.listen()
            drainers = [await _drainer(settings, stack) for settings in each]
            for drainer in drainers:
                drainer.start()
            database = await stack.enter_async_context(Database(each[0].database_url or ""))
            executing = asyncio.create_task(run_worker(database, discover([TASKS]), stop=control.ending))
            control.tell("ready")
            await executing
            await asyncio.gather(*(drainer.stop() for drainer in drainers))

    control.run(work())


async def _drainer(settings: Settings, stack: AsyncExitStack, observed: Observed | None = None) -> Drainer:
    database = await stack.enter_async_context(Database(settings.database_url or "", pool_size=4))
    mollifier = Mollifier(
        settings,
        engine=PostgresRunEngine(database),
        tasks=PostgresTaskCatalog(database),
        telemetry=observed.telemetry if observed is not None else None,
    )
    stack.push_async_callback(mollifier.aclose)
    return mollifier.drainer()
