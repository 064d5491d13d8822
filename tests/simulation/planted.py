"""Bugs to plant, each of which the sentence of the specification that it breaks has to find within a few seeds: proof that the simulation can fail.

Four are in the scripts, planted in their model; two are in the flow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mollifier.buffer import Reclaimed
from mollifier.drainer import Drainer
from mollifier.facade import Mollifier
from mollifier.handling import Handler, Outcome
from mollifier.model import Entry
from tests.model.scripts import ScriptModel
from tests.simulation.invariants import (
    AnAcknowledgedRunExists,
    NothingIsHandedOverBeforeItsTime,
    OneClaimantAtATime,
    OnlyItsHolderSettlesAnEntry,
    Sentence,
    TheReadyIndexNamesWhatIsDue,
    WhatADeadDrainerHeldIsPutBackInTime,
)


class Bug(msgspec.Struct, frozen=True, kw_only=True):
    """What to put in the place of the model of the scripts, or of the joined flow, and the sentences of which one has to find it."""

    breaks: tuple[type[Sentence], ...]
    model: type[ScriptModel] = ScriptModel
    facade: type[Mollifier] = Mollifier


class WithoutFencing(ScriptModel):
    """Whoever settles a leased entry is taken for its holder."""

    def holds(self, entry: str, lease: int) -> bytes:
        state = self.store.hashes.get(entry, {}).get("state")
        return b"missing" if state is None else b"held" if state == b"DRAINING" else b"stale"


class RequeueWithoutIndex(ScriptModel):
    """An entry that comes back is not announced to the ready index."""

    _is_requeueing = False

    def requeue(self, **named: Any) -> Any:
        self._is_requeueing = True
        try:
            return super().requeue(**named)
        finally:
            self._is_requeueing = False

    def mark_ready(self, *args: Any, **named: Any) -> None:
        if not self._is_requeueing:
            super().mark_ready(*args, **named)


class RetryAtOnce(ScriptModel):
    """An entry that is to wait is back in its queue at once."""

    def requeue(self, **named: Any) -> Any:
        named["not_before_ms"] = 0
        return super().requeue(**named)


class ClaimOfAnybody(ScriptModel):
    """A claim does not say whose it is."""

    def claim(self, **named: Any) -> Any:
        named["token"] = "anybody"
        return super().claim(**named)

    def prolong(self, **named: Any) -> Any:
        named["token"] = "anybody"
        return super().prolong(**named)

    def release(self, **named: Any) -> Any:
        named["token"] = "anybody"
        return super().release(**named)

    def accept(self, **named: Any) -> Any:
        named["token"] = named["token"] and "anybody"
        return super().accept(**named)


class AckBeforeCreate(Mollifier):
    """Entries are acknowledged, and then their runs are created."""

    def drain_handler(self) -> Handler:
        handle, buffer = super().drain_handler(), self.buffer
        assert buffer is not None

        async def handle_acked(entries: Sequence[Entry]) -> Sequence[Outcome]:
            await buffer.ack_many(entries)
            return await handle(entries)

        return handle_acked


class OnePortionPerLook(Mollifier):
    """After each portion that is put back of what dead drainers left, the rest waits for another look."""

    def drainer(self, handler: Handler | None = None) -> Drainer:
        buffer: Any = self.buffer
        reclaim, pause_s = buffer.reclaim_expired, self.settings().lease_ms / 3000

        async def reclaim_and_pause() -> Reclaimed:
            reclaimed = await reclaim()
            if reclaimed.number:
                await asyncio.sleep(pause_s)
            return reclaimed

        buffer.reclaim_expired = reclaim_and_pause
        return super().drainer(handler)


PLANTED: Mapping[str, Bug] = {
    "settle without the fencing check": Bug(model=WithoutFencing, breaks=(OnlyItsHolderSettlesAnEntry,)),
    "requeue without the ready index": Bug(model=RequeueWithoutIndex, breaks=(TheReadyIndexNamesWhatIsDue,)),
    "retry without its not-before time": Bug(model=RetryAtOnce, breaks=(NothingIsHandedOverBeforeItsTime,)),
    "claim without the owner's token": Bug(model=ClaimOfAnybody, breaks=(OneClaimantAtATime,)),
    "acknowledge before creating": Bug(facade=AckBeforeCreate, breaks=(AnAcknowledgedRunExists,)),
    "put back one portion per look": Bug(facade=OnePortionPerLook, breaks=(WhatADeadDrainerHeldIsPutBackInTime,)),
}
