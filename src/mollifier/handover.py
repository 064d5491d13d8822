"""4. Handing a held run over: how its changes keep one order while it moves from the buffer to the engine.

A held run has two places, and no transaction spans them: its entry, with the changes made to it in a list, and from some moment on its
row in the engine. Who creates the row has read the entry a while before; a change appended in between is not in the row, although its
caller has been answered. Reads, which ask the engine first, would show the change and then show it no more, until somebody carries it
over; and a later change, made to the row directly, would be overwritten by that carrying over.

So an entry takes changes only up to the moment when somebody sets out to create its run, and says so itself: `taken`. Popping an entry
reads it and marks it in one step; cancelling marks it by the very change that it appends; a trigger that is held because its direct
creation had no answer is marked from the start; and whoever wants to change a run that has been changed often, or to answer with one that is not
as safe as was asked for, marks it, and reads it after that. The mark is never taken off, for a creation that was given up may still arrive. From this follows the order of everything that happens to a held run while the engine answers:

1. Before the mark a change takes effect when it is appended. Appending compares the entry with what was read, the mark included,
   so whoever marks has read every change that was ever accepted, and every creation, however many are under way, has all of them in it.
2. After the mark the entry stands still. A change then first creates the run from the entry, as the drainer is about to do (the
   run id lets one of them insert and has the others find it there; a cancellation inserts it cancelled), and takes effect when the engine makes it to the row, where it meets
   later changes in the order of the row's lock. This is helping, as in lock-free algorithms (Herlihy, "Wait-free Synchronization"):
   nobody waits for a drainer that may be slow or dead. Freeing the run's key is such a change, and the key's binding in the buffer goes
   last: until it has gone, nobody makes another run with the key.
3. A read takes effect when it finds the row or, finding none, at that look: what the entry then says was accepted before the mark
   and is in whatever row appears. No read shows a change that a later one does not, and a change made to a row has every older one
   before it, without a question to the buffer.

Only while the engine cannot create the run does an entry take changes after its mark, for want of any other place. They are carried to the row
once, which counts them, before the entry is settled: `ack` refuses an entry that has more changes than were handled. A change that the
engine was asked for, and gave no answer to, may have been made there; the entry then takes it only if it comes to the same however often
and whenever it is made. A cancellation it takes before its mark only: behind it, the run may be there already, and start before anything is
carried over. So whatever cancels a held run marks it, too, and every creation has it. The exception this leaves: a creation that was broken
off by the outage, yet arrived, can be read without such a change until the drainer has come back to the entry. So can a run that was created
directly because its accept had no answer in time, should the accept have arrived too; that entry has no mark, and takes a cancellation.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from mollifier import held, patches
from mollifier.engine import CreateOutcome, Creation, Ending, Existing, RunEngine
from mollifier.model import Entry, RunStatus

CHANGES_MANY, CHANGE_BYTES_MANY = 32, 256 * 1024
CHANGES_MAX, CHANGE_BYTES_MAX = 500, 4 * 1024 * 1024


class Handover(msgspec.Struct, frozen=True):
    """One entry on its way: what to create of it, and the changes that are in that already."""

    entry: Entry
    creation: Creation
    changes: tuple[patches.Patch, ...]


def read(entry: Entry, cancelled_at: datetime | None = None) -> Handover:
    """Return what the entry becomes, with `cancelled_at` what it becomes cancelled at that moment.

    Raises NonRetryableError when it does not parse, InvalidRequestError when a change cannot be applied.
    """
    changes = patches.decode(entry.patches)
    patched = held.patched(entry)
    if cancelled_at is not None:
        patched = patches.apply(patched, patches.Cancel(cancelled_at))
    at = patched.cancelled_at
    creation = Creation(
        snapshot=patched.snapshot,
        ending=Ending(status=RunStatus.CANCELED, at=at) if at is not None else None,
        key_freed=patched.key_freed,
        patch_count=len(changes),
        changed_at=patched.changed_at,
    )
    return Handover(entry, creation, changes)


def is_taken(entry: Entry) -> bool:
    """Return whether somebody may have set out to create the entry's run. Raises NonRetryableError when a change does not parse."""
    return entry.taken or any(isinstance(change, patches.Cancel) for change in patches.decode(entry.patches))


def is_full(entry: Entry) -> bool:
    """Return whether the entry has so many changes that the next one should be made in the engine."""
    return len(entry.patches) >= CHANGES_MANY or sum(map(len, entry.patches)) >= CHANGE_BYTES_MANY


def is_overfull(entry: Entry) -> bool:
    """Return whether the entry has so many changes that it takes no more, wherever else they might go."""
    return len(entry.patches) >= CHANGES_MAX or sum(map(len, entry.patches)) >= CHANGE_BYTES_MAX


async def complete(engine: RunEngine, handover: Handover, outcome: CreateOutcome, now: datetime) -> None:
    """Do what is left, now that creating the run has ended thus: after this there is a run of this id with every change in it."""
    match outcome:
        case Existing(by="run_id"):
            if handover.changes:
                entry = handover.entry
                await engine.carry_over(entry.env_id, entry.run_id, handover.changes)
        case Existing(winner, by="request_key" | "idempotency_key" as by):
            await create_ended(engine, held.superseded(handover.creation, winner, by, now))
        case _:
            pass


async def create_ended(engine: RunEngine, creation: Creation) -> CreateOutcome:
    """Record a run whose end is decided, without those of its keys that are other runs' by now. Raises what the engine raises."""
    while True:
        (outcome,) = await engine.create_held_runs([creation])
        match outcome, creation.ending:
            case Existing(by="request_key" | "idempotency_key" as by), Ending() as ending if by not in ending.frees:
                freer = msgspec.structs.replace(ending, frees=(*ending.frees, by))
                creation = msgspec.structs.replace(creation, ending=freer)
            case _:
                return outcome


async def hand_over(engine: RunEngine, entry: Entry, now: datetime, cancelled_at: datetime | None = None) -> None:
    """Create the run of one entry, or find it there, with every change of the entry in it. Raises what the engine raises.

    With `cancelled_at` it is created cancelled, unless it has expired by then; one that is there already stays as it is, for the engine to cancel.
    """
    handover = read(entry, cancelled_at)
    (outcome,) = await engine.create_held_runs([handover.creation])
    await complete(engine, handover, outcome, now)
