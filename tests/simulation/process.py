"""One process of the system: an API, or a worker with its drainer, on its own clock. It can be killed, stopped, and go on.

What runs in it is the production code, joined as `Mollifier` joins it; only the client of the buffer's server, the engine, the clocks and
chance are the simulation's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context, copy_context
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from typing import Any, TypeVar

from mollifier.drainer import Drainer
from mollifier.facade import Mollifier
from mollifier.settings import Settings
from mollifier.sweeper import Sweeper
from tests.core.engines import AnyTask
from tests.simulation.engine import SimulatedEngine
from tests.simulation.history import Call as Request
from tests.simulation.history import current_call
from tests.simulation.loop import Call, VirtualLoop, owner
from tests.simulation.network import Cut
from tests.simulation.server import START_US, Client
from tests.simulation.telemetry import Told

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Process:
    """A process from its start to its death. `skew_us` is how far its wall clock is ahead of the buffer server's."""

    def __init__(
        self,
        name: str,
        loop: VirtualLoop,
        *,
        settings: Settings,
        skew_us: int,
        seed: int,
        make: Callable[[Process], Mollifier],
        on_made: Callable[[Request, str], None],
    ) -> None:
        self.name = name
        self.settings = settings
        self.frozen = False
        self.kept: list[Call] = []
        self.is_dead = False
        self.stops = 0
        self.died_at_s: float | None = None
        self.drains_since_s: float | None = None
        """Since when it has been at work as a drainer without a pause; None while it is not."""
        self._loop = loop
        self._skew_us = skew_us
        self._chance = Random(seed)
        self._on_made = on_made
        self._numbers = 0
        self._is_ending = False
        self._open: list[tuple[Request, asyncio.Future[Any]]] = []
        self._context = copy_context()
        self._context.run(owner.set, self)
        self.mollifier: Mollifier = self._context.run(make, self)
        self.drainer: Drainer | None = None
        self._sweeper: Sweeper | None = None

    def clock(self) -> datetime:
        """Return what this process takes for the moment."""
        return _EPOCH + timedelta(microseconds=START_US + int(self._loop.time() * 1_000_000) + self._skew_us)

    def monotonic(self) -> float:
        return self._loop.time()

    # --- living ----------------------------------------------------------------------------------------------------

    def drain(self, *, sweeps: bool) -> None:
        """Start the drainer, and the sweeper if it sweeps."""
        self.drainer = self.mollifier.drainer()
        self._context.copy().run(self.drainer.start)
        self.drains_since_s = self._loop.time()
        if sweeps:
            self._sweeper = self.mollifier.sweeper()
            self._context.copy().run(self._sweeper.start)

    def end(self, within_ms: int) -> asyncio.Task[Any] | None:
        """Stop draining, with some time for what is at hand; return what ends when that is done."""
        drainer = self.drainer
        if drainer is None or not drainer.running or self.frozen:
            return None
        self._is_ending, self.drains_since_s = True, None
        if self._sweeper is not None:
            self._loop.create_task(self._sweeper.stop(), context=self._context.copy())
        return self._loop.create_task(drainer.stop(within_ms), context=self._context.copy())

    def kill(self) -> None:
        """Die: nothing more is done, and whoever waits for an answer sees the connection break."""
        if not self.is_dead:
            self.died_at_s = self._loop.time()
        self.is_dead = self.frozen = True
        self.drains_since_s = None
        for _, answer in self._open:
            if not answer.done():
                answer.set_exception(Cut("the process died"))

    def stop(self) -> None:
        """Do nothing until `go_on`; what comes up meanwhile waits."""
        self.frozen = True
        self.drains_since_s = None
        self.stops += 1
        for request, _ in self._open:
            request.was_stopped = True

    def go_on(self) -> None:
        if not self.is_dead:
            if self.frozen and self.drainer is not None and not self._is_ending:
                self.drains_since_s = self._loop.time()
            self._loop.thaw(self)

    # --- serving ---------------------------------------------------------------------------------------------------

    async def serve(
        self, request: Request, patience_s: float, way_s: float, operation: Callable[[Mollifier], Awaitable[T]]
    ) -> T:
        """Serve a request from afar. Raises Cut when the process dies, TimeoutError when it takes too long for its caller.

        A caller that gives up is noticed, sometimes: the request is then cancelled wherever it is.
        """
        answer = self._loop.create_future()
        mine = request, answer
        self._open.append(mine)
        request.was_stopped = self.frozen
        context = self._context.copy()
        context.run(current_call.set, request)
        if self.is_dead:
            raise Cut("nobody listens")
        self._loop.call_later(way_s, self._begin, request, answer, way_s, operation, context=context)
        try:
            async with asyncio.timeout(patience_s):
                return await answer
        finally:
            self._open.remove(mine)

    def _begin(
        self,
        request: Request,
        answer: asyncio.Future[Any],
        way_s: float,
        operation: Callable[[Mollifier], Awaitable[Any]],
    ) -> None:
        async def work() -> Any:
            return await operation(self.mollifier)

        task = self._loop.create_task(work())
        outside = Context()

        def answered(task: asyncio.Task[Any]) -> None:
            self._loop.outside(way_s, _pass_on, task, answer)

        def given_up(_: asyncio.Future[Any]) -> None:
            if answer.cancelled() and self._chance.random() < 0.5:
                task.cancel()

        task.add_done_callback(answered, context=outside)
        answer.add_done_callback(given_up, context=outside)

    # --- chance ----------------------------------------------------------------------------------------------------

    def jitter(self) -> float:
        return self._chance.random()

    def new_run_id(self, _now: datetime) -> str:
        """Return an id that a reader of a trace can tell from others."""
        self._numbers += 1
        run_id = f"run_{self.name}.{self._numbers}"
        request = current_call.get()
        if request is not None:
            self._on_made(request, run_id)
        return run_id

    def new_token(self) -> str:
        self._numbers += 1
        return f"{self.name}.{self._numbers}"


def _pass_on(task: asyncio.Task[Any], answer: asyncio.Future[Any]) -> None:
    if task.cancelled():
        if not answer.done():
            answer.set_exception(Cut("the request was cancelled"))
        return
    error = task.exception()
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(task.result())


def made_of(
    kind: type[Mollifier],
    process: Process,
    *,
    client: Client,
    engine: SimulatedEngine,
    told: Told,
    global_flags: Callable[[], Mapping[str, Any]],
    reclaim_portion: int,
) -> Mollifier:
    """Join the parts of one process. What dead drainers left behind is put back in portions of so many, instead of many more."""
    mollifier = kind(
        lambda: process.settings,
        engine=engine,
        tasks=AnyTask(),
        global_flags=global_flags,
        redis=client.as_redis(),
        telemetry=told,
        clock=process.clock,
        monotonic=process.monotonic,
        jitter=process.jitter,
        new_run_id=process.new_run_id,
        new_token=process.new_token,
    )
    buffer: Any = mollifier.buffer
    if buffer is not None:
        buffer.reclaim_expired = partial(buffer.reclaim_expired, reclaim_portion)
    return mollifier
