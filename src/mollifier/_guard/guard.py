"""The guard's loop: start the servers, do what the parent asks, stop them when it is gone."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from typing import Any, Literal

from mollifier._guard.folders import Folders
from mollifier._guard.parent import Ended, Failed, Order, Parent
from mollifier._guard.postgres import Postgres
from mollifier._guard.server import Server, Steps
from mollifier._guard.valkey import Valkey

TURN_S = 0.01


class Guard:
    """The servers of one stack."""

    def __init__(self, order: Order, parent: Parent, folders: Folders) -> None:
        self._parent = parent
        self._folders = folders
        self._servers: dict[str, Server] = {}
        if order.valkey is not None:
            self._servers["valkey"] = Valkey(
                folders, order.valkey, appendfsync=order.appendfsync if order.durable else None
            )
        if order.postgres is not None:
            self._servers["postgres"] = Postgres(folders, order.postgres, parent, durable=order.durable)

    def serve(self) -> None:
        """Start everything, then do what the parent asks until it ends. Raises Ended, or Failed when the first start does."""
        self._start(*self._servers)
        self._parent.tell(ready=self._state())
        while True:
            line = self._parent.next_line()
            try:
                self._obey(line)
            except Failed as failure:
                self._parent.tell(failed=str(failure))
            else:
                self._parent.tell(ready=self._state())

    def close(self) -> None:
        """Stop every server, whether or not the parent still lives."""
        stopping = [server.stop() for server in self._servers.values()]
        while stopping := [steps for steps in stopping if unfinished(steps)]:
            time.sleep(TURN_S)

    def _obey(self, line: dict[str, Any]) -> None:
        match line:
            case {"stop": str(name), "kill": bool(kill)}:
                self._carry_out(self._server(name).stop(kill=kill))
            case {"start": str(name)}:
                self._carry_out(self._server(name).until_it_answers_or_is_gone())
                if self._server(name).gone():
                    self._start(name)
            case _:
                raise Ended

    def _server(self, name: str) -> Server:
        if name not in self._servers:
            raise Failed(f"This stack was started without {name}.")
        return self._servers[name]

    def _start(self, *names: str) -> None:
        for name in names:
            self._parent.tell(progress=f"starting {self._servers[name].name}")
        self._carry_out(*(self._servers[name].start() for name in names))

    def _carry_out(self, *tasks: Steps) -> None:
        """Run the steps side by side, for as long as the parent lives."""
        waiting = list(tasks)
        while waiting := [steps for steps in waiting if unfinished(steps)]:
            self._parent.wait(TURN_S)

    def _state(self) -> dict[str, object]:
        pids = {name: server.process.pid for name, server in self._servers.items() if server.process is not None}
        folders = self._folders
        return {
            "data": str(folders.data),
            "run": str(folders.run),
            "temporary": [str(folder) for folder in folders.temporary],
            "pids": pids,
        }


def unfinished(steps: Steps) -> bool:
    """Take the next step, and tell whether there may be another."""
    return next(steps, "done") is None


def main() -> Literal[0, 1]:
    """Run the guard for the parent at the other end of standard input."""
    parent = Parent()
    with contextlib.ExitStack() as at_end:
        try:
            order = Order(**parent.next_line())
            folders = Folders(order.data)
            at_end.callback(folders.remove)
            folders.open(order, parent)
            os.umask(0o077)
            guard = Guard(order, parent, folders)
            at_end.callback(guard.close)
            guard.serve()
        except Ended:
            return 0
        except Failed as failure:
            parent.tell(failed=str(failure))
        except OSError as error:
            parent.tell(failed=f"{error}. Run this as a user who may use that path, or choose another data folder.")
        except Exception:  # noqa: BLE001 - the guard has no terminal: its parent shows what went wrong.
            parent.tell(failed=f"The guard of the embedded servers failed.\n{traceback.format_exc()}")
    return 1
