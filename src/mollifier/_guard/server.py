"""The processes of one server: started with the guard's precautions, stopped to the last of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mollifier._guard.parent import Failed

START_S = 60.0
STOP_S = 10.0
LOG_TAIL_BYTES = 3000

# The parent's environment could hold PGPORT, PGDATA, LC_ALL and the like, which Postgres obeys.
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

Steps = Iterator[None]
"""Work that yields wherever it waits."""


class User(NamedTuple):
    """Whom a server runs as when the guard is root."""

    uid: int
    gid: int


class Server(ABC):
    """A server that can be started again once the processes of its last start are gone."""

    name: str
    stop_signal: signal.Signals

    def __init__(self, log: Path, lock: int) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._log = log
        self._log_start = 0
        self._lock = lock
        self._lives = -1

    @abstractmethod
    def start(self) -> Steps:
        """Start it and wait until it answers. Raises Failed with the end of its log."""

    @abstractmethod
    def answers(self) -> bool:
        """Tell, in its own protocol, whether it serves."""

    def spawn(self, command: list[str], folder: Path, user: User | None) -> None:
        """Start the command in the folder.

        It inherits the lock on the data folder, so that no later stack takes the folder while a process of this one is left, and the writing end of a
        pipe, so that end-of-file on the other end tells when the last of its processes is gone.
        """
        self._lives, lives = os.pipe()
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=ENVIRONMENT,
                pass_fds=(self._lock, lives),
                preexec_fn=dies_with_guard(self.stop_signal),  # noqa: PLW1509 - the guard has one thread only.
                user=None if user is None else user.uid,
                group=None if user is None else user.gid,
                extra_groups=None if user is None else [],
            )
        os.close(lives)

    def until_it_answers(self) -> Steps:
        """Wait for the server that was just spawned."""
        deadline = time.monotonic() + START_S
        while not self.answers():
            if self.finished() is not None:
                raise self.failure("ended while starting")
            if time.monotonic() > deadline:
                raise self.failure(f"did not answer within {START_S:.0f} s")
            yield

    def finished(self) -> int | None:
        """Return the exit code of the process that was spawned, None while it runs."""
        return None if self.process is None else self.process.poll()

    def gone(self) -> bool:
        """Tell whether no process of this server is left."""
        if self.process is None:
            return True
        if not select.select([self._lives], [], [], 0)[0]:
            return False
        self.process.wait()
        os.close(self._lives)
        self.process = None
        return True

    def until_it_answers_or_is_gone(self) -> Steps:
        """Wait until it answers, or until no process of it is left: one that died may be on its way out for a while yet. Raises Failed."""
        deadline = time.monotonic() + START_S
        while not self.gone() and (self.finished() is not None or not self.answers()):
            if time.monotonic() > deadline:
                raise self.failure(f"neither answered nor ended within {START_S:.0f} s")
            yield

    def stop(self, *, kill: bool = False) -> Steps:
        """Stop it in its clean way, at once with `kill`, and by force once STOP_S have passed."""
        patience = time.monotonic() + (0 if kill else STOP_S)
        if not kill:
            self._signal(self.stop_signal)
            self._signal(signal.SIGCONT)
        while not self.gone():
            if time.monotonic() >= patience:
                self._signal(signal.SIGKILL)
                patience += 1.0
            yield

    def failure(self, what: str) -> Failed:
        """Make the error that shows what the server wrote since it was spawned, or the end of it."""
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - LOG_TAIL_BYTES))
            return Failed(f"{self.name} {what}. The end of its log:\n{log.read().decode(errors='replace').strip()}")
        return Failed(f"{self.name} {what}.")

    def _signal(self, number: signal.Signals) -> None:
        """Signal the server; SIGKILL goes to its children as well, which it could no longer tell."""
        if self.process is None or self.process.poll() is not None:
            return
        children = list(children_of(self.process.pid)) if number == signal.SIGKILL else []
        for pid in (self.process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def children_of(pid: int) -> Iterator[int]:
    """Yield the ids of a process's children (Linux; elsewhere they end by themselves when they notice that it is gone)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                yield int(stat.parent.name)


def dies_with_guard(number: signal.Signals) -> Callable[[], object] | None:
    """Return what a child calls to be sent the signal when the guard dies (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    pr_set_pdeathsig = 1
    return lambda: prctl(pr_set_pdeathsig, int(number))
