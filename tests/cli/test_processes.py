import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.cli.conftest import Cli

DEADLINE_S = 60


@contextmanager
def running(*arguments: str, **settings: str) -> Generator[subprocess.Popen[str]]:
    """`mollifier` as a process with nothing but these settings; killed in the end if it still runs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOLLIFIER_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mollifier", *arguments],
        env=environment | {f"MOLLIFIER_{name.upper()}": value for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def events(log: str) -> dict[str, Any]:
    """The events of a log by their name; every line of it is JSON."""
    return {line["event"]: line for line in map(json.loads, log.splitlines())}


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < end
        time.sleep(0.02)


def test_serve_says_where_it_listens_answers_and_stops_on_sigterm(database_url: str, redis_url: str) -> None:
    settings = {"database_url": database_url, "redis_url": redis_url, "enabled": "1"}
    with running("serve", "--port", "0", "--json", **settings) as process:
        assert process.stdout is not None
        url: str = json.loads(process.stdout.readline())["url"]
        with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (0, "")
    assert events(err)["mollifier.api_started"]["url"] == url


def test_serve_names_an_address_it_cannot_have(configured: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = configured("serve", "--port", str(port))
    assert ended.code == 1
    assert f"127.0.0.1:{port}" in ended.err
    assert "Traceback" not in ended.err


def test_worker_records_its_tasks_logs_to_a_file_and_stops_on_sigterm(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    settings = {"database_url": database_url, "redis_url": redis_url, "tasks": "mollifier.demo_tasks", "enabled": "1"}
    with running("worker", "--log-file", str(log), **settings) as process:
        until(lambda: log.exists() and "mollifier.worker_started" in log.read_text(), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (0, "")
    assert err == f"Logging to {log}.\n"
    started = events(log.read_text())["mollifier.worker_started"]
    assert "echo" in started["tasks"]
    assert started["draining"] is True


def test_a_worker_that_is_started_as_a_program_has_the_tasks_of_the_folder_it_is_started_in(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "myapp").mkdir()
    (tmp_path / "myapp" / "tasks.py").write_text("def send_invoice(payload): ...\n")
    log = tmp_path / "worker.log"
    settings = {"MOLLIFIER_DATABASE_URL": database_url, "MOLLIFIER_TASKS": "myapp.tasks"}
    program = Path(sys.executable).with_name("mollifier")
    with subprocess.Popen(
        [program, "worker", "--log-file", log],
        cwd=tmp_path,
        env=os.environ | settings,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            until(lambda: log.exists() and "mollifier.worker_started" in log.read_text(), process)
        finally:
            process.kill()
    assert events(log.read_text())["mollifier.worker_started"]["tasks"] == ["send_invoice"]


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(("name", "value"), [("MOLLIFIER_HOLD_MS", "soon"), ("MOLLIFIER_DATABASE_URL", "")])
def test_a_bad_setting_stops_the_process_at_boot_with_its_name(
    configured: Cli, monkeypatch: pytest.MonkeyPatch, command: str, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    ended = configured(command)
    assert ended.code == 2
    assert name in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_a_task_module_that_is_not_there_is_named(configured: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLLIFIER_TASKS", "no.such.module")
    ended = configured("worker")
    assert ended.code == 2
    assert "MOLLIFIER_TASKS: module 'no.such.module' cannot be imported" in ended.err


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_log_file_that_cannot_be_written_is_bad_usage(configured: Cli, tmp_path: Path, command: str) -> None:
    ended = configured(command, "--log-file", str(tmp_path))
    assert ended.code == 2
    assert "--log-file" in ended.err
