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

Reply = Settlement | BufferUnavailableError | EngineUnavailableError
Settle = Callable[[Sequence[Entry]], Awaitable[Sequence[Reply]]]

_MOST_REFUSALS = 20


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
        """Settle entries that were popped at that moment of the process's clock; False when the engine turned out to be away meanwhile."""
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
        missed = await self._until_settled("ack", handled, self._ack) if handled else []
        for entry, error in failed:
            if not self._is_given_up(entry, error):
                await self._retry(entry, error, popped_at_s)
            # An engine that has just fallen away is asked for none of the others.
            elif missed or not await self._settle_given_up(entry, error):
                missed.append(entry)
        if unreached or missed:
            put_back = [*unreached, *missed]
            self._telemetry.faulted("handle", EngineUnavailableError(f"{len(put_back)} entries put back"))
            await self._until_settled("requeue", put_back, lambda some: self._buffer.requeue_many(some, attempts=0))
        return not missed

    def _is_given_up(self, entry: Entry, error: BaseException) -> bool:
        return isinstance(error, NonRetryableError) or entry.attempts + 1 >= self._settings().drain_max_attempts

    async def _settle_given_up(self, entry: Entry, error: BaseException) -> bool:
        """Give the entry up; False when the engine, away, could not be told of its failure."""
        try:
            is_recorded = self._give_up is not None and await self._give_up(entry, error)
        except EngineUnavailableError:
            # It comes back, and fails anew.
            return False
        fields = {"run_id": entry.run_id, "attempts": entry.attempts + 1, "error": describe(error)}
        log.error("mollifier.entry_failed", extra={"fields": fields})
        if is_recorded:
            again = partial(self._give_up_again, error)
            return not await self._until_settled("ack", [entry], partial(self._ack, again=again), outcome="given_up")
        await self._until_settled("fail", [entry], lambda some: self._buffer.fail_many(some, describe(error)))
        return True

    async def _retry(self, entry: Entry, error: BaseException, popped_at_s: float) -> None:
        self._telemetry.faulted("handle", error)
        # The buffer's clock at this moment: its reading at the pop, plus what has passed here since.
        now_ms = entry.accepted_at_ms + entry.dwell_ms + int((self._monotonic() - popped_at_s) * 1000)
        not_before_ms = now_ms + self._retry_delay_ms(entry.attempts)
        await self._until_settled(
            "requeue", [entry], lambda some: self._buffer.requeue_many(some, not_before_ms=not_before_ms)
        )

    def _retry_delay_ms(self, attempts: int) -> int:
        """Exponential with full jitter (Brooker, "Exponential Backoff And Jitter"), at least 1 ms."""
        settings = self._settings()
        return 1 + int(self._jitter() * min(settings.drain_retry_cap_ms, settings.drain_retry_base_ms * 2**attempts))

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
    ) -> Sequence[Reply]:
        """Settle what was handled; what changed meanwhile is handled once more as it is now (by `again`), until nothing has."""
        replies: list[Reply] = [*await self._buffer.ack_many(entries)]
        for index, entry in enumerate(entries):
            while replies[index] == "changed":
                replies[index] = await self._ack_changed(entry, again or self._handle_again)
        return replies

    async def _ack_changed(self, entry: Entry, again: Callable[[Entry], Awaitable[Outcome]]) -> Reply:
        try:
            current = await self._buffer.get_entry(entry.org_id, entry.run_id)
        except MalformedEntryError as error:
            return BufferUnavailableError(str(error))
        if current is None or current.lease != entry.lease:
            return "stale"
        outcome = await again(current)
        if isinstance(outcome, EngineUnavailableError):
            return outcome
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
    ) -> list[Entry]:
        """Settle, again after a pause for as long as the server gives no answer: what was handled must not be handled anew.

        A server that answers and refuses is asked 20 times; the leases then run out and the entries come back to whoever is at work.
        Returns the entries that the engine, which has to see them once more, could not be asked about: they are put back.
        """
        outcome = outcome or {"ack": "acked", "requeue": "requeued", "fail": "failed"}[operation]
        backoff = Backoff()
        left = list(entries)
        missed: list[Entry] = []
        refusals = 0
        while refusals < _MOST_REFUSALS:
            try:
                left = await self._settle_once(operation, outcome, left, settle, missed)
                refusals += 1
            except BufferUnavailableError as error:
                self._telemetry.faulted(operation, error)
            if not left:
                return missed
            await self._sleep(backoff.next_ms() / 1000)
        log.warning(
            "mollifier.unsettled", extra={"fields": {"operation": operation, "run_ids": [e.run_id for e in left]}}
        )
        return missed

    async def _settle_once(
        self,
        operation: str,
        outcome: str,
        entries: list[Entry],
        settle: Settle,
        missed: list[Entry],
    ) -> list[Entry]:
        """Try once; return the entries that were refused, and add to `missed` those that the engine could not be asked about."""
        refused: list[Entry] = []
        for entry, reply in zip(entries, await settle(entries), strict=True):
            match reply:
                case BufferUnavailableError():
                    self._telemetry.faulted(operation, reply)
                    refused.append(entry)
                case EngineUnavailableError():
                    missed.append(entry)
                case "held":
                    self._telemetry.settled(outcome, entry.dwell_ms)
                case "evicted":
                    tell_evicted([entry.run_id], self._telemetry)
                case "changed" | "missing" | "stale":
                    self._telemetry.settled(reply, entry.dwell_ms)
        return refused
