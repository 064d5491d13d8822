"""`mollifier dev`: one stack for these tests, started as a user does."""

import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.play.conftest import descendants, is_running, mollifier, rows, started, stop, until, until_gone

FIELDS = {"url", "api_key", "admin_token", "redis_url", "database_url"}


def ready(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def call(address: dict[str, str], method: str, path: str, body: object = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {address['api_key']}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address["url"] + path, data, headers, method=method)  # noqa: S310 - our own server
    with urllib.request.urlopen(request) as response:  # noqa: S310 - as above
        return json.load(response)


def against(address: dict[str, str]) -> list[str]:
    options = {"--url": "url", "--api-key": "api_key", "--admin-token": "admin_token", "--database-url": "database_url"}
    return [word for option, name in options.items() for word in (option, address[name])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dev") / "data"


@pytest.fixture(scope="module")
def dev(folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    with started("dev", "--port", 0, "--data", folder, "--json", trip_threshold="5") as process:
        yield process, ready(process)


@pytest.fixture
def address(dev: tuple[subprocess.Popen[str], dict[str, str]]) -> dict[str, str]:
    return dev[1]


def test_it_says_in_one_line_all_that_a_program_needs(address: dict[str, str], folder: Path) -> None:
    assert set(address) == FIELDS
    assert stat.S_IMODE((folder / "credentials.json").stat().st_mode) == 0o600


def test_the_key_is_ready_and_the_demo_tasks_run(address: dict[str, str]) -> None:
    for task, payload, output in (("echo", {"a": [1, None]}, {"a": [1, None]}), ("sleep", 0.01, {"slept_s": 0.01})):
        run_id = call(address, "POST", f"/api/v1/tasks/{task}/trigger", {"payload": payload})["id"]
        path = f"/api/v3/runs/{run_id}"
        until(lambda path=path: call(address, "GET", path)["isCompleted"], "the run was not executed")
        assert call(address, "GET", path)["output"] == output


def test_it_says_nothing_before_its_tasks_can_be_triggered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module takes longer to import than the API takes to get ready."""
    (tmp_path / "slow_tasks.py").write_text(
        "import time\n\ntime.sleep(3)\n\n\ndef slow(payload):\n    return payload\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with started("dev", "--port", 0, "--data", tmp_path / "data", "--json", tasks="slow_tasks") as process:
        assert call(ready(process), "POST", "/api/v1/tasks/slow/trigger", {"payload": 1})["id"]


def test_a_trace_is_played_against_what_runs_already(address: dict[str, str], folder: Path, trace: Path) -> None:
    log = folder / "mollifier.log"
    ended = mollifier("replay", trace, *against(address), "--log-file", log, "--envs", 2, "--json")
    assert ended.code == 0, ended
    record = ended.record
    assert record["offered"] == record["accepted"] == record["runs_created"] == rows(trace)
    assert record["mollify"] == record["buffered"] == record["drained"] > 0


def test_books_that_do_not_balance_are_exit_code_1_and_say_why(address: dict[str, str], trace: Path) -> None:
    ended = mollifier("replay", trace, *against(address), "--task", "nobody/knows", "--limit", 5, "--speed", 50)
    assert ended.code == 1
    assert "5 calls were rejected (4xx)" in ended.stdout
    assert "5 x 404: " in ended.stdout


def test_a_key_of_somewhere_else_is_refused_before_anything_is_played(address: dict[str, str], trace: Path) -> None:
    ended = mollifier("replay", trace, *against({**address, "api_key": "tr_prod_unknown"}))
    assert ended.code == 2
    assert "--api-key: the database knows no such key" in ended.stderr


def test_a_port_that_is_taken_is_told_before_anything_starts(address: dict[str, str], tmp_path: Path) -> None:
    port = address["url"].rpartition(":")[2]
    ended = mollifier("dev", "--port", port, "--data", tmp_path / "other")
    assert ended.code == 2
    assert f"--port: {port} on 127.0.0.1 cannot be used" in ended.stderr
    assert not (tmp_path / "other").exists()


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def test_nothing_outlives_it_however_it_ends_and_the_next_start_has_the_same_key(
    dev: tuple[subprocess.Popen[str], dict[str, str]], folder: Path
) -> None:
    process, address = dev
    run_id = call(address, "POST", "/api/v1/tasks/echo/trigger", {"payload": 1})["id"]
    left = descendants(process.pid)
    assert len(left) >= 4
    if sys.platform == "linux":
        os.kill(next(pid for pid in left if "worker" in command_of(pid)), signal.SIGSTOP)
    stop(process, signal.SIGKILL)
    until_gone(left)
    with started("dev", "--port", 0, "--data", folder, "--json") as again:
        second = ready(again)
        assert (second["api_key"], second["admin_token"]) == (address["api_key"], address["admin_token"])
        assert call(second, "GET", f"/api/v3/runs/{run_id}")["payload"] == 1
        left = descendants(again.pid)
        assert all(map(is_running, left))
        assert stop(again, signal.SIGTERM) == 0
        assert not any(map(is_running, left))
