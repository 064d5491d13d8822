"""Arrival traces: CSV files with a header, one row for each arrival, in the order of their times.

A time is a date (`2023-11-16 18:17:03.9799600`, with `T` and a zone too; without a zone it is UTC) or a number of seconds. Numbers
beyond 1e11 are an epoch in milliseconds, beyond 1e14 in microseconds, beyond 1e17 in nanoseconds. Times are kept in whole
nanoseconds, so the 100 ns of the public traces survive. Rows are read one at a time: a trace may be larger than memory.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Generator, Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from mollifier.errors import MollifierError

DEFAULT_TIME_COLUMN = "TIMESTAMP"
LINE_BYTES_MAX = 1024 * 1024
_FIELD_CHARACTERS_MAX = LINE_BYTES_MAX
_NUMBER_CHARACTERS_MAX = 15
_NS = 1_000_000_000

_DATE = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:[.,](\d{1,12}))?\s*(Z|[+-]\d\d(?::?\d\d)?)?", re.ASCII)
_NUMERIC = re.compile(r"[+-]?\d{1,20}(?:\.\d{1,12})?(?:[eE][+-]?\d{1,2})?", re.ASCII)
_EPOCH_UNITS = ((Decimal("1e17"), 1), (Decimal("1e14"), 1_000), (Decimal("1e11"), 1_000_000))


class TraceError(MollifierError):
    """The trace cannot be played as it is; `line` counts from 1 and is None where the whole file is at fault."""

    def __init__(self, path: Path, line: int | None, detail: str) -> None:
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {detail}")
        self.path = path
        self.line = line
        self.detail = detail


class Arrival(NamedTuple):
    """One row: nanoseconds since the first arrival, the other columns as a JSON object, and the value of the env column."""

    offset_ns: int
    payload: bytes
    env: str | None = None


class Survey(NamedTuple):
    """A trace as a whole: its arrivals, how long it lasts, the most arrivals in any window of it, and the values of its env column."""

    arrivals: int
    span_ns: int
    peak: int
    envs: tuple[str, ...]


def read_trace(
    path: Path, *, time_column: str | None = None, env_column: str | None = None, limit: int | None = None
) -> Iterator[Arrival]:
    """Yield the trace's arrivals, at most `limit` of them.

    Without `time_column`, times are in the column TIMESTAMP, or else in the first one that holds a time in the first row.
    Raises TraceError, naming the line, where the file is no such trace; what came before has been yielded then.
    """
    try:
        with path.open("rb") as file:
            yield from _arrivals(path, _rows(path, file), time_column, env_column, limit)
    except OSError as error:
        raise TraceError(path, None, f"cannot be read: {error.strerror or error}") from error


def survey(arrivals: Iterable[Arrival], *, window_ns: int) -> Survey:
    """Go through all arrivals, and so find out whether the whole trace can be played; `window_ns` is the peak's."""
    count = span_ns = peak = 0
    envs: dict[str, None] = {}
    recent: list[int] = []
    first = 0
    for arrival in arrivals:
        count += 1
        span_ns = arrival.offset_ns
        if arrival.env is not None:
            envs[arrival.env] = None
        recent.append(span_ns)
        while recent[first] <= span_ns - window_ns:
            first += 1
        peak = max(peak, len(recent) - first)
        if first > 100_000:  # noqa: PLR2004 - now and then is enough to forget what left the window
            del recent[:first]
            first = 0
    return Survey(count, span_ns, peak, tuple(envs))


def parse_time(text: str) -> int | None:
    """Return the time in nanoseconds (since 1970 for dates), None when it is no time."""
    text = text.strip()
    if date := _DATE.fullmatch(text):
        moment, fraction, zone = date.groups()
        try:
            whole = datetime.fromisoformat(moment + _offset(zone)).astimezone(UTC)
        except (ValueError, OverflowError):
            return None
        return int(whole.timestamp()) * _NS + int((fraction or "0").ljust(9, "0")[:9])
    if _NUMERIC.fullmatch(text):
        try:
            number = Decimal(text)
            unit = next((ns for beyond, ns in _EPOCH_UNITS if abs(number) > beyond), _NS)
            return int(number * unit) if abs(number) < Decimal("1e20") else None
        except InvalidOperation:
            return None
    return None


def _offset(zone: str | None) -> str:
    return "+00:00" if zone in (None, "Z") else zone


class _Row(NamedTuple):
    line: int
    fields: list[str]


