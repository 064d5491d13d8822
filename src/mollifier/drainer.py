"""4. The drainer: takes entries out of the buffer and hands them to a handler, fairly, bounded, and without ever dying of a fault.

A tick lists what is ready, asks the rotation for its turn, pops the shares, and starts one handler per environment. A tick that
found work is followed at once by the next, as far as the concurrency allows; one that found none by a pause. Between pop and
settlement every entry is under a lease that this process extends while its handler runs; leases of processes that died run out,
and any drainer puts their entries back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from mollifier.buffer import Buffer, Popped, Reclaimed
from mollifier.errors import BufferUnavailableError, EngineUnavailableError, MalformedEntryError, NonRetryableError
from mollifier.fairness import Rotation
from mollifier.model import Entry
from mollifier.scripts import Settlement
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry, describe

log = logging.getLogger(__name__)

Outcome = BaseException | None
"""What became of one entry: None when it was handled, otherwise why not."""

Handler = Callable[[Sequence[Entry]], Awaitable[Sequence[Outcome]]]
"""Handles entries of one environment, oldest first; returns one outcome each, in order. Raising speaks for all of them."""

GiveUp = Callable[[Entry, BaseException], Awaitable[bool]]
"""Makes an entry's failure visible elsewhere, so that the entry can go; False when it must stay as failed.

