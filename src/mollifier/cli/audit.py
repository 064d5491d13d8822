"""`mollifier audit`: joins what was buffered with what was drained, from logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.output import Json, note, print_json, show_rows, stderr

if TYPE_CHECKING:
    from mollifier.audit import Place, Report

STDIN = "-"
_NAMED = 20
_PROGRESS_BYTES = 1 << 20


def _readable(logs: list[str]) -> list[str]:
    for log in logs:
        if log != STDIN and (not Path(log).exists() or Path(log).is_dir()):
            raise typer.BadParameter(f"{log!r} is no file; give the log of an API or a worker process")
    return logs


LogFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="LOGFILE",
        callback=_readable,
        help="Logs of API and worker processes, in any order; - reads standard input.",
    ),
]


def audit(logs: LogFiles, as_json: Json = False) -> None:
    """Check in the logs that everything buffered came out again, unchanged.

    Joins the `mollifier.buffered` and `mollifier.drained` events by run id and compares their payload hashes. Use it in monitor mode,
    before an organization goes on to divert: give it the logs of all API and all worker processes of one stretch of time.

    Exits 0 when every run matches; 1 when a run is missing on one side, a hash differs, an event is damaged, or there is no event
    at all. Lines that are no JSON are counted and told; entries that were drained twice, after a crash of a worker, too.

    For example:

        $ mollifier audit api.log worker.log
      $ kubectl logs -l app=mollifier --tail=-1 | mollifier audit - --json
    """
    report = _read(logs)
    if as_json:
        print_json(as_record(report))
    else:
        _show(report)
    if not report.is_clean:
        note(f"mollifier: {verdict(report)}")
        raise typer.Exit(1)


def as_record(report: Report) -> dict[str, object]:
    """Return the report as `--json` prints it: counts first, then what they count."""
    return {
        "clean": report.is_clean,
        "buffered": report.buffered,
        "drained": report.drained,
        "matched": report.matched,
        "missing": report.missing,
        "hash_mismatches": len(report.mismatches),
        "duplicates": len(report.duplicates),
        "damaged": report.damaged,
        "unparsed": report.unparsed,
        "would_mollify": report.would_mollify,
        "buffered_not_drained": report.not_drained,
        "drained_not_buffered": report.not_buffered,
        "mismatched": [
            {"run_id": each.run_id, "buffered": each.buffered._asdict(), "drained": each.drained._asdict()}
            for each in report.mismatches
        ],
        "duplicated": report.duplicates,
        "damaged_lines": report.damaged_places,
        "unparsed_lines": report.unparsed_places,
    }


def verdict(report: Report) -> str:
    """Return in one sentence what is wrong and what to do about it."""
    if report.is_empty and report.would_mollify:
        return "no events found to join: shadow mode (mollifier.would_mollify) buffers nothing. Switch the organization's flag on first."
    if report.is_empty:
        return "no events found: none of the lines is a mollifier.buffered or mollifier.drained event. Are these the right logs?"
    wrong = {
        "missing": report.missing,
        "hash mismatches": len(report.mismatches),
        "damaged events": report.damaged,
    }
    found = ", ".join(f"{count} {what}" for what, count in wrong.items() if count)
    return (
        f"the logs do not agree: {found}. A run is missing when its entry is still in the buffer, expired there, or was handled by a "
        "process whose log is not among these."
    )


def _read(logs: Iterable[str]) -> Report:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from mollifier.audit import Audit

    reader = Audit()
    console = stderr()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for log in logs:
            bar = progress.add_task(log, total=None if log == STDIN else Path(log).stat().st_size or None)
            with _opened(log) as lines:
                reader.read(log, _counted(lines, lambda size, bar=bar: progress.advance(bar, size)))
    return reader.report()


@contextmanager
def _opened(log: str) -> Generator[Iterable[bytes]]:
    if log == STDIN:
        yield sys.stdin.buffer
        return
    try:
        lines = Path(log).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise typer.BadParameter(f"{log!r} cannot be read: {error.strerror}") from error
    with lines:
        yield lines


def _counted(lines: Iterable[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    """Pass lines on, telling every MiB how many bytes went by."""
    size = 0
    for line in lines:
        size += len(line)
        if size >= _PROGRESS_BYTES:
            advance(size)
            size = 0
        yield line
    advance(size)


def _show(report: Report) -> None:
    rows: list[tuple[str, int, str]] = [
        ("buffered", report.buffered, ""),
        ("drained", report.drained, ""),
        ("matched", report.matched, ""),
        ("buffered, not drained", len(report.not_drained), _some(report.not_drained)),
        ("drained, not buffered", len(report.not_buffered), _some(report.not_buffered)),
        ("hash mismatches", len(report.mismatches), _some([each.run_id for each in report.mismatches])),
        ("damaged events", report.damaged, _places(report.damaged_places)),
        ("logged more than once", len(report.duplicates), _some([each.run_id for each in report.duplicates])),
        ("lines that are no JSON", report.unparsed, _places(report.unparsed_places)),
    ]
    show_rows(rows)


def _places(places: Iterable[Place]) -> str:
    return _some([f"{place.file}:{place.line}" for place in places])


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _NAMED} more; --json has all" if len(names) > _NAMED else ""
    return " ".join(names[:_NAMED]) + rest
