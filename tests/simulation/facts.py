"""What follows from the steps so far: of each entry who holds it and since when, of each key who claimed it, of each run what was asked.

Whoever looks while a step is being checked sees the facts from before it, and the stores from after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from mollifier import held, patches, snapshots
from mollifier.cursors import from_us
from mollifier.engine import Created
from mollifier.entries import parse
from mollifier.keys import Keyspace, PartitionKeys
from mollifier.model import Entry, Run, RunStatus, Snapshot, TriggerRequest
from mollifier.postgres.rows import run_of
from tests.model.store import Fields
from tests.simulation.engine import EngineServer
from tests.simulation.history import Call, History, Step
from tests.simulation.plan import Plan
from tests.simulation.server import START_US, BufferServer

if TYPE_CHECKING:
    from tests.simulation.process import Process


@dataclass(slots=True)
class Held:
    """What is known of one entry. `holder` and `lease` are those of the pop that has it.

    `is_marked`: somebody may have set out to create its run (see `handover.py`); `late`: it was changed after somebody had.
    `has_died`: it has been a dead letter, which ended the life of its idempotency key, whatever an operator did about it then.
    """

    kind: str
    env_id: str
    org_id: str
    sequence: int
    payload: bytes
    created_us: int
    was_popped: bool = False
    holder: str = ""
    lease: int = 0
    lease_ends_ms: int = 0
    not_before_ms: int = 0
    is_marked: bool = False
    late: bool = False
    cancelled_unmarked: bool = False
    has_died: bool = False


@dataclass(slots=True)
class Changes:
    """What callers were told of their changes to one run. `counts_asked` also has those whose answer is not known.

    `until` is where the last move led, unless `moves_open` says that others may have come in between.
    """

    tags: set[str] = field(default_factory=set[str])
    counts: int = 0
    counts_asked: int = 0
    moves_open: int = 0
    until: datetime | None = None
    is_cancelled: bool = False


class Facts:
    """The facts of one world."""

    def __init__(
        self, plan: Plan, keyspace: Keyspace, buffer: BufferServer, engine: EngineServer, history: History
    ) -> None:
        self.plan = plan
        self.keyspace = keyspace
        self.buffer = buffer
        self.store = buffer.store
        self.rows = engine.runs.rows
        self.history = history
        self.entries: dict[str, Held] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.requests: dict[str, TriggerRequest] = {}
        self.calls: dict[str, Call] = {}
        self.changes: dict[str, Changes] = {}
        self.claims: dict[str, tuple[str, int]] = {}
        self.answered: dict[str, int] = {}
        self.spoilt: set[str] = set()
        self.direct: set[str] = set()
        """Runs that were created without their entry, if they have one."""
        self.processes: list[Process] = []
        """All there have ever been."""
        self._keys: dict[str, PartitionKeys] = {env.org_id: keyspace.of(env.org_id) for env in plan.tenants}

    @property
    def now(self) -> datetime:
        """The true moment."""
        return from_us(self.buffer.now_us)

    # --- looking ---------------------------------------------------------------------------------------------------

    def keys(self, org_id: str) -> PartitionKeys:
        return self._keys[org_id]

    def fields(self, run_id: str) -> Fields | None:
        """Return the hash of the run's entry as it is now."""
        known = self.entries.get(run_id)
        return None if known is None else self.store.hashes.get(self._keys[known.org_id].entry(run_id))

    def members(self, key: str) -> Mapping[str, float]:
        return self.store.sets.get(key, {})

    def entry(self, run_id: str) -> Entry | None:
        """Return the run's entry as a reader has it."""
        fields = self.fields(run_id)
        found = None if fields is None else parse(run_id, {name.encode(): value for name, value in fields.items()})
        return found if isinstance(found, Entry) else None

    def run(self, run_id: str, now: datetime) -> Run | None:
        """Return the run as its callers see it, wherever it is; None when it is nowhere, or cannot be read."""
        row: Any = self.rows.get(run_id)
        if row is not None:
            return run_of(row, now)
        entry = self.entry(run_id)
        return None if entry is None or run_id in self.spoilt else held.run_of(entry, now)

    def stranded(self) -> Iterator[tuple[str, float]]:
        """Yield each entry under the lease of a drainer that has died, and when that was last heard of, in virtual seconds.

        A message that it had sent may have arrived after its death. Of audit copies, those that have expired are nobody's.
        """
        died = {process.name: process.died_at_s for process in self.processes if process.died_at_s is not None}
        if not died:
            return
        lease_ms = self.plan.settings.lease_ms
        for run_id, known in self.entries.items():
            if known.holder in died and self.fields(run_id) is not None:
                heard_s = (known.lease_ends_ms - lease_ms - START_US // 1000) / 1000
                yield run_id, max(died[known.holder], heard_s)

    def is_dead(self, run_id: str) -> bool:
        """Return whether the run is a dead letter."""
        return (self.fields(run_id) or {}).get("state") == b"FAILED"

    def came_back_too_often(self, run_id: str) -> bool:
        """Return whether so many holders of the entry have died that it is to be given up."""
        reclaims = int((self.fields(run_id) or {}).get("reclaims", b"0"))
        return reclaims > self.plan.settings.drain_max_reclaims

    def is_moving(self, run_id: str) -> bool:
        """True while a change that was made during an outage of the engine may be read in one place and not in the other.

        For ever, where somebody spoilt the entry that has it meanwhile: it is a dead letter then.
        """
        known = self.entries.get(run_id)
        if known is not None and known.late and run_id in self.spoilt:
            return True
        fields = self.fields(run_id) if known is not None and known.late else None
        return fields is not None and fields.get("state") in (b"QUEUED", b"DRAINING")

    def is_cancelled_aside(self, run_id: str) -> bool:
        """True for a run that was created directly, its accept having had no answer in time, and cancelled where the accept left it all the same."""
        known = self.entries.get(run_id)
        return known is not None and known.cancelled_unmarked and run_id in self.direct

    # --- learning --------------------------------------------------------------------------------------------------

    def meet(self, step: Step) -> None:
        """Get to know an entry that the step has made, or a run that stands beside one, before the step is looked at."""
        if step.what == "create_runs":
            self._meet_beside(step.runs)
        if step.what != "accept" or step.reply[0] != b"accepted":
            return
        args, run_id = step.args, step.runs[0]
        self.snapshots.setdefault(run_id, snapshots.decode(args["payload"]))
        self.entries[run_id] = Held(
            kind=args["kind"],
            env_id=args["env_id"],
            org_id=args["org_id"],
            sequence=step.reply[2],
            payload=args["payload"],
            created_us=args["created_us"],
            is_marked=bool(args["taken"]),
        )

    def _meet_beside(self, run_ids: Sequence[str]) -> None:
        """Take note of runs that were created directly, because the accept had no answer in time, after a change of the entry that it left."""
        self.direct.update(run_ids)
        for run_id in run_ids:
            known, fields = self.entries.get(run_id), self.fields(run_id)
            if known is not None and fields is not None and run_id in self.rows and fields.get("patches", b"0") != b"0":
                known.late = True

    def absorb(self, step: Step) -> None:
        """Learn from a step that has been looked at."""
        learn = getattr(self, f"_{step.what}", None)
        if learn is not None:
            learn(step)

    def asks(self, call: Call) -> None:
        """Take note of what is about to be asked."""
        changes = self.changes.setdefault(call.run_id, Changes()) if call.run_id else Changes()
        changes.counts_asked += call.kind == "count"
        # One that is made beside another may come before or after it: what comes of both is not known any more.
        changes.moves_open += (call.kind == "move") * (2 if changes.moves_open else 1)

    def made(self, call: Call, run_id: str) -> None:
        """Take note of the id that a trigger's run is to have; they are made in the order of the requests."""
        call.made.append(run_id)
        self.requests[run_id] = call.requests[len(call.made) - 1]
        self.calls[run_id] = call

    def told(self, call: Call) -> None:
        """Take note of what a caller knows from now on."""
        if call.kind == "move" and call.run_id and call.outcome in ("answered", "refused"):
            self.changes[call.run_id].moves_open -= 1
        if call.outcome != "answered":
            return
        for result in call.results:
            self.answered.setdefault(result.run_id, self.history.steps)
        changes, run = self.changes.get(call.run_id), call.answer
        if changes is None or not isinstance(run, Run):
            return
        match call.kind:
            case "tag":
                changes.tags.add(call.value)
            case "count":
                changes.counts += 1
            case "move":
                changes.until = run.snapshot.delayed_until
            case "cancel":
                changes.is_cancelled |= run.status is RunStatus.CANCELED
            case _:
                pass

    def _accept(self, step: Step) -> None:
        if step.reply[0] == b"accepted":
            for key in step.args["binding"]:
                self.claims.pop(key, None)

    def _pop(self, step: Step) -> None:
        for run_id, *flat in step.reply[1]:
            known = self.entries[run_id.decode()]
            known.was_popped = known.is_marked = True
            known.holder = step.by
            known.lease = int(flat[flat.index(b"lease") + 1])
            known.lease_ends_ms = step.at_ms + step.args["lease_ms"]
            known.not_before_ms = 0

    def _extend(self, step: Step) -> None:
        if step.reply == b"held":
            self.entries[step.runs[0]].lease_ends_ms = step.at_ms + step.args["lease_ms"]

    def _requeue(self, step: Step) -> None:
        if step.reply == b"held":
            self._let_go(step.runs[0])
            self.entries[step.runs[0]].not_before_ms = step.args["not_before_ms"]

    def _reclaim(self, step: Step) -> None:
        if step.reply in (b"held", b"failed"):
            self._let_go(step.runs[0])
            self.entries[step.runs[0]].has_died |= step.reply == b"failed"

    def _revive(self, step: Step) -> None:
        if step.reply == b"revived":
            self._let_go(step.runs[0])
            self.entries[step.runs[0]].not_before_ms = 0

    def _fail(self, step: Step) -> None:
        if step.reply == b"held":
            self._let_go(step.runs[0])
            self.entries[step.runs[0]].has_died = True

    def _ack(self, step: Step) -> None:
        for run_id, verdict in zip(step.runs, step.reply, strict=True):
            if verdict == b"held":
                self._let_go(run_id)

    def _let_go(self, run_id: str) -> None:
        known = self.entries[run_id]
        known.holder, known.lease = "", 0

    def _patch(self, step: Step) -> None:
        if step.reply == b"held":
            known = self.entries[step.runs[0]]
            # A run that was created directly, because the accept had no answer in time, has an entry that nobody could mark.
            known.late |= known.is_marked or step.runs[0] in self.rows
            if isinstance(patches.decode([step.args["patch"]])[0], patches.Cancel):
                known.cancelled_unmarked |= not known.is_marked
                known.is_marked = True

    def _claim(self, step: Step) -> None:
        for key, (outcome, _) in zip(step.args["binding"], step.reply, strict=False):
            if outcome == b"claimed":
                self.claims[key] = step.args["token"], step.at_ms + step.args["lifetime_ms"]
            elif outcome == b"doubted":
                self.claims.pop(key, None)

    def _prolong(self, step: Step) -> None:
        for key in step.args["binding"]:
            token, ends_ms = self.claims.get(key, ("", 0))
            if token == step.args["token"] and ends_ms > step.at_ms:
                self.claims[key] = token, step.at_ms + step.args["lifetime_ms"]

    def _release(self, step: Step) -> None:
        for key in step.args["binding"]:
            if self.claims.get(key, ("", 0))[0] == step.args["token"]:
                del self.claims[key]

    def _create_runs(self, step: Step) -> None:
        if isinstance(step.reply, Exception):
            return
        for creation, outcome in zip(step.args["creations"], step.reply, strict=True):
            if isinstance(outcome, Created):
                self.snapshots.setdefault(outcome.run_id, creation.snapshot)


def count_of(run: Run) -> int:
    """Return what the run's metadata counts."""
    return msgspec.json.decode(run.snapshot.metadata or b"{}").get("n", 0)
