"""1. The trigger path: validate, idempotency, gate, then the buffer or the engine, in this order.

A trigger that validation rejects, or that an idempotency key answers, never reaches the gate: it leaves nothing in the buffer and
counts against no rate. Whatever fails in the gate or the buffer, the run is created.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec

from mollifier import snapshots
from mollifier.buffer import Buffer
from mollifier.deadline import within
from mollifier.engine import Created, Existing, RunEngine, TaskCatalog
from mollifier.errors import FieldError, InvalidRequestError, NotFoundError
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
from mollifier.settings import Settings
from mollifier.telemetry import Emit, Telemetry


class Triggered(msgspec.Struct, frozen=True):
    """The answer for the caller, and what is left to do once it has been sent (events whose hashes take time)."""

    result: TriggerResult
    after_answer: tuple[Emit, ...] = ()


class TriggerService:
    """Takes valid requests of authenticated environments and makes runs of them, through the gate.

    `buffer` is None when no buffer is configured. `clock` returns the current moment in UTC; `new_run_id` a fresh run id.
    """

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        gate: Gate,
        buffer: Buffer | None,
        engine: RunEngine,
        tasks: TaskCatalog,
        telemetry: Telemetry,
        clock: Callable[[], datetime],
        new_run_id: Callable[[datetime], str],
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._buffer = buffer
        self._engine = engine
        self._tasks = tasks
        self._telemetry = telemetry
        self._clock = clock
        self._new_run_id = new_run_id

    async def trigger(self, environment: Environment, request: TriggerRequest) -> Triggered:
        """Trigger one run.

        Raises NotFoundError for an unknown task, InvalidRequestError for an unknown parent, EngineUnavailableError when the run
        cannot be stored.
        """
        snapshot = await self._snapshot(environment, request)
        if snapshot.idempotency_key is not None or snapshot.request_key is not None:
            existing = await self._engine.find_by_keys(snapshot)
            if existing is not None:
                return Triggered(_answer(existing))
        emits: tuple[Emit, ...] = ()
        if self._buffer is not None and self._settings().enabled:
            emits = await self._pass_gate(environment, request, snapshot)
        (outcome,) = await self._engine.create_runs([snapshot])
        return Triggered(_answer(outcome), emits)

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
        parent = await self._engine.get_run(environment.id, run_id)
        if parent is None:
            detail = f"no run {run_id!r} in this environment; give the id of the run that triggers this one"
            raise InvalidRequestError(FieldError("options.parentRunId", detail))
        return parent

    async def _pass_gate(
        self, environment: Environment, request: TriggerRequest, snapshot: Snapshot
    ) -> tuple[Emit, ...]:
        inputs = GateInputs(
            org_id=environment.org_id,
            env_id=environment.id,
            task_id=request.task_id,
            org_flags=environment.org_flags,
            debounce=request.debounce is not None,
            one_time_token=request.one_time_token is not None,
            trigger_and_wait=request.resume_parent_on_completion,
        )
        with self._telemetry.span("mollifier.gate") as span:
            decision = await self._gate.decide(inputs)
            span.set_attribute("mollifier.outcome", decision.action.value)
        match decision.action:
            case Action.PASS_THROUGH:
                return ()
            case Action.SHADOW_LOG:
                return (lambda: self._telemetry.would_mollify(snapshot, snapshots.encode(snapshot)),)
            case Action.MOLLIFY:
                return await self._copy_to_buffer(snapshot)

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
