"""What has happened: every change of the world, step by step, what callers asked and were told, and what befell the servers.

The invariants read it; a failing seed shows its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from mollifier.model import Environment, Run, TriggerRequest, TriggerResult

Kind = Literal["trigger", "tag", "count", "cancel", "move", "reset", "read", "list", "replay"]
Outcome = Literal["answered", "refused", "unavailable", "broken"]
"""`refused`: a 4xx. `unavailable`: a 503. `broken`: no answer, or a 500; what it did, if anything, is unknown."""


@dataclass(slots=True, eq=False)
class Call:
    """One request of one caller, and what is known of it. `began` and `ended` are step numbers, moments are virtual seconds.

    `made` are the ids that its process made for runs of it, `engine_faults` and `buffer_faults` what it met on its way.
    """

    kind: Kind
    environment: Environment
    process: str
    began: int
    began_s: float
    requests: tuple[TriggerRequest, ...] = ()
    run_id: str = ""
    value: Any = None
    ended: int | None = None
    ended_s: float = 0.0
    outcome: Outcome | None = None
    results: tuple[TriggerResult, ...] = ()
    answer: Any = None
    made: list[str] = field(default_factory=list[str])
    mollified: int = 0
    engine_faults: int = 0
    engine_s: float = 0.0
    buffer_faults: Counter[str] = field(default_factory=Counter[str])
    over_caps: int = 0
    was_stopped: bool = False

    @property
    def met_faults(self) -> bool:
        """True when what became of it may not be what would have without faults."""
        return bool(self.engine_faults or self.buffer_faults or self.was_stopped or self.outcome == "broken")

    @property
    def asked(self) -> str:
        """What was asked, in a line."""
        keys = [key for one in self.requests for key in (one.idempotency_key, one.request_key) if key]
        parts = [self.kind, self.environment.id, self.run_id, *keys, "" if self.value is None else str(self.value)]
        return f"{' '.join(part for part in parts if part)} at {self.process}"

    @property
    def told(self) -> str:
        """What came of it, in a line."""
        results = " ".join(f"{one.run_id}{' (cached)' if one.is_cached else ''}" for one in self.results)
        return f"{self.outcome} {results or _shown(self.answer)}"


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""The request that the code that runs now is at work for; none in a drainer."""


@dataclass(slots=True, eq=False)
class Step:
    """One change of the world: a script that ran on the buffer's server, or a call that the engine carried out.

    `args` are those of the script's header, or the engine's method; `runs` those it is about.
    """

    number: int
    at_us: int
    by: str
    what: str
    args: Mapping[str, Any]
    reply: Any
    runs: tuple[str, ...] = ()

    @property
    def at_ms(self) -> int:
        """The moment, as scripts see it."""
        return self.at_us // 1000

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self.args.items() if name in _TELLING)
        runs = f" {' '.join(self.runs)}" if self.runs else ""
        return f"{self.what}{runs} ({shown}) by {self.by} -> {_shown(self.reply)}"


_TELLING = {
    *("attempts", "binding", "ended", "env_id", "kind", "lease", "not_before_ms", "number", "patches", "take", "token"),
    "changes",
}


class History:
    """Everything so far, in order. `journal` has what happened with its virtual second; its lines are made when they are read."""

    def __init__(self) -> None:
        self.steps = 0
        self.calls: list[Call] = []
        self.journal: list[tuple[float, str, Any]] = []
        self.failures: Counter[str] = Counter()
        """How often each held run's creation failed for its own sake, as far as its drainer was told."""

    def note(self, at_s: float, what: str, of: Any = "") -> None:
        self.journal.append((at_s, what, of))

    def shown(self, last: int) -> str:
        """Return the last things that happened, a line each."""
        return "\n".join(f"{at_s:10.6f}  {_line(what, of)}" for at_s, what, of in self.journal[-last:])


def _line(what: str, of: Any) -> str:
    match of:
        case Call():
            return f"{what}: {of.asked}" if what == "asks" else f"{what}: {of.asked} -> {of.told}"
        case _:
            return f"{what} {of}"


def _shown(value: Any) -> str:
    match value:
        case Run():
            return (
                f"{value.id} {value.status} {' '.join(value.snapshot.tags)} {(value.snapshot.metadata or b'').decode()}"
            )
        case [Run(), *_]:
            return f"[{', '.join(f'{run.id} {run.status}' for run in value)}]"
        case _:
            text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
