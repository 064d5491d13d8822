"""The audit: joins what went into the buffer with what came out, by run id, from the events' JSON lines.

Pure: lines in, a report out. `mollifier.buffered` and `mollifier.drained` are joined and every other log line is passed over; a
line that is no JSON object is counted and its place is told. Memory grows with the number of runs, not with their payloads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

BUFFERED = "mollifier.buffered"
DRAINED = "mollifier.drained"
WOULD_MOLLIFY = "mollifier.would_mollify"
PLACES_KEPT = 100
_MARKS = (BUFFERED.encode(), DRAINED.encode())


class Fingerprint(NamedTuple):
    """What an event says of its payload; the fields' names are the event's."""

    payload_sha256: str
    payload_bytes: int


class Mismatch(msgspec.Struct, frozen=True):
    """A run whose payload came out other than it went in."""

    run_id: str
    buffered: Fingerprint
    drained: Fingerprint


class Duplicate(msgspec.Struct, frozen=True):
    """A run that has `times` events of one kind where one is due."""

    run_id: str
    event: str
    times: int


class Place(msgspec.Struct, frozen=True):
    """A line that could not be used. `line` counts from 1; `reason` says what is wrong with it."""

    file: str
    line: int
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the logs say, runs in the order in which the logs name them first.

    `buffered` and `drained` count runs, `matched` those of both with one and the same payload. Of `unparsed` lines (no JSON
    objects, as a traceback's are not) and `damaged` ones (they name one of the two events and do not read as one) the first 100
    places each are kept.

    Two findings are told and do not make an audit fail: unparsed lines, and duplicates, because a worker that dies between
    draining an entry and settling it leaves the entry to be drained, and logged, once more.
    """

    buffered: int
    drained: int
    matched: int
    not_drained: tuple[str, ...]
    not_buffered: tuple[str, ...]
    duplicates: tuple[Duplicate, ...]
    mismatches: tuple[Mismatch, ...]
    would_mollify: int
    unparsed: int
    unparsed_places: tuple[Place, ...]
    damaged: int
    damaged_places: tuple[Place, ...]

    @property
    def missing(self) -> int:
        """Runs that have one of the two events and lack the other."""
        return len(self.not_drained) + len(self.not_buffered)

    @property
    def is_empty(self) -> bool:
        """True when there was nothing to join: an audit of nothing proves nothing."""
        return not (self.buffered or self.drained or self.damaged)

    @property
    def is_clean(self) -> bool:
        """True when each run that was buffered was drained unchanged, and the reverse, and there was at least one."""
        return not (self.missing or self.mismatches or self.damaged or self.is_empty)


class Audit:
    """Reads any number of logs, in any order, and reports on all of them together."""

    def __init__(self) -> None:
        self._first: dict[str, dict[str, Fingerprint]] = {BUFFERED: {}, DRAINED: {}}
        self._repeats: defaultdict[tuple[str, str], list[Fingerprint]] = defaultdict(list)
        self._would_mollify = 0
        self._unparsed = _Places()
        self._damaged = _Places()

    def read(self, file: str, lines: Iterable[bytes]) -> None:
        """Take in one log; `file` is its name in the report."""
        for number, text in enumerate(lines, start=1):
            if not text or text.isspace():
                continue
            try:
                self._take(_decoder.decode(text))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                kind = self._damaged if any(mark in text for mark in _MARKS) else self._unparsed
                kind.add(Place(file, number, f"no JSON object: {error}"))
            except _NoEventError as error:
                self._damaged.add(Place(file, number, str(error)))

    def _take(self, line: _Line) -> None:
        if line.event == WOULD_MOLLIFY:
            self._would_mollify += 1
        elif line.event in (BUFFERED, DRAINED):
            run_id, fingerprint = _parse(line)
            first = self._first[line.event]
            if run_id in first:
                self._repeats[run_id, line.event].append(fingerprint)
            else:
                first[run_id] = fingerprint

    def report(self) -> Report:
        """Join what was read so far."""
        buffered, drained = self._first[BUFFERED], self._first[DRAINED]
        both = [run_id for run_id in buffered if run_id in drained]
        mismatches = [mismatch for run_id in both if (mismatch := self._mismatch(run_id)) is not None]
        return Report(
            buffered=len(buffered),
            drained=len(drained),
            matched=len(both) - len(mismatches),
            not_drained=tuple(run_id for run_id in buffered if run_id not in drained),
            not_buffered=tuple(run_id for run_id in drained if run_id not in buffered),
            duplicates=tuple(
                Duplicate(run_id, event, len(more) + 1) for (run_id, event), more in self._repeats.items()
            ),
            mismatches=tuple(mismatches),
            would_mollify=self._would_mollify,
            unparsed=self._unparsed.count,
            unparsed_places=tuple(self._unparsed.first),
            damaged=self._damaged.count,
            damaged_places=tuple(self._damaged.first),
        )

    def _mismatch(self, run_id: str) -> Mismatch | None:
        """Compare all that the run's events say; a repeated event may hide no difference."""
        buffered, drained = (
            [first[run_id], *self._repeats.get((run_id, event), ())] for event, first in self._first.items()
        )
        return next((Mismatch(run_id, b, d) for b in buffered for d in drained if b != d), None)


class _Line(msgspec.Struct):
    """As much of a log line as the audit looks at, of whatever type: most lines are somebody else's."""

    event: Any = None
    run_id: Any = None
    payload_sha256: Any = None
    payload_bytes: Any = None


_decoder = msgspec.json.Decoder(_Line)


class _NoEventError(Exception):
    """The line has the name of an event and lacks what such an event has."""


class _Places:
    def __init__(self) -> None:
        self.count = 0
        self.first: list[Place] = []

    def add(self, place: Place) -> None:
        self.count += 1
        if len(self.first) < PLACES_KEPT:
            self.first.append(place)


def _parse(line: _Line) -> tuple[str, Fingerprint]:
    if not isinstance(line.run_id, str) or not line.run_id:
        raise _NoEventError(f"{line.event} without a run_id")
    if not isinstance(line.payload_sha256, str):
        raise _NoEventError(f"{line.event} of {line.run_id} without a payload_sha256")
    if type(line.payload_bytes) is not int:
        raise _NoEventError(f"{line.event} of {line.run_id} without a payload_bytes")
    return line.run_id, Fingerprint(line.payload_sha256, line.payload_bytes)
