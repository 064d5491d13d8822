"""What the structured log says of a play: events counted by environment, and the audit's join of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from mollifier.audit import BUFFERED, DRAINED, WOULD_MOLLIFY, Audit, Report
from mollifier.play.evidence import EvidenceError


class _Event(msgspec.Struct):
    event: str = ""
    run_id: str = ""
    env_id: str = ""
    attempts: int = 1


_event = msgspec.json.Decoder(_Event)
ENTRY_FAILED = "mollifier.entry_failed"
_MARKS = (BUFFERED.encode(), DRAINED.encode(), WOULD_MOLLIFY.encode(), ENTRY_FAILED.encode())


class Journal:
    """Follows the structured log from its present end on.

    `counts` has each environment's events by name; `attempts_used_up` counts entries that were drained at a later attempt than the first,
    or given up. Other traffic than this play's is left out once `only` is given.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._audit = Audit()
        self.attempts_used_up = 0
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.only: Callable[[str], bool] | None = None

    def read(self) -> Report:
        """Take in what was written since and return the audit of all of it. A line that is not yet complete waits for its end."""
        try:
            with self._path.open("rb") as file:
                self._audit.read(str(self._path), self._new_lines(file))
        except OSError as error:
            raise EvidenceError(f"the log {self._path} cannot be read: {error.strerror or error}") from error
        return self._audit.report()

    def count(self, event: str) -> int:
        """Return how many events of this name there are in all environments."""
        return sum(counts[event] for counts in self.counts.values())

    def _new_lines(self, file: BinaryIO) -> Iterable[bytes]:
        file.seek(self._offset)
        for piece in file:
            self._offset += len(piece)
            line = self._rest + piece
            if not line.endswith(b"\n"):
                self._rest = line
                return
            self._rest = b""
            if any(mark in line for mark in _MARKS) and self._concerns_us(line):
                yield line

    def _concerns_us(self, line: bytes) -> bool:
        try:
            event = _event.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return True  # The audit says what is wrong with it.
        if self.only is not None and not self.only(event.run_id):
            return False
        if event.event == ENTRY_FAILED:
            self.attempts_used_up += 1
            return False
        self.attempts_used_up += event.event == DRAINED and event.attempts > 1
        self.counts[event.env_id][event.event] += 1
        return True
