"""1. The trigger path: validate, idempotency, gate, then the buffer or the engine, in this order.

A trigger that validation rejects, or that an idempotency key answers, never reaches the gate: it leaves nothing in the buffer and
counts against no rate. Whatever fails in the gate or the buffer, the run is created.

With diverting on, the buffer is the primary store of a mollified run, and the refuge of any other whose engine is away; a trigger
with a key claims it first (see `claims.py`). Only when neither store takes the run does the trigger fail.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec

from mollifier import snapshots
from mollifier.buffer import Accepted, Buffer, DuplicateKey, DuplicateRun, KeyClaimed
from mollifier.claims import Claim, Claims, bindings
from mollifier.deadline import within
from mollifier.engine import Created, Existing, RunEngine, TaskCatalog
from mollifier.errors import EngineUnavailableError, FieldError, InvalidRequestError, NotFoundError
from mollifier.gate import Gate
from mollifier.model import (
    IDEMPOTENCY_KEY_LIFETIME,
    REQUEST_KEY_LIFETIME,
    Action,
    EntryKind,
    Environment,
    GateInputs,
    Run,
    Snapshot,
    TriggerRequest,
    TriggerResult,
)
from mollifier.runs import Runs
from mollifier.settings import Settings
from mollifier.telemetry import Emit, Telemetry


class Triggered(msgspec.Struct, frozen=True):
    """The answer for the caller, and what is left to do once it has been sent (events whose hashes take time)."""

    result: TriggerResult
    after_answer: tuple[Emit, ...] = ()


class TriggerService:
    """Takes valid requests of authenticated environments and makes runs of them, through the gate.

    `buffer` and `claims` are None when no buffer is configured. `clock` returns the current moment in UTC; `new_run_id` a fresh run id.
    """

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        gate: Gate,
        buffer: Buffer | None,
        claims: Claims | None,
        engine: RunEngine,
        runs: Runs,
        tasks: TaskCatalog,
        telemetry: Telemetry,
        clock: Callable[[], datetime],
        new_run_id: Callable[[datetime], str],
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._buffer = buffer
        self._claims = claims
        self._engine = engine
        self._runs = runs
        self._tasks = tasks
        self._telemetry = telemetry
        self._clock = clock
        self._new_run_id = new_run_id

    async def trigger(self, environment: Environment, request: TriggerRequest) -> Triggered:
        """Trigger one run.

        Raises NotFoundError for an unknown task, InvalidRequestError for an unknown parent, EngineUnavailableError when no store can
        take the run.
        """
        snapshot = await self._snapshot(environment, request)
        inputs = gate_inputs(environment, request)
        if snapshot.idempotency_key is None and snapshot.request_key is None:
            return await self._admit(snapshot, inputs)
        if self._claims is None or not self._diverts():
            existing = await self._engine.find_by_keys(snapshot)
            return Triggered(_answer(existing)) if existing else await self._admit(snapshot, inputs)
        claim = await self._claims.take(snapshot)
        if isinstance(claim, Existing):
            return Triggered(_answer(claim))
        try:
            return await self._trigger_claimed(snapshot, inputs, claim)
        finally:
            # Bound to a held run by now, the keys are no longer the claim's, and stay.
            await self._claims.release(claim)

    async def _trigger_claimed(self, snapshot: Snapshot, inputs: GateInputs, claim: Claim) -> Triggered:
        """Trigger under a claim: nobody else makes a run of these keys meanwhile."""
        try:
            existing = await self._engine.find_by_keys(snapshot)
        except EngineUnavailableError as error:
            # Whether the key is taken shows when the run is created.
            self._telemetry.failed_open("engine", error)
            existing = None
        return Triggered(_answer(existing)) if existing else await self._admit(snapshot, inputs, claim)

    async def _admit(self, snapshot: Snapshot, inputs: GateInputs, claim: Claim | None = None) -> Triggered:
        """Ask the gate, then hold the run or create it."""
        emits: tuple[Emit, ...] = ()
        if self._buffer is not None and self._settings().enabled:
            match await self._decide(inputs):
                case Action.PASS_THROUGH:
                    pass
                case Action.SHADOW_LOG:
                    emits = (lambda: self._telemetry.would_mollify(snapshot, snapshots.encode(snapshot)),)
                case Action.MOLLIFY if self._diverts():
                    held = await self._hold(snapshot, claim)
                    if held is not None:
                        return held
                case Action.MOLLIFY:
                    emits = await self._copy_to_buffer(snapshot)
        try:
            (outcome,) = await self._engine.create_runs([snapshot])
        except Exception as error:
            # The copy is in the buffer whatever became of the run: an audit that misses its event would miss the copy.
            for emit in emits:
                emit()
            if not isinstance(error, EngineUnavailableError):
                raise
            held = await self._hold(snapshot, claim) if self._diverts() and not inputs.bypasses else None
            if held is None:
                raise
            return held
        return Triggered(_answer(outcome), emits)

    def _diverts(self) -> bool:
        settings = self._settings()
        return self._buffer is not None and settings.enabled and settings.divert

    async def _snapshot(self, environment: Environment, request: TriggerRequest) -> Snapshot:
        if not await self._tasks.knows(request.task_id):
            hint = "Tasks are recorded when a worker that has them in MOLLIFIER_TASKS boots."
            raise NotFoundError("task", request.task_id, "taskId", hint)
        parent = await self._parent(environment, request.parent_run_id)
        now = self._clock()
        return take_snapshot(environment, request, parent, self._new_run_id(now), now)

    async def _parent(self, environment: Environment, run_id: str | None) -> Run | None:
        if run_id is None:
            return None
        parent = await self._runs.get(environment, run_id)
        if parent is None:
            detail = f"no run {run_id!r} in this environment; give the id of the run that triggers this one"
            raise InvalidRequestError(FieldError("options.parentRunId", detail))
        return parent

    async def _decide(self, inputs: GateInputs) -> Action:
        with self._telemetry.span("mollifier.gate") as span:
            decision = await self._gate.decide(inputs)
            span.set_attribute("mollifier.outcome", decision.action.value)
            return decision.action

    async def _hold(self, snapshot: Snapshot, claim: Claim | None) -> Triggered | None:
        """Make the buffer the run's primary store; None when it cannot take the run within its deadline."""
        if self._buffer is None:
            return None
        payload = snapshots.encode(snapshot)
        try:
            with self._telemetry.span("mollifier.buffer.accept", {"mollifier.payload_bytes": len(payload)}):
                accept = self._buffer.accept(
                    snapshot.run_id,
                    snapshot.env_id,
                    snapshot.org_id,
                    payload,
                    kind=EntryKind.HELD,
                    created_ms=int(snapshot.created_at.timestamp() * 1000),
                    bindings=[binding for _, binding in bindings(snapshot)],
                    token=claim.token if claim else "",
                )
                outcome = await within(self._settings().accept_deadline_ms, accept)
        except Exception as error:  # noqa: BLE001 - a buffer fault of any kind never fails a trigger
            self._telemetry.failed_open("buffer", error)
            return None
        match outcome:
            case Accepted() | DuplicateRun():
                return Triggered(TriggerResult(snapshot.run_id), (lambda: self._telemetry.buffered(snapshot, payload),))
            case DuplicateKey(winner):
                return Triggered(TriggerResult(winner, is_cached=snapshot.idempotency_key is not None))
            case KeyClaimed():
                return None

    async def _copy_to_buffer(self, snapshot: Snapshot) -> tuple[Emit, ...]:
        """Write the audit copy; a failure is counted and logged, never the trigger's."""
        if self._buffer is None:
            return ()
        payload = snapshots.encode(snapshot)
        try:
            with self._telemetry.span("mollifier.buffer.accept", {"mollifier.payload_bytes": len(payload)}):
                accept = self._buffer.accept(
                    snapshot.run_id, snapshot.env_id, snapshot.org_id, payload, kind=EntryKind.AUDIT
                )
                await within(self._settings().accept_deadline_ms, accept)
        except Exception as error:  # noqa: BLE001 - a buffer fault of any kind never fails a trigger
            self._telemetry.failed_open("buffer", error)
            return ()
        return (lambda: self._telemetry.buffered(snapshot, payload),)


