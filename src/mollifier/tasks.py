"""Tasks: the Python callables that runs execute.

A module named in `MOLLIFIER_TASKS` offers its public functions as tasks, each under its own name:

    def send_invoice(payload): ...            # task id "send_invoice"

    @task("billing/refund")                   # any printable text
    async def refund(payload, context): ...   # a second parameter receives the TaskContext
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec

from mollifier.errors import SettingsError
from mollifier.settings import variable

TaskFunction = Callable[..., Any]
_F = TypeVar("_F", bound=TaskFunction)
_ID_ATTRIBUTE = "__mollifier_task_id__"


class TaskContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a task may know of the run it executes. `attempt` counts from 1."""

    run_id: str
    task_id: str
    env_id: str
    attempt: int
    created_at: datetime
    tags: tuple[str, ...] = ()
    is_test: bool = False


def task(task_id: str) -> Callable[[_F], _F]:
    """Give a function another task id than its name."""

    def mark(function: _F) -> _F:
        setattr(function, _ID_ATTRIBUTE, task_id)
        return function

    return mark


def discover(modules: Iterable[str]) -> Mapping[str, TaskFunction]:
    """Import the modules and return their tasks by id.

    Raises SettingsError, naming `MOLLIFIER_TASKS`, for a module that cannot be imported, one without a task, and two tasks of one id.
    """
    found: dict[str, TaskFunction] = {}
    for name in modules:
        tasks = dict(_tasks_of(_import(name)))
        if not tasks:
            raise SettingsError(variable("tasks"), f"module {name!r} defines no public function to run as a task")
        for task_id, function in tasks.items():
            if task_id in found and found[task_id] is not function:
                raise SettingsError(variable("tasks"), f"two tasks are called {task_id!r}; rename one with @task(...)")
            found[task_id] = function
    return found


def accepts_context(function: TaskFunction) -> bool:
    """Return whether the function takes a second positional argument, the TaskContext."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    return len(positional) >= 2  # noqa: PLR2004 - the payload and the context


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        looked = f"looked for in {Path.cwd()} and among what is installed"
        raise SettingsError(variable("tasks"), f"module {name!r} cannot be imported: {error} ({looked})") from error


def _tasks_of(module: ModuleType) -> Iterable[tuple[str, TaskFunction]]:
    for name, value in inspect.getmembers(module, inspect.isfunction):
        if value.__module__ == module.__name__ and not name.startswith("_"):
            yield getattr(value, _ID_ATTRIBUTE, name), value