Raises EngineUnavailableError when that cannot be told now: the entry then comes back, and its failure is no attempt.
"""

_MOST_REFUSALS = 20
_UNWIND_S = 0.5
_RETRY_BASE_MS = 200
_RETRY_CAP_MS = 30_000


class Backoff:
    """Doubles from `floor_ms` to `cap_ms` with each failure in a row; a success starts it anew."""

    def __init__(self, floor_ms: int = 100, cap_ms: int = 5_000) -> None:
        self._floor_ms = floor_ms
        self._cap_ms = cap_ms
        self._next_ms = floor_ms

    def next_ms(self) -> int:
        """Return how long to pause after this failure, milliseconds."""
        pause_ms = self._next_ms
        self._next_ms = min(self._cap_ms, pause_ms * 2)
        return pause_ms

    def reset(self) -> None:
        """Forget the failures so far."""
        self._next_ms = self._floor_ms


class Drainer:
    """Drains one buffer through one handler. Start it once; stop it with a deadline.

    At most `drain_concurrency` entries are popped and unsettled at any moment. `sleep` takes seconds; `jitter` returns a number
    in [0, 1); `monotonic` returns seconds.
    """

    def __init__(
        self,
        buffer: Buffer,
        handler: Handler,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        give_up: GiveUp | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._buffer = buffer
        self._handler = handler
        self._give_up = give_up
        self._settings = settings
        self._telemetry = telemetry
        self._sleep = sleep
        self._jitter = jitter
        self._monotonic = monotonic
        self._rotation = Rotation()
        self._tick_backoff = Backoff()
        self._engine_backoff = Backoff()
        self._engine_paused = False
        # By run and lease: lease numbers repeat among partitions, and a run may come back under a new lease.
        self._in_flight: dict[tuple[str, int], Entry] = {}
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
        return len(self._in_flight)

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
            asyncio.create_task(self._keep_leases(), name="mollifier-leases"),
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

    # --- the loop --------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        while not self._stopping.is_set():
            if self._engine_paused:
                self._engine_paused = False
                await self._pause(self._engine_backoff.next_ms())
                continue
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
        settings = self._settings()
        capacity = await self._free_capacity(settings.drain_concurrency)
        if self._stopping.is_set():
            return False
        ready = await self._ready()
        shares = self._rotation.plan(
            ready,
            capacity=capacity,
            batch_size=settings.drain_batch_size,
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
        taken = [self._dispatch(reply) for reply in popped if isinstance(reply, Popped)]
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
        while (free := concurrency - self.in_flight) <= 0 and not self._stopping.is_set():
            self._slot_freed.clear()
            await self._slot_freed.wait()
        return free

    def _dispatch(self, popped: Popped) -> bool:
        self._tell_malformed(popped.malformed)
        self._tell_evicted(popped.evicted)
        if popped.orphans:
            log.warning("mollifier.orphans_dropped", extra={"fields": {"count": popped.orphans}})
        for _ in range(popped.orphans):
            self._telemetry.settled("orphaned", 0)
        if popped.entries:
            self._in_flight.update(((entry.run_id, entry.lease), entry) for entry in popped.entries)
            task = asyncio.create_task(self._handle(popped.entries, self._monotonic()), name="mollifier-handle")
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

    async def _handle(self, entries: Sequence[Entry], popped_at_s: float) -> None:
        try:
            outcomes = await self._outcomes(entries)
            await self._settle(entries, outcomes, popped_at_s)
        except Exception as error:  # noqa: BLE001 - unsettled entries come back when their leases run out
            self._telemetry.faulted("settle", error)
        finally:
            for entry in entries:
                self._in_flight.pop((entry.run_id, entry.lease), None)
            self._slot_freed.set()

    async def _outcomes(self, entries: Sequence[Entry]) -> Sequence[Outcome]:
        try:
            outcomes = list(await self._handler(entries))
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

    async def _settle(self, entries: Sequence[Entry], outcomes: Sequence[Outcome], popped_at_s: float) -> None:
        handled: list[Entry] = []
        unreached: list[Entry] = []
        failed: list[tuple[Entry, BaseException]] = []
        for entry, outcome in zip(entries, outcomes, strict=True):
            match outcome:
                case None:
                    handled.append(entry)
                case EngineUnavailableError():
                    unreached.append(entry)
                case _:
                    failed.append((entry, outcome))
        # What was handled is settled first: no neighbour's failure may have it handled again.
        if handled:
            self._engine_backoff.reset()
            await self._until_settled("ack", handled, self._ack)
        for entry, error in failed:
            if not await self._settle_failure(entry, error, popped_at_s):
                unreached.append(entry)
        if unreached:
            self._engine_paused = True
            self._telemetry.faulted("handle", EngineUnavailableError(f"{len(unreached)} entries put back"))
            await self._until_settled("requeue", unreached, lambda some: self._buffer.requeue_many(some, attempts=0))

    async def _settle_failure(self, entry: Entry, error: BaseException, popped_at_s: float) -> bool:
        """Have the entry tried again, or give it up; False when the engine, away, could not be told of its failure."""
        settings = self._settings()
        if isinstance(error, NonRetryableError) or entry.attempts + 1 >= settings.drain_max_attempts:
            log.error(
                "mollifier.entry_failed",
                extra={"fields": {"run_id": entry.run_id, "attempts": entry.attempts + 1, "error": describe(error)}},
            )
            try:
                is_recorded = self._give_up is not None and await self._give_up(entry, error)
            except EngineUnavailableError:
                return False
            if is_recorded:
                await self._until_settled("ack", [entry], self._ack)
            else:
                await self._until_settled("fail", [entry], lambda some: self._buffer.fail_many(some, describe(error)))
            return True
        self._telemetry.faulted("handle", error)
        # The buffer's clock at this moment: its reading at the pop, plus what has passed here since.
        now_ms = entry.accepted_at_ms + entry.dwell_ms + int((self._monotonic() - popped_at_s) * 1000)
        not_before_ms = now_ms + self._retry_delay_ms(entry.attempts)
        await self._until_settled(
            "requeue", [entry], lambda some: self._buffer.requeue_many(some, not_before_ms=not_before_ms)
        )
        return True

    def _retry_delay_ms(self, attempts: int) -> int:
        """Exponential with full jitter (Brooker, "Exponential Backoff And Jitter"), at least 1 ms."""
        return 1 + int(self._jitter() * min(_RETRY_CAP_MS, _RETRY_BASE_MS * 2**attempts))

    async def _ack(self, entries: Sequence[Entry]) -> list[Settlement | BufferUnavailableError]:
        """Settle what was handled; what changed meanwhile is handled once more as it is now, until nothing has."""
        replies = await self._buffer.ack_many(entries)
        for index, entry in enumerate(entries):
            while replies[index] == "changed":
                replies[index] = await self._ack_changed(entry)
        return replies

    async def _ack_changed(self, entry: Entry) -> Settlement | BufferUnavailableError:
        try:
            current = await self._buffer.get_entry(entry.org_id, entry.run_id)
        except MalformedEntryError as error:
            return BufferUnavailableError(str(error))
        if current is None or current.lease != entry.lease:
            return "stale"
        (outcome,) = await self._outcomes([current])
        if outcome is not None:
            return BufferUnavailableError(f"a change could not be carried over: {describe(outcome)}")
        (reply,) = await self._buffer.ack_many([current])
        return reply

    async def _until_settled(
        self,
        operation: str,
        entries: Sequence[Entry],
        settle: Callable[[Sequence[Entry]], Awaitable[list[Settlement | BufferUnavailableError]]],
    ) -> None:
        """Settle, again after a pause for as long as the server gives no answer: what was handled must not be handled anew.

        A server that answers and refuses is asked 20 times; the leases then run out and the entries come back to whoever is at work.
        """
        outcome = {"ack": "acked", "requeue": "requeued", "fail": "failed"}[operation]
        backoff = Backoff()
        left = list(entries)
        refusals = 0
        while refusals < _MOST_REFUSALS:
            try:
                left = await self._settle_once(operation, outcome, left, settle)
                refusals += 1
            except BufferUnavailableError as error:
                self._telemetry.faulted(operation, error)
            if not left:
                return
            await self._sleep(backoff.next_ms() / 1000)
        log.warning(
            "mollifier.unsettled", extra={"fields": {"operation": operation, "run_ids": [e.run_id for e in left]}}
        )

    async def _settle_once(
        self,
        operation: str,
        outcome: str,
        entries: list[Entry],
        settle: Callable[[Sequence[Entry]], Awaitable[list[Settlement | BufferUnavailableError]]],
    ) -> list[Entry]:
        """Try once; return the entries that were refused."""
        refused: list[Entry] = []
        for entry, reply in zip(entries, await settle(entries), strict=True):
            match reply:
                case BufferUnavailableError():
                    self._telemetry.faulted(operation, reply)
                    refused.append(entry)
                case "held":
                    self._telemetry.settled(outcome, entry.dwell_ms)
                case "changed" | "missing" | "stale":
                    self._telemetry.settled(reply, entry.dwell_ms)
        return refused

    # --- leases ----------------------------------------------------------------------------------------------------

    async def _keep_leases(self) -> None:
        """Extend the leases of what is being handled here, and put back what dead holders left, three times a lease."""
        # Asked each time: a cancellation that arrives together with a reply is lost in `asyncio.wait_for` before Python 3.12.
        while asyncio.current_task() in self._loops:
            await self._sleep(self._settings().lease_ms / 3000)
            try:
                if self._in_flight:
                    await self._buffer.extend_many(list(self._in_flight.values()))
            except Exception as error:  # noqa: BLE001 - the loop outlives any fault
                self._telemetry.faulted("extend", error)
            try:
                self._tell_reclaimed(await self._buffer.reclaim_expired())
            except Exception as error:  # noqa: BLE001 - the loop outlives any fault
                self._telemetry.faulted("reclaim", error)

    def _tell_reclaimed(self, reclaimed: Reclaimed) -> None:
        for _ in reclaimed.returned:
            self._telemetry.settled("reclaimed", 0)
        for run_id in reclaimed.failed:
            detail = "it came back after each lease that ran out, and whoever took it up died or hung; it is a dead letter now"
            log.error("mollifier.reclaimed_too_often", extra={"fields": {"run_id": run_id, "detail": detail}})
            self._telemetry.settled("reclaim_limit", 0)
        self._tell_evicted(reclaimed.evicted)
        self._tell_malformed([MalformedEntryError(run_id, "fields are missing") for run_id in reclaimed.malformed])

    def _tell_malformed(self, errors: Sequence[MalformedEntryError]) -> None:
        for error in errors:
            log.error("mollifier.malformed_entry", extra={"fields": {"run_id": error.run_id, "error": error.reason}})
            self._telemetry.settled("malformed", 0)

    def _tell_evicted(self, run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            detail = "the buffer's server let go of a held entry: its payload is lost; have the server evict nothing (noeviction)"
            log.error("mollifier.entry_evicted", extra={"fields": {"run_id": run_id, "detail": detail}})
            self._telemetry.settled("evicted", 0)
