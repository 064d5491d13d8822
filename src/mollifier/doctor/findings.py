"""What a check says: how bad it is, what was found, why that matters, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec


class Severity(StrEnum):
    """How bad it is, mildest first. `unknown` is a check that could not be made: it speaks neither for nor against the servers."""

    OK = "ok"
    INFO = "info"
    UNKNOWN = "unknown"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """Its place among the severities, 0 for the mildest."""
        return list(Severity).index(self)


class Judgement(msgspec.Struct, frozen=True):
    """What one check made of the facts. Only `ok` goes without a reason and without advice."""

    severity: Severity
    what: str
    why: str = ""
    fix: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A judgement under the name of its check, `part.check`: buffer.persistence, database.migrations, system.clocks."""

    check: str
    severity: Severity
    what: str
    why: str
    fix: str


def ok(what: str) -> Judgement:
    """Nothing to do."""
    return Judgement(Severity.OK, what)


def info(what: str, why: str, fix: str) -> Judgement:
    """Worth knowing; nothing is wrong."""
    return Judgement(Severity.INFO, what, why, fix)


def unknown(what: str, why: str, fix: str) -> Judgement:
    """The server does not tell, and somebody has to look for themselves."""
    return Judgement(Severity.UNKNOWN, what, why, fix)


def warning(what: str, why: str, fix: str) -> Judgement:
    """It hurts, or will when something else goes wrong."""
    return Judgement(Severity.WARNING, what, why, fix)


def critical(what: str, why: str, fix: str) -> Judgement:
    """It loses data, or does not work."""
    return Judgement(Severity.CRITICAL, what, why, fix)


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the worst severity among them, `ok` where there are none."""
    return max((finding.severity for finding in findings), key=lambda severity: severity.rank, default=Severity.OK)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0, 1 where the worst is a warning, 2 where something is critical: the codes of monitoring plugins."""
    return {Severity.WARNING: 1, Severity.CRITICAL: 2}.get(worst(findings), 0)
