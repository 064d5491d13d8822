"""What API and worker processes of an embedded stack are started with."""

from __future__ import annotations

from collections.abc import Mapping

from mollifier import config
from mollifier.rollout import Mode
from mollifier.settings import PREFIX, variable

DEMO_TASKS = "mollifier.demo_tasks"
_SERVER_VARIABLES = frozenset(
    {variable("database_url"), variable("redis_url")}
    | {variable(f"redis_{part}") for part in ("host", "port", "username", "password", "tls", "ca_file")}
)


class ChildEnvironment:
    """What API and worker processes are started with: this process's environment, the stack's servers, and the rollout's step.

    Configured servers are left out, and named in `ignored`. A mode that was asked for beats MOLLIFIER_ENABLED, _SHADOW_MODE and _DIVERT of
    the environment, named in `overruled`; without one these beat the default, monitor. `mode` is what comes of it. Raises SettingsError,
    naming the variable, for a setting with which the processes would not start. `settings` are those of
    the environment itself. `defaults` are variables for where it has none.
    """

    def __init__(
        self, inherited: Mapping[str, str], asked: Mode | None, defaults: Mapping[str, str] | None = None
    ) -> None:
        kept = {
            name.upper() if name.upper().startswith(PREFIX) else name: text
            for name, text in inherited.items()
            if text or not name.upper().startswith(PREFIX)
        }
        self.ignored = sorted(_SERVER_VARIABLES & kept.keys())
        for name in self.ignored:
            del kept[name]
        kept = {**(defaults or {}), **kept}
        given = config.load(kept)
        step = asked or Mode.MONITOR
        set_here = {name: bool(getattr(given, name)) for name in step.settings if variable(name) in kept}
        differing = sorted(variable(name) for name, value in set_here.items() if value != step.settings[name])
        self.overruled = differing if asked is not None else []
        self.mode = step if asked is not None else step.under(set_here)
        rollout = {variable(name): str(int(value)) for name, value in step.settings.items()}
        self.variables = {**kept, **rollout} if asked is not None else {**rollout, **kept}
        self.variables[variable("tasks")] = ",".join(dict.fromkeys([DEMO_TASKS, *given.tasks]))
        self.settings = given

    def on(self, *, redis_url: str, database_url: str, admin_token: str) -> dict[str, str]:
        """Return all variables, for these servers."""
        ours = {"redis_url": redis_url, "database_url": database_url, "admin_token": admin_token}
        return {**self.variables, **{variable(name): text for name, text in ours.items()}}
