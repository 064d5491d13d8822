"""4. The drainer: takes entries out of the buffer and hands them to a handler, fairly, bounded, and without ever dying of a fault.

A tick lists what is ready, asks the rotation for its turn, pops the shares, and starts one handler per environment. A tick that
found work is followed at once by the next, as far as the concurrency allows; one that found none by a pause. Between pop and
settlement every entry is under a lease that this process extends while its handler runs; leases of processes that died run out,
and any drainer puts their entries back (`leases.py`). What becomes of handled entries is told in `settling.py`, and when none are
taken, for the engine's sake, in `engine_breaker.py`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from mollifier.backoff import Backoff
from mollifier.buffer import Buffer, Popped
from mollifier.circuit import Question
from mollifier.engine_breaker import EngineBreaker
from mollifier.errors import BufferUnavailableError, EngineUnavailableError
from mollifier.fairness import Rotation
from mollifier.findings import tell_popped
from mollifier.handling import GiveUp, Handler, Outcome, outcomes_of
from mollifier.leases import Leases
from mollifier.model import Entry
from mollifier.settings import Settings
from mollifier.settling import Settler
from mollifier.suspects import Turn, turns
from mollifier.telemetry import Telemetry

log = logging.getLogger(__name__)

_UNWIND_S = 0.5


def batch_size(settings: Settings) -> int:
    """Return how many entries of one environment are taken at most at once.

    Half of the concurrency at most: while one batch is being created, the next is on its way, however few environments there are.
    """
    return min(settings.drain_batch_size, -(-settings.drain_concurrency // 2))


class Drainer:
    """Drains one buffer through one handler. Start it once; stop it with a deadline.

    At most `drain_concurrency` entries are popped and unsettled at any moment. `asks_engine` tells of an entry whether handling it asks
    the run engine anything. `sleep` takes seconds; `jitter` returns a number in [0, 1); `monotonic` returns seconds.
    """

    def __init__(
        self,
        buffer: Buffer,
        handler: Handler,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        give_up: GiveUp | None = None,
        asks_engine: Callable[[Entry], bool] = lambda _: True,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._buffer = buffer
        self._handler = handler
        self._settings = settings
        self._telemetry = telemetry
        self._sleep = sleep
        self._jitter = jitter
        self._monotonic = monotonic
        self._settler = Settler(
            buffer, handler, give_up, settings, telemetry, sleep=sleep, jitter=jitter, monotonic=monotonic
        )
        self._leases = Leases(buffer, settings, telemetry, sleep)
        self._rotation = Rotation()
        self._tick_backoff = Backoff()
        self._breaker = EngineBreaker(
            buffer, settings, telemetry, asks_engine=asks_engine, monotonic=monotonic, jitter=jitter
        )
        self._handling: set[asyncio.Task[None]] = set()
        self._loops: tuple[asyncio.Task[None], ...] = ()
        self._stopping = asyncio.Event()
        self._work = asyncio.Event()
        self._last_ready: tuple[str, ...] = ()
        self._listed_all_at_s = -math.inf
        self._slot_freed = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """How many entries are popped and not settled yet."""
        return len(self._leases)

    @property
    def running(self) -> bool:
        """True from `start` until `stop`."""
        return bool(self._loops)

    def start(self) -> None:
        """Start the loop; starting it twice starts one."""
        if self._loops:
            return
        self._stopping.clear()
        self._loops = (
            asyncio.create_task(self._drain(), name="mollifier-drain"),
            asyncio.create_task(self._leases.keep(self._is_ended), name="mollifier-leases"),
            asyncio.create_task(self._listen(), name="mollifier-listen"),
        )

    async def stop(self, timeout_ms: int | None = None) -> bool:
        """Take no more, let the handlers finish until the deadline (default `drain_shutdown_timeout_ms`), and return.

        Returns False, and warns, when handlers were still at work: their entries come back when their leases run out.
        """
        timeout_ms = self._settings().drain_shutdown_timeout_ms if timeout_ms is None else timeout_ms
        self._stopping.set()
        self._slot_freed.set()
        drain, *others = self._loops or (None,)
        pending: set[asyncio.Task[None]] = set()
        if drain is not None:
            deadline = self._monotonic() + timeout_ms / 1000
            _, pending = await asyncio.wait((drain,), timeout=timeout_ms / 1000)
            if self._handling:
                left_s = max(0.0, deadline - self._monotonic())
                _, hung = await asyncio.wait(set(self._handling), timeout=left_s)
                pending |= hung
        left = self.in_flight
        self._loops = ()
        ended = {*pending, *others}
        for task in ended:
            task.cancel()
        if ended:
            # A cancelled call hands its connection back on the way out; a handler that will not end is not waited for.
            await asyncio.wait(ended, timeout=_UNWIND_S)
        if pending:
            log.warning(
                "mollifier.drainer_stop_deadline",
                extra={"fields": {"timeout_ms": timeout_ms, "entries_in_flight": left}},
            )
        return not pending

    def _is_ended(self) -> bool:
        """Tell the calling loop whether to end, for its cancellation may be lost.

        Before Python 3.12 `asyncio.wait_for` loses one that arrives together with a reply.
        """
        return asyncio.current_task() not in self._loops

    # --- the loop --------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        while not self._stopping.is_set():
            try:
                found_work = await self._tick()
            except Exception as error:  # noqa: BLE001 - the loop outlives any fault
                self._telemetry.faulted("list" if isinstance(error, BufferUnavailableError) else "tick", error)
                await self._pause(self._tick_backoff.next_ms())
            else:
                if not found_work:
                    await self._pause(self._settings().drain_poll_interval_ms, until=self._work)

    async def _tick(self) -> bool:
        """Serve one turn of the rotation; return whether there was anything to serve."""
        await self._breaker.tell()
        if wait_s := self._breaker.wait_s():
            await self._pause(wait_s * 1000)
        settings = self._settings()
        # Looked up while what was taken before is still handled: what is out of date by then costs this turn nothing but a look.
        ready = await self._ready()
        capacity = await self._free_capacity(settings.drain_concurrency)
        if self._stopping.is_set():
            return False
        if not capacity:
            return True
        term = self._breaker.term
        shares = self._rotation.plan(
            ready,
            capacity=capacity,
            batch_size=batch_size(settings),
            max_orgs=settings.drain_max_orgs_per_tick,
        )
        popped = await self._buffer.pop_many(shares)
        faults = [reply for reply in popped if isinstance(reply, BufferUnavailableError)]
        for fault in faults:
            self._telemetry.faulted("pop", fault)
        if faults and len(faults) == len(popped):
            await self._pause(self._tick_backoff.next_ms())
            return True
        self._tick_backoff.reset()
        taken = [self._dispatch(reply, term) for reply in popped if isinstance(reply, Popped)]
        return any(taken)

    async def _ready(self) -> Mapping[str, Sequence[str]]:
        """List what is due: everywhere when something was announced, nothing was due, or a poll has passed; else where something was."""
        now_s = self._monotonic()
        poll_s = self._settings().drain_poll_interval_ms / 1000
        everywhere = self._work.is_set() or not self._last_ready or now_s - self._listed_all_at_s >= poll_s
        if everywhere:
            # Cleared before looking: work that arrives from here on is either seen or announced.
            self._work.clear()
            self._listed_all_at_s = now_s
        ready = await self._buffer.ready(None if everywhere else self._last_ready)
        self._last_ready = tuple(ready)
        return ready

    async def _free_capacity(self, concurrency: int) -> int:
        """Wait until entries may be taken, for what is at work here and for what the engine stands; return how many.

        0 when the engine has fallen away meanwhile.
        """
        while not self._stopping.is_set() and not self._breaker.wait_s():
            room = self._breaker.room(concurrency - self.in_flight)
            if room > 0:
                return room
            self._slot_freed.clear()
            await self._slot_freed.wait()
        return 0

    def _dispatch(self, popped: Popped, term: int) -> bool:
        tell_popped(popped, self._telemetry)
        if popped.entries:
            self._leases.take(popped.entries)
            plan = turns(popped.entries, self._settings().drain_max_reclaims, self._jitter)
            asked = [(turn, self._breaker.ask(turn.entries, term)) for turn in plan]
            task = asyncio.create_task(self._handle(asked, self._monotonic()), name="mollifier-handle")
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)
        return bool(popped.entries or popped.orphans or popped.malformed or popped.evicted)

    async def _pause(self, pause_ms: float, until: asyncio.Event | None = None) -> None:
        """Sleep, unless the drainer is being stopped, or the event comes first."""
        waiting = [asyncio.ensure_future(self._sleep(pause_ms / 1000)), asyncio.create_task(self._stopping.wait())]
        if until is not None:
            waiting.append(asyncio.create_task(until.wait()))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def _listen(self) -> None:
        """Be told of work, so that an entry on an idle system does not wait for the next poll."""
        backoff = Backoff()
        while True:
            try:
                await self._buffer.listen(self._work.set)
            except Exception as error:  # noqa: BLE001 - without news the loop polls
                self._telemetry.faulted("listen", error)
                await self._sleep(backoff.next_ms() / 1000)

    # --- one environment's entries ---------------------------------------------------------------------------------

    async def _handle(self, asked: Sequence[tuple[Turn, Question]], popped_at_s: float) -> None:
        try:
            for turn, question in asked:
                await self._handle_turn(turn, question, popped_at_s)
                self._drop(turn, question)
        finally:
            for turn, question in asked:
                self._drop(turn, question)

    async def _handle_turn(self, turn: Turn, question: Question, popped_at_s: float) -> None:
        """Handle and settle; what was taken before the breaker opened is put back as it is."""
        try:
            outcomes: Sequence[Outcome]
            if not self._breaker.stands(question):
                outcomes = [EngineUnavailableError("it fell away meanwhile")] * len(turn.entries)
            elif turn.error is not None:
                outcomes = [turn.error] * len(turn.entries)
            else:
                outcomes = await outcomes_of(self._handler, turn.entries)
                self._breaker.judge(question, turn.entries, outcomes)
            if not await self._settler.settle(turn.entries, outcomes, popped_at_s):
                self._breaker.missed(question)
        except Exception as error:  # noqa: BLE001 - unsettled entries come back when their leases run out
            self._telemetry.faulted("settle", error)

    def _drop(self, turn: Turn, question: Question) -> None:
        # Cancelled, or given up unasked, its entries have told nothing.
        question.dropped()
        self._leases.drop(turn.entries)
        self._slot_freed.set()
