"""What an operator can see: decisions counted, failures counted, the structured events, and spans.

Only the OpenTelemetry API and standard `logging` are used here; exporters and the JSON rendering belong to the server. Labels are
bounded: never an environment id, and an organization id only where the organization's flag is on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mollifier.caps import Cap
from mollifier.circuit import State
from mollifier.gauges import SweepGauges
from mollifier.model import Decision, Entry, GateInputs, Snapshot
from mollifier.repeats import RepeatedLog
from mollifier.settings import variable
from mollifier.sweeps import Repair, SweepReport

EVENTS_LOGGER = "mollifier.events"
_events = logging.getLogger(EVENTS_LOGGER)
_log = logging.getLogger("mollifier")
_propagator = TraceContextTextMapPropagator()
_STATE_VALUES = {State.CLOSED: 0, State.HALF_OPEN: 1, State.RAMPING: 1, State.OPEN: 2}

OverCapOutcome = Literal["create", "reject", "fail"]
"""A trigger's run is created directly, or the trigger is rejected, or it fails, because its engine is away as well."""


class Telemetry:
    """The one recorder of the flow: counters, events and the tracer. Nothing here raises or waits."""

    def __init__(
        self,
        meter_provider: metrics.MeterProvider | None = None,
        tracer_provider: trace.TracerProvider | None = None,
        repeated: RepeatedLog | None = None,
    ) -> None:
        self._repeated = repeated or RepeatedLog(_log)
        meter = (meter_provider or metrics.get_meter_provider()).get_meter("mollifier")
        self._tracer_provider = tracer_provider
        self.tracer = (tracer_provider or trace.get_tracer_provider()).get_tracer("mollifier")
        self._decisions = meter.create_counter("mollifier.decisions", description="What the gate decided")
        self._failures = meter.create_counter(
            "mollifier.failed_open", description="Failures of the gate and the buffer that a trigger survived"
        )
        self._sheltered = meter.create_counter(
            "mollifier.sheltered",
            description="Triggers that the buffer was to take because the engine, known to be away, was not asked",
        )
        self._over_cap = meter.create_counter(
            "mollifier.over_cap", description="Triggers that were not held because of a cap, by what became of them"
        )
        self._drained = meter.create_counter(
            "mollifier.drain.entries", description="Entries settled by the drainer, by outcome"
        )
        self._dwell = meter.create_histogram(
            "mollifier.drain.dwell", unit="ms", description="How long entries were in the buffer"
        )
        self._tick_failures = meter.create_counter(
            "mollifier.drain.faults",
            description="Faults that cost the drainer a tick, or the sweeper a sweep, by operation",
        )
        self._repairs = meter.create_counter(
            "mollifier.sweep.repairs", description="What the sweeper put right in the buffer, by kind"
        )
        self._sweep = SweepGauges(meter)

        self._breaker_changes = meter.create_counter(
            "mollifier.breaker.changes", description="Changes of a breaker's state, by the state it came to"
        )
        self._breaker_states = meter.create_gauge(
            "mollifier.breaker.state",
            description="Whether a breaker lets everything through (0), some (1) or nothing (2)",
        )
        self._told_states: dict[str, State] = {}

    def decided(self, inputs: GateInputs, decision: Decision) -> None:
        """Count one decision of the gate."""
        labels = {"outcome": decision.action.value, "enrolled": str(decision.enrolled).lower()}
        if decision.reason is not None:
            labels["reason"] = decision.reason
        if decision.enrolled:
            labels["org_id"] = inputs.org_id
        self._decisions.add(1, labels)

    def failed_open(self, part: str, error: BaseException, triggers: int = 1) -> None:
        """Count and log a failure that so many triggers survived; `part` is settings, flag, evaluator, buffer, caps, claim, confirmation, engine or limit."""
        self._failures.add(triggers, {"part": part})
        self._repeated.tell("mollifier.failed_open", part, part=part, error=describe(error))

    def sheltered(self, triggers: int) -> None:
        """Count triggers that the buffer is to take because the engine is known to be away."""
        self._sheltered.add(triggers)

    def over_cap(self, snapshots: Sequence[Snapshot], cap: Cap, outcome: OverCapOutcome) -> None:
        """Count and log triggers of one environment that a cap kept from being held, and what becomes of their runs."""
        self._over_cap.add(len(snapshots), {"cap": cap, "outcome": outcome})
        env_id, org_id = snapshots[0].env_id, snapshots[0].org_id
        self._repeated.tell("mollifier.over_cap", cap, cap=variable(cap), outcome=outcome, env_id=env_id, org_id=org_id)

    def unavailable(self, error: BaseException) -> None:
        """Log a request that found no store."""
        self._repeated.tell("mollifier.unavailable", error=describe(error))

    def would_mollify(self, snapshot: Snapshot, payload: bytes) -> None:
        """Say that this trigger would have been held; it was not, for the organization is only watched."""
        event("mollifier.would_mollify", **_identity(snapshot), **_payload(payload))

    def buffered(self, snapshot: Snapshot, payload: bytes) -> None:
        """Say that this trigger's snapshot is in the buffer."""
        event("mollifier.buffered", **_identity(snapshot), **_payload(payload))

    def drained(self, snapshot: Snapshot, entry: Entry) -> None:
        """Say that this entry came out of the buffer and was handled; `attempts` counts this one.

        Said before the entry is acknowledged: for one that is handed over twice it is said twice.
        """
        event(
            "mollifier.drained",
            **_identity(snapshot),
            **_payload(entry.payload),
            dwell_ms=entry.dwell_ms,
            attempts=entry.attempts + 1,
        )

    def settled(self, outcome: str, dwell_ms: int) -> None:
        """Count one entry settled by the drainer; `outcome` says which way it went, as in acked, requeued, failed or reclaimed.

        `given_up` became a run in SYSTEM_FAILURE; failed, reclaim_limit, malformed and evicted became dead letters.
        """
        self._drained.add(1, {"outcome": outcome})
        if outcome == "acked":
            self._dwell.record(dwell_ms)

    def faulted(self, operation: str, error: BaseException) -> None:
        """Count and log a fault the drainer survived; `operation` is list, pop, handle, ack, requeue, fail, extend, reclaim or sweep."""
        self._tick_failures.add(1, {"operation": operation})
        self._repeated.tell("mollifier.drain_fault", operation, operation=operation, error=describe(error))

    def swept(self, report: SweepReport | None) -> None:
        """Show what a sweep of this process found, for as long as no other is told; None when another process sweeps, or nobody."""
        self._sweep.report = report

    def repaired(self, kind: Repair, number: int) -> None:
        """Count what the sweeper put right."""
        self._repairs.add(number, {"kind": kind})

    def breaker_changed(self, breaker: str, state: State) -> None:
        """Count and show a breaker's new state, and log it once; `breaker` is buffer, claim, accept, read, create or engine.

        Finding out again and again that somebody is still away makes no more lines: an open breaker is told of once.
        """
        self._breaker_changes.add(1, {"breaker": breaker, "state": state.value})
        self._breaker_states.set(_STATE_VALUES[state], {"breaker": breaker})
        if state is not State.HALF_OPEN and state is not self._told_states.get(breaker, State.CLOSED):
            self._told_states[breaker] = state
            level = logging.WARNING if state is State.OPEN else logging.INFO
            _log.log(level, f"mollifier.{breaker}_breaker", extra={"fields": {"state": state.value}})

    def flush(self) -> None:
        """Log what was only counted so far: the process stops."""
        self._repeated.flush()

    @property
    def traces(self) -> bool:
        """True when spans may go anywhere."""
        provider = self._tracer_provider or trace.get_tracer_provider()
        return not isinstance(provider, trace.NoOpTracerProvider | trace.ProxyTracerProvider)

    def span(self, name: str, attributes: Mapping[str, Any] | None = None, traceparent: str | None = None) -> Any:
        """Open a span as a context manager: in the given caller's trace, else in the current one."""
        context = _context_of(traceparent, None)
        return self.tracer.start_as_current_span(name, context=context, attributes=attributes)

    def begin_span(
        self, name: str, attributes: Mapping[str, Any], traceparent: str | None, tracestate: str | None
    ) -> trace.Span:
        """Begin a span in the given caller's trace, else in the current one; it is not the current span, and its maker ends it."""
        return self.tracer.start_span(name, _context_of(traceparent, tracestate), attributes=attributes)


