"""4. Settling: what becomes of entries once they were handled, so that none is handled anew for want of an answer.

What was handled is acknowledged, first and for as long as it takes. What failed is put back, to be tried again after a while that
grows with its attempts, or is given up: where possible as a failure that everybody can see, or else as a dead letter. What an engine
that is away could not say anything of is put back as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from mollifier.backoff import Backoff
from mollifier.buffer import Buffer
from mollifier.errors import BufferUnavailableError, EngineUnavailableError, MalformedEntryError, NonRetryableError
from mollifier.findings import tell_evicted
from mollifier.handling import GiveUp, Handler, Outcome, outcomes_of
from mollifier.model import Entry
from mollifier.scripts import Settlement
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry, describe

log = logging.getLogger(__name__)

Settle = Callable[[Sequence[Entry]], Awaitable[list[Settlement | BufferUnavailableError]]]

_MOST_REFUSALS = 20
_RETRY_BASE_MS = 200
_RETRY_CAP_MS = 30_000


class Settler:
    """Settles entries of one buffer. `sleep` takes seconds; `jitter` returns a number in [0, 1); `monotonic` returns seconds."""

    def __init__(
        self,
        buffer: Buffer,
        handler: Handler,
        give_up: GiveUp | None,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        sleep: Callable[[float], Awaitable[None]],
        jitter: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._buffer = buffer
        self._handler = handler
        self._give_up = give_up
        self._settings = settings
        self._telemetry = telemetry
        self._sleep = sleep
        self._jitter = jitter
        self._monotonic = monotonic

    async def settle(self, entries: Sequence[Entry], outcomes: Sequence[Outcome], popped_at_s: float) -> bool:
        """Settle entries that were popped at that moment of the process's clock; False when the engine could not be reached for some."""
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
            await self._until_settled("ack", handled, self._ack)
        for entry, error in failed:
            if not await self._settle_failure(entry, error, popped_at_s):
                unreached.append(entry)
        if unreached:
            self._telemetry.faulted("handle", EngineUnavailableError(f"{len(unreached)} entries put back"))
            await self._until_settled("requeue", unreached, lambda some: self._buffer.requeue_many(some, attempts=0))
        return not unreached

    async def _settle_failure(self, entry: Entry, error: BaseException, popped_at_s: float) -> bool:
        """Have the entry tried again, or give it up; False when the engine, away, could not be told of its failure."""
        settings = self._settings()
        if isinstance(error, NonRetryableError) or entry.attempts + 1 >= settings.drain_max_attempts:
            try:
                is_recorded = self._give_up is not None and await self._give_up(entry, error)
            except EngineUnavailableError:
                # It comes back, and fails anew.
                return False
            fields = {"run_id": entry.run_id, "attempts": entry.attempts + 1, "error": describe(error)}
            log.error("mollifier.entry_failed", extra={"fields": fields})
            if is_recorded:
                again = partial(self._give_up_again, error)
                await self._until_settled("ack", [entry], partial(self._ack, again=again), outcome="given_up")
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

    async def _handle_again(self, entry: Entry) -> Outcome:
        (outcome,) = await outcomes_of(self._handler, [entry])
        return outcome

    async def _give_up_again(self, error: BaseException, entry: Entry) -> Outcome:
        """Have what has changed since the entry's failure was recorded recorded too: to handle it would fail once more."""
        try:
            is_recorded = self._give_up is not None and await self._give_up(entry, error)
        except EngineUnavailableError as outage:
            return outage
        return None if is_recorded else error

    async def _ack(
        self, entries: Sequence[Entry], again: Callable[[Entry], Awaitable[Outcome]] | None = None
    ) -> list[Settlement | BufferUnavailableError]:
        """Settle what was handled; what changed meanwhile is handled once more as it is now (by `again`), until nothing has."""
        replies = await self._buffer.ack_many(entries)
        for index, entry in enumerate(entries):
            while replies[index] == "changed":
                replies[index] = await self._ack_changed(entry, again or self._handle_again)
        return replies

    async def _ack_changed(
        self, entry: Entry, again: Callable[[Entry], Awaitable[Outcome]]
    ) -> Settlement | BufferUnavailableError:
        try:
            current = await self._buffer.get_entry(entry.org_id, entry.run_id)
        except MalformedEntryError as error:
            return BufferUnavailableError(str(error))
        if current is None or current.lease != entry.lease:
            return "stale"
        outcome = await again(current)
        if outcome is not None:
            return BufferUnavailableError(f"a change could not be carried over: {describe(outcome)}")
        (reply,) = await self._buffer.ack_many([current])
        return reply

    async def _until_settled(
        self,
        operation: str,
        entries: Sequence[Entry],
        settle: Settle,
        outcome: str | None = None,
    ) -> None:
        """Settle, again after a pause for as long as the server gives no answer: what was handled must not be handled anew.

        A server that answers and refuses is asked 20 times; the leases then run out and the entries come back to whoever is at work.
        """
        outcome = outcome or {"ack": "acked", "requeue": "requeued", "fail": "failed"}[operation]
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
        settle: Settle,
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
                case "evicted":
                    tell_evicted([entry.run_id], self._telemetry)
                case "changed" | "missing" | "stale":
                    self._telemetry.settled(reply, entry.dwell_ms)
        return refused
