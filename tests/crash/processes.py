"""Processes of these tests, seen from the test that starts them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.crash import roles
from tests.crash.points import Fault

TIMEOUT_S = 60.0
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([roles.__name__])


class ChildError(AssertionError):
    """A process did not do what it was to do; the message has the end of its log."""


class Child:
    """One process. `reached` has the name of the point at which it died or stopped, once it did."""

    def __init__(self, role: Callable[..., None], log: Path, *arguments: object) -> None:
        self._log = log
        self._pipe, theirs = _forks.Pipe()
        self.process = _forks.Process(target=role, args=(theirs, log, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.reached: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers: dict[str, asyncio.Future[Any]] = {}
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._hear)

    async def ready(self) -> Any:
        """Wait until it is; return what it told of itself."""
        return await self._answer("ready")

    async def arm(self, fault: Fault | None) -> None:
        """Have it die or stop at a point from now on."""
        await self.ask("arm", fault)

    async def ask(self, order: str, *arguments: object) -> Any:
        """Give an order and return its answer."""
        self._pipe.send((order, *arguments))
        return await self._answer(order)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    async def comes_to_its_point(self) -> None:
        """Wait until it dies or stops where it was to."""
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.wait({self.reached, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        if not self.reached.done():
            raise self.failure(f"ended with exit code {self.ended.result()}, not where it was to")

    async def end(self, *, in_order: bool = False) -> int:
        """Wait for its end, which it is told to come to where that is to be `in_order`; return its exit code, a signal's negative."""
        if in_order and not self.ended.done():
            self._pipe.send(("end",))
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.shield(self.ended)

    def failure(self, detail: str) -> ChildError:
        """Return the error that says so."""
        tail = self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""
        return ChildError(f"{self.process.name} {detail}; the end of its log:\n{tail}")

    async def close(self) -> None:
        """End it whatever it is at."""
        if not self.ended.done():
            self.process.kill()
            await self.end()

    async def _answer(self, what: str) -> Any:
        answer = self._answers.setdefault(what, asyncio.get_running_loop().create_future())
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.wait({answer, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise self.failure(f"ended with exit code {self.ended.result()} before it answered {what!r}")
        del self._answers[what]
        return answer.result()

    def _hear(self) -> None:
        try:
            what, value = self._pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._pipe.close()
            # The kernel closed the other end, so the process is gone, or about to be.
            self.process.join(TIMEOUT_S)
            self.ended.set_result(self.process.exitcode or 0)
            return
        if what == "reached":
            self.reached.set_result(value)
        else:
            answer = self._answers.setdefault(what, asyncio.get_running_loop().create_future())
            answer.set_result(value)


@asynccontextmanager
async def child(role: Callable[..., None], log: Path, *arguments: object) -> AsyncGenerator[Child]:
    """Run a process; it does not outlive the block."""
    one = Child(role, log, *arguments)
    try:
        yield one
    finally:
        with suppress(ProcessLookupError):
            await one.close()
