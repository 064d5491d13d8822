"""Valkey, on a Unix socket."""

from __future__ import annotations

import contextlib
import signal
import socket

from mollifier._guard.folders import Folders
from mollifier._guard.server import Server, Steps


class Valkey(Server):
    """`appendfsync` says when its append-only file is synced; None keeps no file, so that every start is an empty server."""

    name = "Valkey"
    stop_signal = signal.SIGTERM

    def __init__(self, folders: Folders, program: str, *, appendfsync: str | None) -> None:
        super().__init__(folders.log("valkey"), folders.lock)
        self.socket = folders.run / "valkey.sock"
        self._folders = folders
        self._program = program
        self._appendfsync = appendfsync

    def start(self) -> Steps:
        """See Server."""
        user = self._folders.valkey_user
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "no" if self._appendfsync is None else "yes",
            "appendfsync": self._appendfsync or "no",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.spawn([self._program, *words], self._folders.own(self._folders.data / "valkey", user), user)
        yield from self.until_it_answers()

    def answers(self) -> bool:
        """See Server. While it reads its append-only file the answer is -LOADING."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            client.connect(str(self.socket))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        return False
