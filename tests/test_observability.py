"""How a process shows itself: log lines and metrics."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from mollifier.config import Exporters
from mollifier.model import Action, Decision, GateInputs
from mollifier.observability import LineHandler, configure_logging, configure_telemetry
from mollifier.telemetry import Telemetry, event

WRITER = """
import sys
from pathlib import Path
from mollifier.observability import configure_logging
from mollifier.telemetry import event
configure_logging(Path(sys.argv[1]))
for n in range(300):
    event("mollifier.buffered", run_id=f"{sys.argv[2]}-{n}", filler="x" * 3000)
"""

TRACED = """
from mollifier.model import Action, Decision, GateInputs
from mollifier.observability import configure_telemetry
from mollifier.telemetry import Telemetry
observability = configure_telemetry("mollifier-test")
telemetry = Telemetry(observability.meter_provider, observability.tracer_provider)
telemetry.decided(GateInputs(org_id="org_1", env_id="env_1"), Decision(action=Action.PASS_THROUGH))
with telemetry.span("mollifier.drain"):
    pass
observability.shutdown()
"""


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [one for one in root.handlers if isinstance(one, LineHandler)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_one_line_with_its_fields(tmp_path: Path) -> None:
    configure_logging(tmp_path / "log")
    event("mollifier.buffered", run_id="run_1", payload_bytes=3, odd={1, 2})
    (line,) = lines(tmp_path / "log")
    assert (line["event"], line["run_id"], line["payload_bytes"]) == ("mollifier.buffered", "run_1", 3)
    assert (line["level"], line["logger"]) == ("info", "mollifier.events")
    assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta(0)


def test_ordinary_records_and_exceptions_are_lines_too(tmp_path: Path) -> None:
    configure_logging(tmp_path / "log")
    try:
        raise ValueError("boom\nhalf \ud800")
    except ValueError:
        logging.getLogger("somewhere").exception("went %s", "wrong")
    logging.getLogger("somewhere").debug("not told")
    (line,) = lines(tmp_path / "log")
    assert (line["event"], line["level"]) == ("went wrong", "error")
    assert "ValueError: boom" in line["exception"]


def test_a_log_goes_to_standard_error_where_no_file_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    event("mollifier.drained", run_id="run_1")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["run_id"] == "run_1"


def test_a_log_is_appended_to_and_configuring_twice_writes_once(tmp_path: Path) -> None:
    for n in range(2):
        configure_logging(tmp_path / "log")
        event("mollifier.drained", run_id=str(n))
    assert [line["run_id"] for line in lines(tmp_path / "log")] == ["0", "1"]


def test_processes_that_share_a_file_never_mix_their_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "log")]
    writers = [subprocess.Popen([*command, str(n)]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert {line["run_id"] for line in lines(tmp_path / "log")} == {f"{w}-{n}" for w in range(3) for n in range(300)}


def test_each_setup_counts_for_itself_and_shows_it_to_prometheus() -> None:
    first, second = (configure_telemetry("mollifier-test", Exporters()) for _ in range(2))
    decision = Decision(action=Action.MOLLIFY, reason="per_env_rate", enrolled=True)
    Telemetry(first.meter_provider, first.tracer_provider).decided(GateInputs(org_id="org_1", env_id="env_1"), decision)
    shown = generate_latest(first.registry).decode()
    assert (
        'mollifier_decisions_total{enrolled="true",org_id="org_1",outcome="mollify",reason="per_env_rate"} 1.0' in shown
    )
    assert 'service_name="mollifier-test"' in shown
    assert "mollifier_decisions_total" not in generate_latest(second.registry).decode()
    assert not first.traces
    first.shutdown()
    second.shutdown()


# --- OTLP ----------------------------------------------------------------------------------------------------------


class Collector(ThreadingHTTPServer):
    """Takes what is sent over OTLP/HTTP and keeps it as it came, by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.taken: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Taking(BaseHTTPRequestHandler):
    server: Collector  # pyright: ignore[reportIncompatibleVariableOverride] - this handler serves no other

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.taken[self.path] = self.server.taken.get(self.path, b"") + body
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - inherited
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run_traced(**variables: str) -> None:
    """Run a process that counts one decision and traces one span, with no other `OTEL_...` than these."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("OTEL_")}
    environment = inherited | {"no_proxy": "127.0.0.1"} | variables
    subprocess.run([sys.executable, "-c", TRACED], check=True, env=environment)


def test_metrics_and_traces_go_to_the_endpoint_that_the_standard_variable_names(collector: Collector) -> None:
    run_traced(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_SERVICE_NAME="named-by-the-standard")

    assert collector.taken.keys() == {"/v1/metrics", "/v1/traces"}
    assert b"mollifier.decisions" in collector.taken["/v1/metrics"]
    assert b"mollifier.drain" in collector.taken["/v1/traces"]
    assert all(b"named-by-the-standard" in body for body in collector.taken.values())


def test_a_signal_with_an_endpoint_of_its_own_is_the_only_one_that_is_sent(collector: Collector) -> None:
    run_traced(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.url}/traces")

    assert collector.taken.keys() == {"/traces"}
    assert b"mollifier-test" in collector.taken["/traces"]