def gate_inputs(environment: Environment, request: TriggerRequest) -> GateInputs:
    """Return what the gate may know of the trigger."""
    return GateInputs(
        org_id=environment.org_id,
        env_id=environment.id,
        task_id=request.task_id,
        org_flags=environment.org_flags,
        debounce=request.debounce is not None,
        one_time_token=request.one_time_token is not None,
        trigger_and_wait=request.resume_parent_on_completion,
    )


def take_snapshot(
    environment: Environment, request: TriggerRequest, parent: Run | None, run_id: str, now: datetime
) -> Snapshot:
    """Fix the request at this moment: relative times become absolute, the parent's place in its tree is noted."""
    delay = request.debounce.delay if request.debounce else request.delay
    idempotent = request.idempotency_key is not None
    return Snapshot(
        run_id=run_id,
        org_id=environment.org_id,
        env_id=environment.id,
        task_id=request.task_id,
        created_at=now,
        payload=request.payload,
        payload_type=request.payload_type,
        context=request.context,
        metadata=request.metadata,
        metadata_type=request.metadata_type,
        tags=request.tags,
        idempotency_key=request.idempotency_key,
        idempotency_key_shown=request.idempotency_key_shown,
        idempotency_expires_at=now + (request.idempotency_lifetime or IDEMPOTENCY_KEY_LIFETIME) if idempotent else None,
        request_key=request.request_key,
        request_key_expires_at=now + REQUEST_KEY_LIFETIME if request.request_key is not None else None,
        delayed_until=now + delay if isinstance(delay, timedelta) else delay,
        ttl_s=int(request.ttl.total_seconds()) if request.ttl else None,
        debounce=request.debounce,
        queue=request.queue,
        concurrency_key=request.concurrency_key,
        priority=request.priority,
        machine=request.machine,
        region=request.region,
        max_attempts=request.max_attempts,
        max_duration_s=request.max_duration_s,
        test=request.test,
        lock_to_version=request.lock_to_version,
        external_deployment_id=request.external_deployment_id,
        bulk_action_id=request.bulk_action_id,
        parent_run_id=request.parent_run_id,
        root_run_id=(parent.snapshot.root_run_id or parent.id) if parent else None,
        depth=parent.snapshot.depth + 1 if parent else 0,
        resume_parent_on_completion=request.resume_parent_on_completion,
        batch_id=request.parent_batch,
        trigger_function=request.trigger_function,
        trigger_source=request.trigger_source,
        replayed_from=request.replayed_from,
        traceparent=request.traceparent,
        tracestate=request.tracestate,
    )


def _answer(outcome: Created | Existing) -> TriggerResult:
    match outcome:
        case Created(run_id):
            return TriggerResult(run_id)
        case Existing(run_id, by):
            return TriggerResult(run_id, is_cached=by == "idempotency_key")
