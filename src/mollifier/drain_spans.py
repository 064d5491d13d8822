"""4. The span of a drained entry: in its caller's trace, around all that is done with the entry, however that ends.

Every handling of an entry is one `mollifier.drain`, and recording that it was given up one `mollifier.give_up`. Entries that are handled
together have a span each, all of them open for as long as that takes; none is the current one, for what goes on belongs to all.
Where nobody traces, nothing is read of an entry, and no span is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.trace import Span, StatusCode

from mollifier import snapshots
from mollifier.errors import NonRetryableError
from mollifier.handling import GiveUp, Handler, Outcome, outcomes_of
from mollifier.model import Entry
from mollifier.telemetry import Telemetry, describe


def traced(handler: Handler, telemetry: Telemetry) -> Handler:
    """Return a handler of snapshots' entries that does the same, in spans; one whose entry was not handled has the outcome for its error."""

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        if not telemetry.traces:
            return await handler(entries)
        spans = [_begin("mollifier.drain", entry, telemetry) for entry in entries]
        outcomes: Sequence[Outcome] = []
        try:
            outcomes = await outcomes_of(handler, entries)
        except BaseException as error:
            outcomes = [error] * len(entries)
            raise
        finally:
            for span, outcome in zip(spans, outcomes, strict=True):
                _end(span, outcome)
        return outcomes

    return handle


def traced_giving_up(give_up: GiveUp, telemetry: Telemetry) -> GiveUp:
    """Return a `give_up` that does the same, in a span with the entry's error, or with that which kept it from being recorded."""

    async def give_up_traced(entry: Entry, error: BaseException) -> bool:
        if not telemetry.traces:
            return await give_up(entry, error)
        span = _begin("mollifier.give_up", entry, telemetry)
        outcome = error
        try:
            return await give_up(entry, error)
        except BaseException as unrecorded:
            outcome = unrecorded
            raise
        finally:
            _end(span, outcome)

    return give_up_traced


def _begin(name: str, entry: Entry, telemetry: Telemetry) -> Span:
    try:
        traceparent, tracestate = snapshots.trace_of(entry.payload)
    except NonRetryableError:
        # Whose trace it belongs to is lost with all else; that it failed shows all the same.
        traceparent, tracestate = None, None
    attributes = {
        "mollifier.run_id": entry.run_id,
        "mollifier.dwell_ms": entry.dwell_ms,
        "mollifier.attempts": entry.attempts + 1,
    }
    return telemetry.begin_span(name, attributes, traceparent, tracestate)


def _end(span: Span, outcome: Outcome) -> None:
    if outcome is not None:
        span.set_status(StatusCode.ERROR, describe(outcome))
    span.end()
