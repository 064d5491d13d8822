"""Runs the `mollifier` command in a process that does not outlive its parent: `python -m mollifier._child FD ARGUMENT...`.

FD is the reading end of a pipe whose other end only the parent holds and never writes to. The kernel closes that end however the parent
dies, SIGKILL included. Then this process is asked to stop as by its operator, and is gone soon after in any case: what it would still have
to do needs servers that end with the parent too. Linux wakes it when it has been stopped (SIGSTOP) by then, which it could not notice.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

GRACE_S = 3.0
_PR_SET_PDEATHSIG = 1


def watch(lifeline: int, grace_s: float = GRACE_S) -> None:
    """Block until the pipe's other end is closed, then end this process: by SIGTERM, and after the grace by force."""
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Watch the lifeline in a thread, and run the command."""
    lifeline = int(arguments[0])
    os.set_inheritable(lifeline, False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))
    threading.Thread(target=watch, args=(lifeline,), name="lifeline", daemon=True).start()

    from mollifier.cli import main as run_command  # noqa: PLC0415 - the watch comes first: imports take a while

    run_command(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
