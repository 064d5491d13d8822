"""A buffer in memory that answers as the real one has to: the oracle of the fuzz tests.

It has no clock: a not-before moment is either far off or come, and a lease runs out when the test says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mollifier.buffer import Accepted, AcceptOutcome, DuplicateKey, DuplicateRun, Ready
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.scripts import Settlement


@dataclass
class Held:
    """One entry, and where it is."""

    run_id: str
    ready: Ready
    kind: EntryKind
    payload: bytes
    sequence: int
    key: tuple[str, str] | None
    state: EntryState = EntryState.QUEUED
    lease: int = 0
    attempts: int = 0
    reclaims: int = 0
    error: str | None = None


@dataclass
class Reference:
    """A name in a queue, which may outlive what it names."""

    run_id: str
    sequence: int
    far_off: bool = False


@dataclass
class Taken:
    """What a pop of one environment has to take."""

    run_ids: list[str] = field(default_factory=list[str])
    orphans: int = 0


class ModelBuffer:
    """Entries by run, references by environment, leases and failures by run."""

    def __init__(self, *, max_reclaims: int = 10) -> None:
        self._max_reclaims = max_reclaims
        self.entries: dict[str, Held] = {}
        self.queued: dict[Ready, list[Reference]] = {}
        self.waiting: dict[Ready, list[Reference]] = {}
        self.draining: dict[str, Ready] = {}
        self.failed: dict[str, Ready] = {}
        self.bound: dict[tuple[Ready, tuple[str, str]], str] = {}

    def expect_accept(self, run_id: str, ready: Ready, key: tuple[str, str] | None) -> AcceptOutcome | None:
        """Return what an accept has to answer, None for a fresh `Accepted`."""
        if run_id in self.entries:
            return DuplicateRun(run_id)
        if key is not None and (ready, key) in self.bound:
            return DuplicateKey(self.bound[ready, key])
        return None

    def accept(
        self, accepted: Accepted, ready: Ready, kind: EntryKind, payload: bytes, key: tuple[str, str] | None
    ) -> None:
        self.entries[accepted.run_id] = Held(accepted.run_id, ready, kind, payload, accepted.sequence, key)
        self._enqueue(self.queued, ready, Reference(accepted.run_id, accepted.sequence))
        if key is not None:
            self.bound[ready, key] = accepted.run_id

    def pop(self, ready: Ready, limit: int) -> Taken:
        """Bring back what is due, then take from the head; the caller notes the leases it got."""
        for reference in [r for r in self.waiting.get(ready, []) if not r.far_off]:
            self.waiting[ready].remove(reference)
            self._enqueue(self.queued, ready, reference)
        taken = Taken()
        for reference in self.queued.get(ready, [])[:limit]:
            self.queued[ready].remove(reference)
            if reference.run_id in self.entries:
                taken.run_ids.append(reference.run_id)
                self.draining[reference.run_id] = ready
            else:
                taken.orphans += 1
        return taken

    def leased(self, entry: Entry) -> None:
        held = self.entries[entry.run_id]
        held.state, held.lease = EntryState.DRAINING, entry.lease

    def holds(self, entry: Entry) -> Settlement:
        held = self.entries.get(entry.run_id)
        if held is None:
            return "missing"
        if held.state is EntryState.DRAINING and held.lease == entry.lease:
            return "held"
        return "stale"

    def ack(self, entry: Entry) -> Settlement:
        answer = self._settle(entry)
        if answer == "held":
            self._finish(entry.run_id, EntryState.MATERIALISED)
        return answer

    def fail(self, entry: Entry, error: str) -> Settlement:
        answer = self._settle(entry)
        if answer == "held":
            held = self._finish(entry.run_id, EntryState.FAILED)
            held.error, held.attempts = error, held.attempts + 1
            self.failed[entry.run_id] = held.ready
        return answer

    def requeue(self, entry: Entry, *, wait: bool, far_off: bool, attempts: int) -> Settlement:
        answer = self._settle(entry)
        if answer == "held":
            held = self.entries[entry.run_id]
            held.state, held.attempts = EntryState.QUEUED, held.attempts + attempts
            place = self.waiting if wait else self.queued
            self._enqueue(place, held.ready, Reference(entry.run_id, held.sequence, far_off))
        return answer

    def reclaim(self, run_ids: Iterable[str]) -> tuple[set[str], set[str]]:
        """Let these leases have run out; return the runs that come back, and those that did so once too often."""
        returned, failed = set[str](), set[str]()
        for run_id in run_ids:
            self.draining.pop(run_id)
            held = self.entries.get(run_id)
            if held is None:
                continue
            held.lease, held.reclaims = 0, held.reclaims + 1
            if held.reclaims > self._max_reclaims:
                self._finish(run_id, EntryState.FAILED)
                held.error = (
                    f"ReclaimLimit: its lease ran out {held.reclaims} times; whoever handled it died or hung each time"
                )
                self.failed[run_id] = held.ready
                failed.add(run_id)
            else:
                held.state = EntryState.QUEUED
                self._enqueue(self.queued, held.ready, Reference(run_id, held.sequence))
                returned.add(run_id)
        return returned, failed

    def lose(self, run_id: str) -> None:
        """Have an entry vanish, as by eviction; what names it stays."""
        del self.entries[run_id]

    def ready(self) -> set[Ready]:
        queued = {ready for ready, references in self.queued.items() if references}
        due = {ready for ready, references in self.waiting.items() if any(not r.far_off for r in references)}
        return queued | due

    def _settle(self, entry: Entry) -> Settlement:
        answer = self.holds(entry)
        if answer != "stale":
            self.draining.pop(entry.run_id, None)
        return answer

    def _finish(self, run_id: str, state: EntryState) -> Held:
        held = self.entries[run_id]
        held.state = state
        if held.key is not None and self.bound.get((held.ready, held.key)) == run_id:
            del self.bound[held.ready, held.key]
        return held

    @staticmethod
    def _enqueue(place: dict[Ready, list[Reference]], ready: Ready, reference: Reference) -> None:
        references = place.setdefault(ready, [])
        references.append(reference)
        references.sort(key=lambda r: r.sequence)
