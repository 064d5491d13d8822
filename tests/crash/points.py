"""The points at which a process of these tests dies or stops, and the fuse that sees to it.

`mollifier.faults` has a point before and after everything that is asked of the buffer's server or of the run engine. Here those of single
statements and commits are added, from SQLAlchemy's own events: they lie within an operation of the engine.
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec
from sqlalchemy import Engine, event

from mollifier import faults
from mollifier.engine import RunEngine

OPERATIONS = tuple(name for name, _ in inspect.getmembers(RunEngine, inspect.iscoroutinefunction))
"""What can be asked of a run engine."""


class Fault(msgspec.Struct, frozen=True):
    """What is to happen: at the `nth` time that the process reaches the point, or the nth point at all when none is named."""

    point: str | None
    nth: int = 1
    signal: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.signal.name} at {self.point or 'point'} #{self.nth}"


def afterwards(*names: str) -> tuple[Fault, ...]:
    """Return the death after each of these had its answer.

    To the stores it is the death before whatever would have been asked next.
    """
    return tuple(Fault(f"{name}.after") for name in names)


def stops(*points: str) -> tuple[Fault, ...]:
    """Return the standstill at each of these points."""
    return tuple(Fault(point, signal=signal.SIGSTOP) for point in points)


class Fuse:
    """Sends this process a signal when it reaches its point; before that it tells which point that is. `passed` has every point so far."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._fault: Fault | None = None
        self._left = 0
        self._operation: ContextVar[str] = ContextVar("operation", default="")
        self.passed: list[str] = []

    def arm(self, fault: Fault | None) -> None:
        """Count from now on."""
        self._fault = fault
        self._left = fault.nth if fault is not None else 0
        self.passed.clear()

    def install(self) -> None:
        """Watch every part that this process builds from now on."""
        faults.install(self)
        for moment, happening in (("before", "before_cursor_execute"), ("after", "after_cursor_execute")):
            event.listen(Engine, happening, self._listener(f"postgres.statement.{moment}"))
        event.listen(Engine, "commit", self._listener("postgres.commit.before"))

    def __call__(self, point: str) -> None:
        """Pass a point."""
        store, operation, moment = point.split(".")
        if store == "engine":
            self._operation.set(operation if moment == "before" else "")
        self.passed.append(point)
        fault = self._fault
        if fault is None or fault.point not in (None, point):
            return
        self._left -= 1
        if self._left == 0:
            self._fault = None
            self._tell(point)
            os.kill(os.getpid(), fault.signal)

    def _listener(self, point: str) -> Callable[..., None]:
        def listener(*_: Any) -> None:
            # What else a process asks its database, as its flags from time to time, belongs to no call and to no entry.
            if self._operation.get():
                self(point)

        return listener
