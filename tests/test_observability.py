"""How a process shows itself: log lines and metrics."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
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
