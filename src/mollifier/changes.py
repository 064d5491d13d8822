"""6. Changes of held runs: on the entry while it waits, in the engine once its run is on its way, and never without a bound.

A change is appended to what its maker has read, or not at all, so of many that are made at once one is appended and the others read
again. And each is one more to be read, and applied, by whoever looks at the run. Both grow with the number of changes, their product with
its square. So the changes of one run wait for each other within a process, and a run that has had its share of them
(`handover.is_full`) goes to the engine ahead of its turn: it is marked as taken and created, and changed there from then on, where a row's
lock keeps the order. What a run costs the buffer is bounded by that, however often it is changed.

Only an engine that is away, or cannot create the run, leaves all of them to the entry. That takes some hundred; then a change is answered
as it would be if the run were created: the engine cannot be reached. A cancellation is answered so as soon as somebody may have created the
run: carried over later, it could find the run started.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from weakref import WeakValueDictionary

from msgspec.structs import replace

from mollifier import handover, held, patches
from mollifier.buffer import Buffer
from mollifier.engine import RunEngine
from mollifier.errors import EngineUnavailableError
from mollifier.metadata import check_growth
from mollifier.model import FINAL_STATUSES, Entry, EntryState, Run
from mollifier.scripts import Settlement
from mollifier.telemetry import describe

log = logging.getLogger(__name__)

Appended = Entry | Settlement
"""The entry with the change, or why it was not appended."""


class HeldChanges:
    """Changes held runs of one application. `clock` returns the moment in UTC."""

    def __init__(self, engine: RunEngine, buffer: Buffer, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._buffer = buffer
        self._clock = clock
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._moving: dict[tuple[str, int], asyncio.Future[bool]] = {}

    async def change(self, entry: Entry, patch: patches.Patch, outage: EngineUnavailableError | None) -> Run | None:
        """Change the run of an entry; None to change it in the engine.

        `outage` is why the engine gave no answer, if it was asked for the change in vain. Raises EngineUnavailableError where the change may
        have been made there and must not be made twice, or late. Raises what applying the change raises; NonRetryableError or
        MalformedEntryError for an entry that does not parse.
        """
        cancelled_at = patch.at if isinstance(patch, patches.Cancel) else None
        current: Entry | None = entry
        stays = outage is not None
        while current is not None:
            appended: Appended = "changed"
            # The first to come asks the buffer no more than it has to; whoever has waited for others reads what they have left.
            turn = self._turns.setdefault(entry.run_id, asyncio.Lock())
            has_waited = turn.locked()
            async with turn:
                if has_waited and (current := await self._read(entry)) is None:
                    return None
                if cancelled_at is not None and self._has_ended(current, stays=stays):
                    return held.run_of(current, self._clock())
                if current.state is EntryState.MATERIALISED:
                    return None
                if outage is not None and _would_be_late(current, patch, outage):
                    raise outage
                # A cancellation marks the entry by itself.
                is_full = handover.is_full(current) and cancelled_at is None
                moves = not stays and (handover.is_taken(current) or is_full)
                if not moves:
                    appended = await self.append(current, patch)
                elif (current := await self._marked(current)) is None:
                    return None
            if moves:
                if await self.hand_over(current, cancelled_at):
                    return None
                if cancelled_at is not None:
                    raise EngineUnavailableError(f"{entry.run_id} cannot be created yet, nor cancelled; try again")
                # Where else should the change go?
                stays = True
                continue
            match appended:
                case Entry() as changed:
                    # Whoever may create the run from here on reads the cancellation, and so do lists.
                    if cancelled_at is not None and outage is None and await self.hand_over(changed):
                        return None
                    return held.run_of(changed, self._clock())
                case "changed":
                    current = await self._read(entry)
                case _:
                    return None
        return None

    async def append(self, entry: Entry, patch: patches.Patch, unbind: Sequence[str] = ()) -> Appended:
        """Append the change to the entry as it was read. Raises what applying it raises.

        Raises EngineUnavailableError where the entry has taken all that it takes: only the engine could take more. What is made once only, to
        cancel or to free a key, it always takes.
        """
        before = held.patched(entry)
        check_growth(before.snapshot.metadata, patches.apply(before, patch).snapshot.metadata)
        if handover.is_overfull(entry) and not isinstance(patch, patches.Cancel | patches.ResetKey):
            raise EngineUnavailableError("the run has been changed too often to be changed again before it is created")
        encoded = patches.encode(patch)
        reply = await self._buffer.patch(entry, encoded, unbind=unbind)
        return replace(entry, patches=(*entry.patches, encoded)) if reply == "held" else reply

    async def hand_over(self, entry: Entry, cancelled_at: datetime | None = None) -> bool:
        """Have the engine know the run as the entry is; False when the engine cannot create it, or nobody may any more.

        Changes that come to this at the same moment share it: the entry stands still meanwhile.
        """
        if cancelled_at is not None:
            return await self._hand_over(entry, cancelled_at)
        name = (entry.run_id, len(entry.patches))
        while (moving := self._moving.get(name)) is not None:
            await asyncio.wait((moving,))
            if not moving.cancelled():
                return moving.result()
        moving = self._moving[name] = asyncio.get_running_loop().create_future()
        try:
            has_moved = await self._hand_over(entry)
            moving.set_result(has_moved)
        finally:
            # Where whoever has set out to do it is broken off, one of those who wait for it does it.
            del self._moving[name]
            moving.cancel()
        return has_moved

    async def _hand_over(self, entry: Entry, cancelled_at: datetime | None = None) -> bool:
        if entry.state not in (EntryState.QUEUED, EntryState.DRAINING):
            return False
        try:
            await handover.hand_over(self._engine, entry, self._clock(), cancelled_at)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises of its creation is the drainer's to judge, not the caller's
            log.warning(
                "mollifier.not_handed_over", extra={"fields": {"run_id": entry.run_id, "error": describe(error)}}
            )
            return False
        return True

    async def _marked(self, entry: Entry) -> Entry | None:
        """Return the entry as it stands still; None when it is gone."""
        if handover.is_taken(entry):
            return entry
        await self._buffer.mark(entry)
        return await self._read(entry)

    async def _read(self, entry: Entry) -> Entry | None:
        return await self._buffer.get_entry(entry.org_id, entry.run_id)

    def _has_ended(self, entry: Entry, *, stays: bool) -> bool:
        """Return whether there is nothing left to cancel; where the engine can be asked, that tells of most."""
        patched = held.patched(entry)
        # Whoever may create the run has read that it was cancelled.
        if entry.state is EntryState.FAILED or patched.cancelled_at is not None:
            return True
        return stays and not entry.taken and patches.status_at(patched, self._clock()) in FINAL_STATUSES


def _would_be_late(entry: Entry, patch: patches.Patch, outage: EngineUnavailableError) -> bool:
    """Return whether the change must not be left to the entry, the engine having given no answer.

    A run that may be there already could start before its cancellation is carried over; and what the engine may have heard could be made
    twice, or after what was made since.
    """
    if isinstance(patch, patches.Cancel) and entry.taken:
        return True
    return not outage.unsent and not patches.commutes(patch)
