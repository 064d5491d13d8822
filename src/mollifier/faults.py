"""Points at which this process can be ended or held up on purpose: how tests prove that it may happen anywhere.

Between two answers of a store this process keeps nothing that outlives it. So the moments at which a crash can make a difference are those
before a store is asked and after it has answered, and whatever the flow asks passes one of two seams: `Server.run_many`, and the engine
that `Mollifier` is given. The points are there, named after what is asked: `valkey.pop.before`, `engine.create_runs.after`. So a
new script, command or operation of the engine has its points without a line of its own.

Only code installs a hook, and before the parts are built; no setting and no environment variable does. Without one a question to
the buffer costs two comparisons, and the engine is the engine itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar, cast

Hook = Callable[[str], None]
"""Called with the name of a point each time it is reached. It may end the process, or stop it."""

Moment = Literal["before", "after"]
T = TypeVar("T")

_hook: Hook | None = None
_scripts: dict[object, str] = {}


def install(hook: Hook | None) -> None:
    """Have the hook called at every point that parts built from now on reach; with None, no longer."""
    global _hook  # noqa: PLW0603 - the points are the process's, as is its end
    _hook = hook


def name_script(name: str, *spellings: str) -> None:
    """Tell what a script is called that the server is asked for by its hash or by its source."""
    _scripts.update(dict.fromkeys(spellings, name))


def reached(moment: Moment, commands: Sequence[Sequence[object]]) -> None:
    """Pass the points of these commands to the buffer's server, each once, in their order."""
    if _hook is not None:
        for name in dict.fromkeys(map(_name, commands)):
            _hook(f"valkey.{name}.{moment}")


def watched(engine: T) -> T:
    """Return the engine; while a hook is installed, in a wrapping that passes the points of each of its operations."""
    return engine if _hook is None else cast("T", _Watched(engine, _hook))


class _Watched:
    """Stands for an engine. A point after an operation is passed when it has ended, whether in an answer or an error."""

    def __init__(self, engine: object, hook: Hook) -> None:
        self._engine = engine
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._engine, name)
        if not inspect.iscoroutinefunction(operation):
            return operation

        @wraps(operation)
        async def between_points(*args: Any, **options: Any) -> Any:
            self._hook(f"engine.{name}.before")
            try:
                return await operation(*args, **options)
            finally:
                self._hook(f"engine.{name}.after")

        return between_points


def _name(command: Sequence[object]) -> str:
    verb = str(command[0])
    return _scripts.get(command[1], verb.lower()) if verb in ("EVALSHA", "EVAL") else verb.lower()
