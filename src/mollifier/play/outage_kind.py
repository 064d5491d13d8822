"""How the database may be away, as the command line names it."""

from __future__ import annotations

from enum import StrEnum


class OutageKind(StrEnum):
    """Shut down, or frozen (SIGSTOP): there, and silent."""

    SHUTDOWN = "shutdown"
    FREEZE = "freeze"
