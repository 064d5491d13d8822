"""What the flow tells of itself, taken down for the invariants instead of being logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import INVALID_SPAN, NoOpTracerProvider, Span

from mollifier.model import Decision, Entry, GateInputs, Snapshot
from mollifier.repeats import RepeatedLog
from mollifier.telemetry import Telemetry
from tests.simulation.history import Call, current_call

Decided = Callable[[Call | None, GateInputs, Decision], None]
Faulted = Callable[[str, str, BaseException], None]

_METERS = NoOpMeterProvider()
_TRACERS = NoOpTracerProvider()


class Told(Telemetry):
    """The telemetry of one process."""

    def __init__(self, process: str, *, on_decided: Decided, on_fault: Faulted) -> None:
        super().__init__(_METERS, _TRACERS, _Silent())
        self._process = process
        self._on_decided = on_decided
        self._on_fault = on_fault

    def decided(self, inputs: GateInputs, decision: Decision) -> None:
        self._on_decided(current_call.get(), inputs, decision)

    def failed_open(self, part: str, error: BaseException, triggers: int = 1) -> None:
        call = current_call.get()
        if call is not None:
            call.buffer_faults[part] += triggers

    def faulted(self, operation: str, error: BaseException) -> None:
        self._on_fault(self._process, operation, error)

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
