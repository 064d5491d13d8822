"""How a process shows itself: JSON lines for logs, OpenTelemetry for metrics and traces.

The core logs through standard `logging` and counts through the OpenTelemetry API; here both get their ends. A log line holds the
record's message as `event` and the members of its `fields`, never headers or payloads.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import msgspec
import structlog
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from structlog.typing import EventDict

from mollifier import config

_QUIET_LOGGERS = ("uvicorn", "procrastinate", "alembic", "sqlalchemy")


class LineHandler(logging.Handler):
    """Writes each record in one call, so that processes that append to the same file never mix their lines."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; a failure is the standard handler's to report."""
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            self.acquire()
            try:
                self._file.flush()
                os.write(self._file.fileno(), line)
            finally:
                self.release()
        except Exception:  # noqa: BLE001 - as every standard handler does
            self.handleError(record)

    def close(self) -> None:
        """Close the file, unless it is standard error."""
        if self._file is not sys.stderr:
            self._file.close()
        super().close()


def configure_logging(log_file: Path | None = None, level: int = logging.INFO) -> None:
    """Send the log of this process, as JSON lines, to standard error or to the end of a file, which is made where it is missing."""
    handler = LineHandler(sys.stderr if log_file is None else log_file.open("a", encoding="utf-8"))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _add_fields,
            ],
            processors=[
                structlog.processors.format_exc_info,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(serializer=_json),
            ],
        )
    )
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, LineHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class Observability(msgspec.Struct, frozen=True):
    """Where this process counts and traces to. `registry` is what `/metrics` shows."""

    registry: CollectorRegistry
    meter_provider: metrics.MeterProvider
    tracer_provider: trace.TracerProvider

    @property
    def traces(self) -> bool:
        """True when spans go anywhere."""
        return not isinstance(self.tracer_provider, trace.NoOpTracerProvider)

    def shutdown(self) -> None:
        """Send what is left, and stop."""
        for provider in (self.meter_provider, self.tracer_provider):
            if isinstance(provider, (MeterProvider, TracerProvider)):
                provider.shutdown()


def configure_telemetry(service_name: str, exporters: config.Exporters | None = None) -> Observability:
    """Set metrics and traces up: always for `/metrics`, and over OTLP where `OTEL_EXPORTER_OTLP_...` names an endpoint."""
    exporters = config.exporters() if exporters is None else exporters
    resource = _resource(service_name)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    readers: list[MetricReader] = [PrometheusMetricReader(registry=registry, scope_info_enabled=False)]
    if exporters.metrics:
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    meter_provider = MeterProvider(readers, resource, shutdown_on_exit=False)
    return Observability(registry, meter_provider, _tracer_provider(resource) if exporters.traces else _no_traces())


@contextmanager
def serving_metrics(registry: CollectorRegistry, port: int) -> Generator[None]:
    """Show the registry to Prometheus on this port of every IPv4 address, from a thread of its own, until the context is left.

    A scraper is on another machine as a rule, so loopback would not do. Raises OSError where the port cannot be had.
    """
    server, thread = start_http_server(port, addr="0.0.0.0", registry=registry)  # noqa: S104 - see above
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _resource(service_name: str) -> Resource:
    """Name the service, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES does."""
    named = Resource.create()
    if str(named.attributes.get("service.name", "")).startswith("unknown_service"):
        return named.merge(Resource({"service.name": service_name}))
    return named


def _tracer_provider(resource: Resource) -> trace.TracerProvider:
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _no_traces() -> trace.TracerProvider:
    return trace.NoOpTracerProvider()


def _add_fields(_logger: Any, _method: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    event.update(getattr(record, "fields", {}))
    return event


def _json(event: EventDict, **_: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=repr).decode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, in somebody's error message: escaped, it can be written.
        return json.dumps(event, default=repr)
