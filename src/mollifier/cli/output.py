"""How commands speak: results on stdout, as JSON where a program reads them; everything else on stderr."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Record = Mapping[str, Any]

_PIPE_COLUMNS = 1000
_GAP_COLUMNS = 3
_WHOLE_COLUMNS = 64
"""Up to where a text without spaces is not broken, however narrow the terminal."""
_FOLDED_COLUMNS = 24
"""What any other column has at least."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def note(text: str) -> None:
    """Tell the person at the terminal something that is no result."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - this is where text leaves the process


def confirmed(question: str) -> bool:
    """Ask the person at the terminal; whoever says nothing says no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # noqa: T201 - as above
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def tell_warnings() -> Generator[None]:
    """Meanwhile, tell what the package logs as warnings: most commands have no log, and these are about what they were given."""
    handler = _Teller(logging.WARNING)
    logger = logging.getLogger("mollifier")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Teller(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = getattr(record, "fields", {})
        note(f"mollifier: warning: {fields.get('detail') or record.getMessage()}")


def print_text(text: str) -> None:
    """Print one result that is a text."""
    print(text, flush=True)  # noqa: T201 - as above


def print_json(value: Any) -> None:
    """Print one result as one line of JSON."""
    print_text(msgspec.json.encode(value).decode())


def show(record: Record, *, as_json: bool) -> None:
    """Print one result: JSON, or a line per field."""
    if as_json:
        print_json(record)
    else:
        show_rows([(name, value) for name, value in record.items() if value is not None])


def show_all(records: Sequence[Record], *, as_json: bool, when_none: str) -> None:
    """Print a list: JSON, or a table whose columns are the first record's fields; `when_none` is told when it is empty."""
    if as_json:
        print_json(records)
    elif records:
        show_rows([tuple(record.values()) for record in records], header=tuple(records[0]))
    else:
        note(when_none)


def show_rows(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> None:
    """Print aligned columns that neither crop nor shorten anything."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, show_header=bool(header), pad_edge=False, padding=(0, _GAP_COLUMNS, 0, 0), header_style="bold"
    )
    texts = [[_text(cell) for cell in row] for row in rows]
    least = 0
    for number, column in enumerate(header or rows[0]):
        title = str(column) if header else ""
        longest = max(len(title), *(len(row[number]) for row in texts))
        # An id is copied whole, or not at all: what has no spaces is broken nowhere, but for texts that would be lines by themselves.
        is_whole = longest <= _WHOLE_COLUMNS and not any(" " in row[number] for row in texts)
        table.add_column(Text(title), overflow="fold", no_wrap=is_whole)
        least += (longest if is_whole else min(longest, _FOLDED_COLUMNS)) + _GAP_COLUMNS
    for row in texts:
        table.add_row(*map(Text, row))
    console = stdout()
    console.width = max(console.width, least)
    console.print(table, soft_wrap=False, crop=False)


def stdout() -> Console:
    """Return the console for results; a pipe has no edge at which lines would break."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)


def stderr() -> Console:
    """Return the console for progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            return value.isoformat(sep=" ", timespec="seconds")
        case str():
            # What a customer sent must not steer the operator's terminal.
            return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
        case int():
            return str(value)
        case _:
            return msgspec.json.encode(value).decode()
