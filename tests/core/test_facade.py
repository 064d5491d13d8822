"""Mollifier in one object: what it says when it is built."""

import subprocess
import sys

SCRIPT = """
import logging
from mollifier.facade import Mollifier
from mollifier.settings import Settings
from tests.core.engines import AnyTask, MemoryEngine

logging.basicConfig(format="%(levelname)s %(message)s %(fields)s")
for _ in range(3):
    Mollifier(Settings(enabled=ENABLED), engine=MemoryEngine(), tasks=AnyTask())
"""


def said_by_a_process(*, enabled: bool) -> list[str]:
    """What is logged by a process that builds three of them without a server."""
    script = SCRIPT.replace("ENABLED", str(enabled))
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return ended.stderr.splitlines()


def test_enabled_without_a_server_is_warned_of_once_in_a_process() -> None:
    (warning,) = said_by_a_process(enabled=True)
    assert warning.startswith("WARNING mollifier.no_buffer")
    assert "MOLLIFIER_REDIS_URL" in warning


def test_switched_off_without_a_server_nothing_is_said() -> None:
    assert said_by_a_process(enabled=False) == []
