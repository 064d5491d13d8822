"""API and worker processes on an embedded stack: the same commands that an operator runs, started, watched and stopped here.

They never outlive this process (see `_child.py`), and a signal from the terminal reaches this process alone, so that it stops them in
order: first the API, which takes work in, then the worker, then the servers.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import aiohttp
import uvloop
from sqlalchemy import func, select

from mollifier.child_environment import ChildEnvironment
from mollifier.embedded import Stack
from mollifier.errors import MollifierError, SettingsError
from mollifier.postgres.database import Database
from mollifier.postgres.tables import tasks
from mollifier.rollout import Mode

HOST = "127.0.0.1"
START_S = 60.0
STOP_S = 40.0
_TURN_S = 0.05
_TAIL_BYTES = 4000
_OK = 200
_SIGNALLED = 128
T = TypeVar("T")


class ProcessError(MollifierError):
    """A process ended that should be running, or did not get ready; `tail` is the end of what it wrote."""

    def __init__(self, detail: str, tail: str = "") -> None:
        super().__init__(detail)
        self.tail = tail


@dataclass
class Child:
    """One process of ours. `lifeline` is the end of the pipe that keeps it alive."""

    name: str
    process: asyncio.subprocess.Process
    output: Path
    lifeline: int = field(repr=False)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def first_line(self) -> bytes:
        """Return the first line that it writes to its standard output. Raises ProcessError when it ends without one."""
        assert self.process.stdout is not None  # noqa: S101 - a pipe was asked for
        line = await self.process.stdout.readline()
        if not line:
            await self.process.wait()
            raise self.failure()
        return line

    def tail(self) -> str:
        """Return the end of what it wrote to its standard error."""
        with suppress(OSError), self.output.open("rb") as file:
            file.seek(max(0, self.output.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
        return ""

    def failure(self) -> ProcessError:
        """Return the error that says how it ended."""
        code = self.process.returncode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return ProcessError(
            f"the {self.name} process ended {how}; the end of its log is above ({self.output})", self.tail()
        )


class Processes:
    """The running processes. `api_urls` are those of the API, in order."""

    def __init__(self, environment: Mapping[str, str], output: Path) -> None:
        self._environment = environment
        self._output = output
        self._children: list[Child] = []
        self.api_urls: list[str] = []

    async def start_apis(self, ports: Sequence[int]) -> Sequence[Child]:
        """Start one API process on each port, a free one for 0; they listen then, but may not be ready yet."""
        children = [await self.start_api(port) for port in ports]
        for child in children:
            line = await self.alongside(child.first_line(), START_S, "the API process did not say where it listens")
            self.api_urls.append(json.loads(line)["url"])
        return children

    async def start_api(self, port: int) -> Child:
        """Start one API process; its first line says when it listens."""
        return await self._start("api", "serve", "--host", HOST, "--json", "--port", str(port))

    async def start_worker(self) -> Child:
        """Start one worker process."""
        return await self._start("worker", "worker")

    async def kill(self, child: Child) -> None:
        """Send SIGKILL to one, and wait until it is gone. Nobody watches it from then on."""
        self._children.remove(child)
        try:
            child.signal(signal.SIGKILL)
            await child.process.wait()
        finally:
            os.close(child.lifeline)

    async def ready(self) -> None:
        """Return when every API process says that it is. Raises ProcessError when one ends or does not get there in time."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            for url in self.api_urls:
                await self.alongside(_until_ready(session, url), START_S, f"the API at {url} did not get ready")

    async def tasks_recorded(self, database: Database) -> None:
        """Return when a worker has recorded its tasks: before that every trigger is a 404. Raises ProcessError as `ready` does."""
        await self.alongside(_until_recorded(database), START_S, "the worker did not record its tasks")

    async def alongside(self, work: Coroutine[Any, Any, T], limit_s: float | None = None, failure: str = "") -> T:
        """Do the work while the processes run. Raises ProcessError as soon as one ends, and with `failure` when the time is up."""
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(self.watch())
        try:
            done, _ = await asyncio.wait((working, watching), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise ProcessError(
                    f"{failure} within {limit_s:g} s; the end of the log is above ({self._output})", self._tail()
                )
            return await (working if working in done else watching)
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def watch(self) -> NoReturn:
        """Wait for ever. Raises ProcessError as soon as one of the processes ends."""
        ends = {asyncio.ensure_future(child.process.wait()): child for child in self._children}
        try:
            ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        raise ends[ended.pop()].failure()

    async def stop(self) -> None:
        """Stop all of them, in the order of their start reversed; by force what takes too long."""
        for child in reversed(self._children):
            await _stop(child)
        self._children.clear()

    async def _start(self, name: str, *command: str) -> Child:
        reading, writing = os.pipe()
        try:
            with self._output.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "mollifier._child",
                    str(reading),
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE if "--json" in command else output,
                    stderr=output,
                    env=dict(self._environment),
                    pass_fds=(reading,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        child = Child(name, process, self._output, writing)
        self._children.append(child)
        return child

    def _tail(self) -> str:
        return self._children[0].tail() if self._children else ""


@asynccontextmanager
async def running(
    stack: Stack, environment: ChildEnvironment, *, admin_token: str, output: Path, ports: Sequence[int]
) -> AsyncGenerator[Processes]:
    """Run one worker and one API process per port until the block is left. Raises ProcessError when one does not get ready."""
    variables = environment.on(redis_url=stack.redis_url, database_url=stack.database_url, admin_token=admin_token)
    processes = Processes(variables, output)
    async with AsyncExitStack() as at_end:
        at_end.push_async_callback(processes.stop)
        await processes.start_worker()
        await processes.start_apis(ports)
        await processes.ready()
        yield processes


def child_environment(asked: Mode | None, defaults: Mapping[str, str] | None = None) -> ChildEnvironment:
    """Return what this process's own environment and the mode that was asked for make. Raises SettingsError."""
    return ChildEnvironment(os.environ, asked, defaults)


def check_port(port: int) -> int:
    """Return the port. Raises SettingsError when it cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            detail = (
                f"{port} on {HOST} cannot be used ({error.strerror}): choose another one, or 0 for any that is free"
            )
            raise SettingsError("--port", detail) from error
    return port


async def _until_ready(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        with suppress(aiohttp.ClientError, OSError):
            async with session.get(f"{url}/readyz") as response:
                if response.status == _OK:
                    return
        await asyncio.sleep(_TURN_S)


async def _until_recorded(database: Database) -> None:
    while True:
        async with database.statement() as connection:
            if (await connection.execute(select(func.count()).select_from(tasks))).scalar_one():
                return
        await asyncio.sleep(_TURN_S)


async def _stop(child: Child) -> None:
    try:
        with suppress(ProcessLookupError):
            child.process.terminate()
        async with asyncio.timeout(STOP_S):
            await child.process.wait()
    except (TimeoutError, asyncio.CancelledError) as error:
        with suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
    finally:
        os.close(child.lifeline)


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run until it returns its exit code. The first signal that asks to stop cancels it, so that it cleans up; the second ends it at once."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_until_signal(main))


async def _until_signal(main: Coroutine[Any, Any, int]) -> int:
    task, received = asyncio.ensure_future(main), list[signal.Signals]()

    def stop(number: signal.Signals) -> None:
        if received:
            os._exit(_SIGNALLED + number)
        received.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        return _SIGNALLED + received[0]
