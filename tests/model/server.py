"""The model as a server: commands in, raw replies out, so that the real `Buffer` and `TripEvaluator` stand on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from redis.exceptions import NoScriptError

from mollifier.scripts import load
from mollifier.server import Command, Reply
from tests.core.support import SCRIPT_NAMES
from tests.core.test_scripts import Parameter, header_of, source
from tests.model.scripts import ScriptModel
from tests.model.store import Store


@cache
def _scripts() -> Mapping[str, tuple[str, Sequence[Parameter], Sequence[Parameter]]]:
    """Name, keys and arguments of each script, by its hash and by its source."""
    found: dict[str, tuple[str, Sequence[Parameter], Sequence[Parameter]]] = {}
    for name in SCRIPT_NAMES:
        script, header = load(name), header_of(source(name))
        found[script.sha] = found[script.source] = name, header.keys, header.args
    return found


class ModelServer:
    """Executes commands on the model: scripts by the names in their headers, everything else as the store knows it."""

    def __init__(self, now_us: int, model: type[ScriptModel] = ScriptModel) -> None:
        self.store = Store(now_us)
        self.model = model(self.store)
        self.known: set[str] = set()

    def execute(self, command: Command) -> Reply:
        """Return the raw reply; an error is returned, as within a pipeline, not raised."""
        call = script_call(command)
        if call is None:
            return self.store.run(command)
        name, named = call
        if command[0] == "EVALSHA" and name not in self.known:
            return NoScriptError("NOSCRIPT No matching script.")
        self.known.add(name)
        return self.run_script(name, named)

    def run_script(self, name: str, named: Mapping[str, Any]) -> Reply:
        """Run one script on the keys and arguments that its header names."""
        return getattr(self.model, name)(**named)

    def forget_scripts(self) -> None:
        self.known.clear()


def script_call(command: Command) -> tuple[str, Mapping[str, Any]] | None:
    """Return the script that a command runs, and what it is given by the names in its header; None for a plain command."""
    verb, *rest = command
    if verb not in ("EVALSHA", "EVAL"):
        return None
    name, keys, args = _scripts()[str(rest[0])]
    count = int(rest[1])
    return name, {**_named(keys, rest[2 : 2 + count]), **_named(args, rest[2 + count :])}


def _named(parameters: Sequence[Parameter], values: Sequence[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for parameter in parameters:
        place = parameter.position - 1
        named[parameter.name] = list(values[place:]) if parameter.variadic else values[place]
    return named


def missing_scripts() -> set[str]:
    """Name the scripts that the model does not have, or has with other parameters than their headers."""
    missing: set[str] = set()
    for name in SCRIPT_NAMES:
        header = header_of(source(name))
        method = getattr(ScriptModel, name, None)
        wanted = ["self", *(parameter.name for parameter in (*header.keys, *header.args))]
        if method is None or list(inspect.signature(method).parameters) != wanted:
            missing.add(name)
    return missing
