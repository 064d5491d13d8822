"""1. Admission: the gate, then the buffer or the engine, for any number of triggers in a handful of round trips.

Whatever fails in the gate or the buffer, the runs are created. With diverting on, the buffer is the primary store of a mollified
run, and the refuge of any other of an enrolled organization whose engine is away. What goes to the engine goes first: when that fails for the triggers' own
sake, nothing has been held yet, and the call has changed nothing.

What the buffer may not take because a cap is reached is created as well, or, where the settings say so, rejected. Triggers that come
together are rejected together, before anything has happened to any of them, so that to send them again makes nothing twice; those that
were let in and then find that others took their room meanwhile are created. Of triggers whose engine is away none is rejected: a
creation that failed may have happened all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

import msgspec

from mollifier import snapshots as encoding
from mollifier.buffer import (
    Acceptance,
    Accepted,
    Buffer,
    DuplicateKey,
    DuplicateRun,
    KeyClaimed,
    OverCap,
    Unconfirmed,
)
from mollifier.caps import NOTHING_HELD, Amount, Cap, exceeded, limits
from mollifier.claims import Claim
from mollifier.deadline import Breaker, within
from mollifier.engine import Created, Existing, RunEngine
from mollifier.errors import EngineNotAskedError, EngineUnavailableError, OverCapError
from mollifier.gate import Gate
from mollifier.holding import Holding, audit_copy, held_entry
from mollifier.keys import is_request_digest
from mollifier.model import Action, Decision, GateInputs, Snapshot, TriggerResult
from mollifier.refuge import SAFE_DEADLINE_MS, Refuge
from mollifier.runs import Runs
from mollifier.settings import Settings
from mollifier.telemetry import Emit, OverCapOutcome, Telemetry


class Triggered(msgspec.Struct, frozen=True):
    """The answer for the caller, and what is left to do once it has been sent (events whose hashes take time)."""

    result: TriggerResult
    after_answer: tuple[Emit, ...] = ()


Answers = dict[int, Triggered]
"""By place among the triggers that came together."""


class Admission:
    """Makes runs of snapshots that no key answers. `buffer` is None when none is configured.

    The `breaker` in front of buffer writes has nobody behind it but them: a write has its size to blame, too, when it is slow.
    """

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        gate: Gate,
        buffer: Buffer | None,
        engine: RunEngine,
        telemetry: Telemetry,
        refuge: Refuge,
        runs: Runs,
        breaker: Breaker | None = None,
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._has_buffer = buffer is not None
        self._holding = Holding(settings=settings, buffer=buffer, telemetry=telemetry, breaker=breaker or Breaker())
        self._engine = engine
        self._refuge = refuge
        self._runs = runs
        self._telemetry = telemetry

    @property
    def diverts(self) -> bool:
        """True when a mollified run is held instead of created."""
        settings = self._settings()
        return self._has_buffer and settings.enabled and settings.divert

    async def admit(
        self, snapshots: Sequence[Snapshot], inputs: Sequence[GateInputs], claim: Claim | None = None
    ) -> list[Triggered]:
        """Ask the gate of each, then hold it or create it; `claim` is what their keys are claimed with.

        Raises EngineUnavailableError when some of them found no store: others may have found theirs. Raises OverCapError when they are
        rejected: then nothing has happened to any of them.
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
        rejects = self._settings().held_over_cap == "reject"
        try:
            if rejects and len(places) > 1:
                await self._let_in(snapshots, sorted(to_hold), claim)
            may_hold = diverts and all(decisions[place].enrolled and not inputs[place].bypasses for place in to_create)
            try:
                engine = self._refuge if may_hold else self._engine
                answers.update(await self._create(engine, snapshots, to_create, emits))
            except EngineUnavailableError as outage:
                if not may_hold:
                    raise
                tried = [] if outage.unsent else to_create
                is_asked = not isinstance(outage, EngineNotAskedError)
                over_cap = "fail" if is_asked else "create"
                await self._hold(answers, snapshots, places, claim, over_cap=over_cap, tried=tried)
                if is_asked and len(answers) < len(places):
                    raise
            else:
                over_cap = "reject" if rejects and len(places) == 1 else "create"
                await self._hold(answers, snapshots, sorted(to_hold), claim, over_cap=over_cap)
            homeless = [place for place in places if place not in answers]
            answers.update(await self._create(self._engine, snapshots, homeless, emits))
        except Exception:
            # What is held stays held without an answer: an audit that misses its event would miss the entry.
            for triggered in answers.values():
                for emit in triggered.after_answer:
                    emit()
            raise
        return [answers[place] for place in places]

    async def assure(self, snapshots: Sequence[Snapshot], held: Sequence[Existing | None]) -> Sequence[Existing | None]:
        """See to it that the held runs that answer for some of these triggers are as safe as a run that is held for them would be.

        Whoever had them held may still wait for that, or have been refused for want of it. What is not confirmed is created. What the
        buffer has lost meanwhile, or does not tell any more, is no answer: the rest is returned. Raises EngineUnavailableError where one
        cannot be created.
        """
        org_id, env_id = snapshots[0].org_id, snapshots[0].env_id
        run_ids = sorted({existing.run_id for existing in held if existing is not None})
        if not run_ids or await self._holding.confirm(org_id, run_ids):
            return held
        safe = await self._make_safe(org_id, env_id, run_ids)
        return [existing if existing is not None and existing.run_id in safe else None for existing in held]

    async def _make_safe(self, org_id: str, env_id: str, run_ids: Sequence[str]) -> AbstractSet[str]:
        """Have the engine create held runs, within a deadline for all of them. Raises EngineUnavailableError where some are left."""
        try:
            return await within(SAFE_DEADLINE_MS, self._runs.make_safe(org_id, env_id, run_ids))
        except TimeoutError as error:
            raise EngineUnavailableError(
                f"what is held could neither be confirmed nor be created within {SAFE_DEADLINE_MS} ms; try again"
            ) from error

    async def _decide(self, inputs: Sequence[GateInputs]) -> Sequence[Decision]:
        if not self._has_buffer or not self._settings().enabled:
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

    async def _create(
        self,
        engine: RunEngine | Refuge,
        snapshots: Sequence[Snapshot],
        places: Sequence[int],
        emits: Mapping[int, Emit],
    ) -> Answers:
        if not places:
            return {}
        try:
            outcomes = await engine.create_runs([snapshots[place] for place in places])
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

    async def _let_in(self, snapshots: Sequence[Snapshot], places: Sequence[int], claim: Claim | None) -> None:
        """Raise OverCapError where those that are to be held do not all fit: all that came together are rejected."""
        entries = [held_entry(snapshots[place], claim) for place in places]
        cap = await self._holding.find_over_cap(entries)
        if cap is not None:
            self._telemetry.over_cap(snapshots, cap, "reject")
            raise self._rejection(cap, entries)

    def _rejection(self, cap: Cap, entries: Sequence[Acceptance]) -> OverCapError:
        amount = Amount(len(entries), sum(len(entry.payload) for entry in entries))
        too_small = exceeded(NOTHING_HELD, limits(self._settings()), amount)
        return OverCapError(too_small or cap, fits=too_small is None)

    async def _hold(
        self,
        answers: Answers,
        snapshots: Sequence[Snapshot],
        places: Sequence[int],
        claim: Claim | None,
        *,
        over_cap: OverCapOutcome,
        tried: Sequence[int] = (),
    ) -> None:
        """Make the buffer the runs' primary store; those that it cannot take within its deadline are not among the answers.

        Nor are those that it took without confirming it: to create them directly as well is safe, for an entry whose run exists
        makes no second one. Nor are those that a cap keeps out; `over_cap` is what becomes of them: raises OverCapError to reject.
        `tried` are those that the engine may have created, or may yet, without an answer.

        What was held before, and is not confirmed now, is created as well, or is not among the answers either, as in `assure`.
        """
        unsafe: dict[int, str] = {}
        entries = [held_entry(snapshots[place], claim, taken=place in tried) for place in places]
        for place, entry, outcome in zip(places, entries, await self._holding.accept(entries), strict=True):
            match outcome:
                case Accepted():
                    emit = partial(self._telemetry.buffered, snapshots[place], entry.payload)
                    answers[place] = Triggered(TriggerResult(entry.run_id), (emit,))
                case DuplicateRun(run_id, is_confirmed):
                    # Held since it was sent before, and told of then.
                    answers[place] = Triggered(TriggerResult(run_id))
                    unsafe.update({} if is_confirmed else {place: run_id})
                case DuplicateKey(winner, digest, is_confirmed):
                    answers[place] = Triggered(TriggerResult(winner, is_cached=not is_request_digest(digest)))
                    unsafe.update({} if is_confirmed else {place: winner})
                case Unconfirmed():
                    # It is in the buffer, whatever becomes of the trigger: an audit that misses its event would miss the entry.
                    self._telemetry.buffered(snapshots[place], entry.payload)
                case OverCap(cap):
                    self._telemetry.over_cap([snapshots[place]], cap, over_cap)
                    if over_cap == "reject":
                        raise self._rejection(cap, [entry])
                case KeyClaimed() | None:
                    pass
        if unsafe:
            safe = await self._make_safe(snapshots[0].org_id, snapshots[0].env_id, sorted({*unsafe.values()}))
            for place, run_id in unsafe.items():
                if run_id not in safe:
                    del answers[place]

    async def _copy(self, snapshots: Sequence[Snapshot], places: Sequence[int]) -> Mapping[int, Emit]:
        """Write the audit copies; a failure is counted and logged, never the triggers'."""
        entries = [audit_copy(snapshots[place]) for place in places]
        outcomes = await self._holding.accept(entries)
        return {
            place: partial(self._telemetry.buffered, snapshots[place], entry.payload)
            for place, entry, outcome in zip(places, entries, outcomes, strict=True)
            if isinstance(outcome, Accepted)
        }


def answer(outcome: Created | Existing) -> TriggerResult:
    """Return what the caller is told of a run that was created, or that answers instead."""
    match outcome:
        case Created(run_id):
            return TriggerResult(run_id)
        case Existing(run_id, by):
            return TriggerResult(run_id, is_cached=by == "idempotency_key")
