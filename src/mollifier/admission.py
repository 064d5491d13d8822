"""1. Admission: the gate, then the buffer or the engine, for any number of triggers in a handful of round trips.

Whatever fails in the gate or the buffer, the runs are created. With diverting on, the buffer is the primary store of a mollified
run, and the refuge of any other of an enrolled organization whose engine is away. What goes to the engine goes first: when that fails for the triggers' own
sake, nothing has been held yet, and the call has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec

from mollifier import snapshots as encoding
from mollifier.buffer import (
    Acceptance,
    Accepted,
    AcceptOutcome,
    Buffer,
    DuplicateKey,
    DuplicateRun,
    KeyClaimed,
    Unconfirmed,
)
from mollifier.claims import Claim, bindings
from mollifier.cursors import as_us
from mollifier.deadline import within
from mollifier.engine import Created, Existing, RunEngine
from mollifier.errors import BufferUnavailableError, EngineUnavailableError
from mollifier.gate import Gate
from mollifier.keys import is_request_digest
from mollifier.model import Action, Decision, EntryKind, GateInputs, Snapshot, TriggerResult
from mollifier.settings import Settings
from mollifier.telemetry import Emit, Telemetry

_ENTRIES_PER_DEADLINE = 100
"""The deadline is for one entry; so many more take about as long again."""


class Triggered(msgspec.Struct, frozen=True):
    """The answer for the caller, and what is left to do once it has been sent (events whose hashes take time)."""

    result: TriggerResult
    after_answer: tuple[Emit, ...] = ()


Answers = dict[int, Triggered]
"""By place among the triggers that came together."""


class Admission:
    """Makes runs of snapshots that no key answers. `buffer` is None when none is configured."""

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        gate: Gate,
        buffer: Buffer | None,
        engine: RunEngine,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._buffer = buffer
        self._engine = engine
        self._telemetry = telemetry

    @property
    def diverts(self) -> bool:
        """True when a mollified run is held instead of created."""
        settings = self._settings()
        return self._buffer is not None and settings.enabled and settings.divert

    async def admit(
        self, snapshots: Sequence[Snapshot], inputs: Sequence[GateInputs], claim: Claim | None = None
    ) -> list[Triggered]:
        """Ask the gate of each, then hold it or create it; `claim` is what their keys are claimed with.

        Raises EngineUnavailableError when some of them found no store: others may have found theirs.
        """
        places = range(len(snapshots))
        diverts = self.diverts
        decisions = await self._decide(inputs)
        mollified = [place for place in places if decisions[place].action is Action.MOLLIFY]
        shadowed = [place for place in places if decisions[place].action is Action.SHADOW_LOG]
        emits = {place: self._would(snapshots[place]) for place in shadowed}
        if not diverts:
            emits.update(await self._copy(snapshots, mollified))
        to_hold = set(mollified) if diverts else set[int]()
        to_create = [place for place in places if place not in to_hold]
        answers: Answers = {}
        try:
            try:
                answers.update(await self._create(snapshots, to_create, emits))
            except EngineUnavailableError:
                may_hold = [decisions[place].enrolled and not inputs[place].bypasses for place in to_create]
                if not diverts or not all(may_hold):
                    raise
                answers.update(await self._hold(snapshots, places, claim))
                if len(answers) < len(places):
                    raise
            else:
                answers.update(await self._hold(snapshots, sorted(to_hold), claim))
                homeless = [place for place in places if place not in answers]
                answers.update(await self._create(snapshots, homeless, emits))
        except Exception:
            # What is held stays held without an answer: an audit that misses its event would miss the entry.
            for triggered in answers.values():
                for emit in triggered.after_answer:
                    emit()
            raise
        return [answers[place] for place in places]

    async def _decide(self, inputs: Sequence[GateInputs]) -> Sequence[Decision]:
        if self._buffer is None or not self._settings().enabled:
            return [Decision(action=Action.PASS_THROUGH)] * len(inputs)
        with self._telemetry.span("mollifier.gate") as span:
            decisions = await self._gate.decide_many(inputs)
            if len(decisions) == 1:
                span.set_attribute("mollifier.outcome", decisions[0].action.value)
            else:
                mollified = sum(decision.action is Action.MOLLIFY for decision in decisions)
                span.set_attribute("mollifier.items", len(decisions))
                span.set_attribute("mollifier.mollified", mollified)
        return decisions

    def _would(self, snapshot: Snapshot) -> Emit:
        return lambda: self._telemetry.would_mollify(snapshot, encoding.encode(snapshot))

    async def _create(self, snapshots: Sequence[Snapshot], places: Sequence[int], emits: Mapping[int, Emit]) -> Answers:
        if not places:
            return {}
        try:
            outcomes = await self._engine.create_runs([snapshots[place] for place in places])
        except Exception:
            # A copy is in the buffer whatever became of its run: an audit that misses its event would miss the copy.
            for place in places:
                if place in emits:
                    emits[place]()
            raise
        return {
            place: Triggered(answer(outcome), (emits[place],) if place in emits else ())
            for place, outcome in zip(places, outcomes, strict=True)
        }

    async def _hold(self, snapshots: Sequence[Snapshot], places: Sequence[int], claim: Claim | None) -> Answers:
        """Make the buffer the runs' primary store; those that it cannot take within its deadline are not among the answers.

        Nor are those that it took without confirming it: to create them directly as well is safe, for an entry whose run exists
        makes no second one.
        """
        answers: Answers = {}
        entries = [_held(snapshots[place], claim) for place in places]
        for place, entry, outcome in zip(places, entries, await self._accept(entries), strict=True):
            match outcome:
                case Accepted():
                    emit = partial(self._telemetry.buffered, snapshots[place], entry.payload)
                    answers[place] = Triggered(TriggerResult(entry.run_id), (emit,))
                case DuplicateRun():
                    # Held since it was sent before, and told of then.
                    answers[place] = Triggered(TriggerResult(entry.run_id))
                case DuplicateKey(winner, digest):
                    answers[place] = Triggered(TriggerResult(winner, is_cached=not is_request_digest(digest)))
                case Unconfirmed():
                    # It is in the buffer, whatever becomes of the trigger: an audit that misses its event would miss the entry.
                    self._telemetry.buffered(snapshots[place], entry.payload)
                case KeyClaimed() | None:
                    pass
        return answers

    async def _copy(self, snapshots: Sequence[Snapshot], places: Sequence[int]) -> Mapping[int, Emit]:
        """Write the audit copies; a failure is counted and logged, never the triggers'."""
        entries = [_entry(snapshots[place], EntryKind.AUDIT) for place in places]
        outcomes = await self._accept(entries)
        return {
            place: partial(self._telemetry.buffered, snapshots[place], entry.payload)
            for place, entry, outcome in zip(places, entries, outcomes, strict=True)
            if isinstance(outcome, Accepted)
        }

    async def _accept(self, entries: Sequence[Acceptance]) -> Sequence[AcceptOutcome | None]:
        """Store the entries; None stands for one that the buffer did not take."""
        if self._buffer is None or not entries:
            return [None] * len(entries)
        payload_bytes = sum(len(entry.payload) for entry in entries)
        settings = self._settings()
        deadline_ms = settings.accept_deadline_ms * -(-len(entries) // _ENTRIES_PER_DEADLINE)
        if settings.confirmation.is_asked:
            deadline_ms += settings.accept_confirm_timeout_ms
        try:
            with self._telemetry.span("mollifier.buffer.accept", {"mollifier.payload_bytes": payload_bytes}):
                outcomes = await within(deadline_ms, self._buffer.accept_many(entries))
        except Exception as error:  # noqa: BLE001 - a buffer fault of any kind never fails a trigger
            self._telemetry.failed_open("buffer", error)
            return [None] * len(entries)
        faults = [outcome for outcome in outcomes if isinstance(outcome, BufferUnavailableError)]
        for fault in faults[:1]:
            self._telemetry.failed_open("buffer", fault)
        if any(isinstance(outcome, Unconfirmed) for outcome in outcomes):
            missed = f"not confirmed within {settings.accept_confirm_timeout_ms} ms: {settings.accept_confirm}"
            self._telemetry.failed_open("confirmation", BufferUnavailableError(missed))
        return [None if isinstance(outcome, BufferUnavailableError) else outcome for outcome in outcomes]


def answer(outcome: Created | Existing) -> TriggerResult:
    """Return what the caller is told of a run that was created, or that answers instead."""
    match outcome:
        case Created(run_id):
            return TriggerResult(run_id)
        case Existing(run_id, by):
            return TriggerResult(run_id, is_cached=by == "idempotency_key")


def _held(snapshot: Snapshot, claim: Claim | None) -> Acceptance:
    return msgspec.structs.replace(
        _entry(snapshot, EntryKind.HELD),
        created_us=as_us(snapshot.created_at),
        parent_run_id=snapshot.parent_run_id,
        bindings=[binding for _, binding in bindings(snapshot)],
        token=claim.proof if claim else "",
    )


def _entry(snapshot: Snapshot, kind: EntryKind) -> Acceptance:
    return Acceptance(
        run_id=snapshot.run_id,
        env_id=snapshot.env_id,
        org_id=snapshot.org_id,
        payload=encoding.encode(snapshot),
        kind=kind,
    )
