"""Valkey servers of a test's own, set up as the test says: badly, as a rule."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from mollifier.embedded import valkey_program
from tests.conftest import skipping_without_wheels

START_S = 20.0


@dataclass(frozen=True)
class Valkey:
    """One server: its URL, its TCP port if it has one, and its process."""

    url: str
    port: int
    process: subprocess.Popen[bytes]


@contextmanager
def valkey(*options: str, tcp: bool = False) -> Generator[Valkey]:
    """Run a Valkey with these options, as `--save 60 1`; it listens on a Unix socket, and on a port of loopback where asked."""
    with skipping_without_wheels():
        program = valkey_program()
    folder = Path(tempfile.mkdtemp(prefix="mollifier-"))
    port = free_port() if tcp else 0
    listening = ("--port", str(port), "--unixsocket", str(folder / "v.sock"), "--dir", str(folder), "--save", "")
    process = subprocess.Popen([program, *listening, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"unix://{folder}/v.sock"
        until_it_answers(url)
        yield Valkey(url, port, process)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def until_it_answers(url: str) -> None:
    """Return when the server answers anything at all, be it that one has to log in."""
    end = time.monotonic() + START_S
    while True:
        try:
            with redis.Redis.from_url(url) as client:  # pyright: ignore[reportUnknownMemberType] - untyped options
                client.ping()  # pyright: ignore[reportUnknownMemberType] - as above
        except redis.AuthenticationError:
            return
        except redis.RedisError:
            assert time.monotonic() < end, "Valkey did not start"
            time.sleep(0.01)
        else:
            return


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
