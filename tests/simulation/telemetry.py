"""What the flow tells of itself, taken down for the invariants instead of being logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import INVALID_SPAN, NoOpTracerProvider, Span

from mollifier.caps import Cap
from mollifier.model import Decision, Entry, GateInputs, Snapshot
from mollifier.repeats import RepeatedLog
from mollifier.sweeps import Repair
from mollifier.telemetry import OverCapOutcome, Telemetry
from tests.simulation.history import Call, current_call

Decided = Callable[[Call | None, GateInputs, Decision], None]
Faulted = Callable[[str, str, BaseException], None]
Repaired = Callable[[str, str], None]

_METERS = NoOpMeterProvider()
_TRACERS = NoOpTracerProvider()


class Told(Telemetry):
    """The telemetry of one process."""

    def __init__(self, process: str, *, on_decided: Decided, on_fault: Faulted, on_repair: Repaired) -> None:
        super().__init__(_METERS, _TRACERS, _Silent())
        self._process = process
        self._on_decided = on_decided
        self._on_fault = on_fault
        self._on_repair = on_repair

    def decided(self, inputs: GateInputs, decision: Decision) -> None:
        self._on_decided(current_call.get(), inputs, decision)

    def failed_open(self, part: str, error: BaseException, triggers: int = 1) -> None:
        call = current_call.get()
        if call is not None and part == "engine":
            call.engine_faults += 1
        elif call is not None:
            call.buffer_faults[part] += triggers

    def sheltered(self, triggers: int) -> None:
        call = current_call.get()
        if call is not None:
            call.engine_faults += 1

    def faulted(self, operation: str, error: BaseException) -> None:
        self._on_fault(self._process, operation, error)

    def over_cap(self, snapshots: Sequence[Snapshot], cap: Cap, outcome: OverCapOutcome) -> None:
        call = current_call.get()
        if call is not None:
            call.over_caps += 1

    def repaired(self, kind: Repair, number: int) -> None:
        self._on_repair(self._process, kind)

    def would_mollify(self, snapshot: Snapshot, payload: bytes) -> None:
        """Not heard."""

    def buffered(self, snapshot: Snapshot, payload: bytes) -> None:
        """Not heard."""

    def drained(self, snapshot: Snapshot, entry: Entry) -> None:
        """Not heard."""

    @contextmanager
    def span(
        self, name: str, attributes: Mapping[str, Any] | None = None, traceparent: str | None = None
    ) -> Generator[Span]:
        yield INVALID_SPAN


class _Silent(RepeatedLog):
    """Says nothing."""

    def __init__(self) -> None:
        super().__init__(logging.getLogger("tests.simulation"))

    def tell(self, event: str, kind: str = "", /, **fields: Any) -> None:
        """Not heard."""