def _rows(path: Path, file: BinaryIO) -> Generator[_Row]:
    """Yield the CSV's rows with the line each begins on; blank lines are passed over."""
    ended = 0

    def lines() -> Generator[str]:
        nonlocal ended
        for number, raw in enumerate(_bounded_lines(path, file), start=1):
            if b"\0" in raw:
                raise TraceError(
                    path, number, "holds a NUL byte: this is no text file. Export the trace as CSV in UTF-8"
                )
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TraceError(
                    path, number, f"is not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"
                ) from error
            ended = number
            yield text

    csv.field_size_limit(_FIELD_CHARACTERS_MAX)
    reader = csv.reader(lines(), strict=True)
    while True:
        begins = ended + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise TraceError(path, begins, f"is no CSV: {error}") from error
        if fields is None:
            return
        if fields:
            yield _Row(begins, fields)


def _bounded_lines(path: Path, file: BinaryIO) -> Generator[bytes]:
    number = 1
    while raw := file.readline(LINE_BYTES_MAX + 1):
        if len(raw) > LINE_BYTES_MAX:
            raise TraceError(path, number, f"is longer than {LINE_BYTES_MAX} bytes: this is no CSV file")
        yield raw
        number += 1


def _arrivals(
    path: Path, rows: Iterator[_Row], time_column: str | None, env_column: str | None, limit: int | None
) -> Generator[Arrival]:
    header = next(rows, None)
    if header is None:
        raise TraceError(path, 1, "is empty; a trace begins with a line of column names")
    names = [name.strip() for name in header.fields]
    _check_header(path, header.line, names)
    env = None if env_column is None else _column(path, header.line, names, env_column, "--env-column")
    time = None if time_column is None else _column(path, header.line, names, time_column, "--time-column")
    first_ns = previous_ns = None
    for count, row in enumerate(rows):
        if count == limit:
            return
        if len(row.fields) != len(names):
            raise TraceError(path, row.line, f"has {len(row.fields)} columns where the header has {len(names)}")
        if time is None:
            time = _guess_time_column(path, row, names)
        at_ns = parse_time(row.fields[time])
        if at_ns is None:
            form = "a date such as 2023-11-16 18:17:03.9799600 or a number of seconds"
            raise TraceError(
                path,
                row.line,
                f"column {names[time]!r} holds {_short(row.fields[time])}, which is no time: expected {form}",
            )
        if previous_ns is not None and at_ns < previous_ns:
            raise TraceError(
                path, row.line, f"is earlier than the line before it: sort the trace by its column {names[time]!r}"
            )
        first_ns = at_ns if first_ns is None else first_ns
        previous_ns = at_ns
        yield Arrival(at_ns - first_ns, _payload(names, row.fields, time), None if env is None else row.fields[env])
    if first_ns is None:
        raise TraceError(path, header.line, "is the only line: the trace holds no arrivals")


def _check_header(path: Path, line: int, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TraceError(path, line, f"names the column {twice[0]!r} twice")


def _column(path: Path, line: int, names: list[str], wanted: str, option: str) -> int:
    if wanted not in names:
        have = ", ".join(names)
        raise TraceError(path, line, f"has no column {wanted!r}: name one of {have} with {option}")
    return names.index(wanted)


def _guess_time_column(path: Path, row: _Row, names: list[str]) -> int:
    for index, name in enumerate(names):
        if name.upper() == DEFAULT_TIME_COLUMN:
            return index
    for index, field in enumerate(row.fields):
        if parse_time(field) is None:
            continue
        if parse_time(names[index]) is not None:
            raise TraceError(path, 1, "looks like data: a trace begins with a line of column names")
        return index
    raise TraceError(
        path,
        row.line,
        f"has no time in any of its columns ({', '.join(names)}): name the one to use with --time-column",
    )


def _payload(names: list[str], fields: list[str], time: int) -> bytes:
    return _encode(
        {name: _value(field) for index, (name, field) in enumerate(zip(names, fields, strict=True)) if index != time}
    )


def _value(text: str) -> str | int:
    """Return an integer where the text is exactly how that integer is written, so that nothing is lost on the way."""
    if len(text) <= _NUMBER_CHARACTERS_MAX and text.removeprefix("-").isdecimal() and text.isascii():
        number = int(text)
        return number if str(number) == text else text
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")  # noqa: PLR2004 - enough to find it by


_encode = msgspec.json.Encoder().encode
