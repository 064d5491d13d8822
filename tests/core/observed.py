"""Telemetry that tests can look at: what was measured and traced is kept in memory."""

from __future__ import annotations

from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mollifier.telemetry import Telemetry


class OpenSpans(SpanProcessor):
    """Knows which spans have begun and not ended."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.spans.append(span)

    def on_end(self, span: ReadableSpan) -> None:
        self.spans = [open_one for open_one in self.spans if open_one.context != span.context]


class Observed:
    """A telemetry whose measurements and spans are kept in memory."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self._spans = InMemorySpanExporter()
        self._open = OpenSpans()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.tracer_provider.add_span_processor(self._open)
        self.telemetry = Telemetry(MeterProvider([self._reader]), self.tracer_provider)

    def points(self, name: str) -> dict[frozenset[tuple[str, Any]], float]:
        """Return what was measured under this name, by labels."""
        data = self._reader.get_metrics_data()
        found: dict[frozenset[tuple[str, Any]], float] = {}
        for resource in data.resource_metrics if data else ():
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics if m.name == name):
                for point in metric.data.data_points:
                    assert isinstance(point, NumberDataPoint | HistogramDataPoint)
                    value = point.value if isinstance(point, NumberDataPoint) else point.sum
                    found[frozenset((point.attributes or {}).items())] = value
        return found

    def open_spans(self) -> list[Any]:
        """Return the spans that have begun and not ended, oldest first."""
        return list(self._open.spans)

    def spans(self) -> list[Any]:
        """Return the spans that have ended, in that order."""
        return list(self._spans.get_finished_spans())


def labels(**named: str) -> frozenset[tuple[str, Any]]:
    return frozenset(named.items())