def current_trace() -> tuple[str | None, str | None]:
    """Return the current span's place in its trace as (traceparent, tracestate), for whatever goes on elsewhere; Nones without one."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent"), carrier.get("tracestate")


def event(name: str, **fields: Any) -> None:
    """Emit one structured event: a log record of `mollifier.events` whose message is the event's name."""
    _events.info(name, extra={"fields": fields})


def sha256(payload: bytes) -> str:
    """Return the hash by which the audit compares what went into the buffer with what came out."""
    return hashlib.sha256(payload).hexdigest()


def describe(error: BaseException) -> str:
    """Return the error in one line, for logs and for entries that are given up."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


Emit = Callable[[], None]


def _context_of(traceparent: str | None, tracestate: str | None) -> otel_context.Context:
    context = otel_context.get_current()
    if not traceparent:
        return context
    carrier = {"traceparent": traceparent, **({"tracestate": tracestate} if tracestate else {})}
    return _propagator.extract(carrier, context)


def _identity(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "run_id": snapshot.run_id,
        "env_id": snapshot.env_id,
        "org_id": snapshot.org_id,
        "task_id": snapshot.task_id,
    }


def _payload(payload: bytes) -> dict[str, Any]:
    return {"payload_bytes": len(payload), "payload_sha256": sha256(payload)}
