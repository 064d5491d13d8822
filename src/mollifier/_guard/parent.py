"""The process that asked for the servers: what it asks, what it is told, and whether it still lives."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from dataclasses import dataclass
from typing import Any


class Ended(Exception):  # noqa: N818 - not an error: the parent is gone, or asked for the end.
    """The guard's time is over."""


class Failed(Exception):  # noqa: N818 - carries the sentence that the parent raises as an error.
    """The parent's order cannot be carried out; the message says why and what to do."""


@dataclass(frozen=True)
class Order:
    """What to start. `data=None` makes a temporary folder; a program of None leaves that server out.

    `appendfsync` is Valkey's setting of that name. `valkey` is the path of the server's program, `postgres` that of the folder of its programs. `claim_s` is how long to wait for another stack to let
    go of the data folder.
    """

    data: str | None
    durable: bool
    appendfsync: str
    fresh: bool
    valkey: str | None
    postgres: str | None
    claim_s: float


class Parent:
    """Speaks JSON lines.

    The parent's first line is an Order; later ones are `{"start": name}`, `{"stop": name, "kill": bool}` and `{"end": true}`. The answer to each is any
    number of `{"progress": text}` and then one `{"ready": {...}}` or `{"failed": text}`.
    """

    def __init__(self) -> None:
        self._pid = os.getppid()
        self._lines = b""
        self._signalled = False
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_signal)

    def _note_signal(self, *_: object) -> None:
        self._signalled = True

    def wait(self, seconds: float) -> None:
        """Wait for a line or for the time to pass. Raises Ended when the parent is gone or a signal asked the guard to end."""
        readable, _, _ = select.select([0, self._woken], [], [], seconds)
        if 0 in readable:
            chunk = os.read(0, 65536)
            if not chunk:
                raise Ended
            self._lines += chunk
        # A child that the parent forked may hold the pipe open beyond the parent's death: then the new parent's id tells.
        if self._signalled or os.getppid() != self._pid:
            raise Ended

    def next_line(self) -> dict[str, Any]:
        """Wait for what the parent asks next."""
        while b"\n" not in self._lines:
            self.wait(1.0)
        line, _, self._lines = self._lines.partition(b"\n")
        return json.loads(line)

    def tell(self, **message: object) -> None:
        """Answer; a parent that is gone is noticed by `wait`."""
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(message).encode() + b"\n")
