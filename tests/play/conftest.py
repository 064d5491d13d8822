"""Running the commands as a user does, and watching that nothing of them stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mollifier.embedded import EmbeddedUnavailable, postgres_programs, valkey_program
from mollifier.play.bursts import Traffic, together, write_trace

DEADLINE_S = 60.0
COMMAND = [sys.executable, "-m", "mollifier"]


class Ended(NamedTuple):
    """How a command ended. `record` is the JSON of its last line on stdout."""

    code: int
    stdout: str
    stderr: str

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.stdout.splitlines()[-1])


def mollifier(*arguments: object, **variables: str) -> Ended:
    """Run a command to its end, with these variables and none of our own from outside."""
    words = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(variables), timeout=100, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(*arguments: object, **variables: str) -> Generator[subprocess.Popen[str]]:
    """Start a command; it is killed when the block is left."""
    words = [*COMMAND, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment(variables)) as process:
        try:
            yield process
        finally:
            process.kill()


def environment(variables: dict[str, str]) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("MOLLIFIER_")}
    return {**kept, **{f"MOLLIFIER_{name.upper()}": text for name, text in variables.items()}}


def descendants(pid: int) -> set[int]:
    """Return the processes that this one started, and those that they started."""
    children: dict[int, list[int]] = {}
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, waiting = set[int](), [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found.update(new)
        waiting += new
    return found


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    except OSError:
        os.kill(pid, 0)
        return True
    return state != "Z"


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def until_gone(pids: set[int]) -> None:
    assert pids
    until(lambda: not any(map(is_running, pids)), f"{pids} are still there")


@pytest.fixture(scope="session", autouse=True)
def embedded_servers() -> None:
    try:
        valkey_program()
        postgres_programs()
    except EmbeddedUnavailable as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of quiet traffic with a burst of about 180 within 60 ms in it."""
    path = tmp_path_factory.mktemp("trace") / "burst.csv"
    times = together(Traffic(30, 2.0), Traffic(3000, 0.06, 0.8), seed=1)
    assert write_trace(path, times, seed=1) == len(times)
    return path


def rows(trace: Path) -> int:
    return len(trace.read_text().splitlines()) - 1


def stop(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(DEADLINE_S)
