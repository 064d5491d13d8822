"""How a play looks at the terminal: a progress bar while it runs, and its figures afterwards, each with what it means."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mollifier.play.client import Answers
from mollifier.play.session import Played, Reporter
from mollifier.rollout import Mode

_COMPLAINTS_SHOWN = 5


class Figure(NamedTuple):
    """One number of a play and what it means, in one line."""

    name: str
    value: Any
    meaning: str


def figures(played: Played) -> list[Figure]:
    """Return the figures that say something in this play's mode; a number that is not known is left out."""
    books, timing = played.books, played.timing
    buffering = played.mode in (Mode.MONITOR, Mode.DIVERT, None)
    every = [
        Figure("offered", books.offered, "triggers sent, each at its own time"),
        Figure("accepted", books.accepted, "answered with a run id"),
        Figure(
            "rejected", books.rejected, "answered 4xx: the caller's mistake, or over a cap where that is the policy"
        ),
        Figure("errors", books.errors, "no answer, or a failure of the system"),
        Figure("pass_through", books.pass_through, "the gate saw no burst, or was not asked"),
    ]
    if played.mode in (Mode.SHADOW, None):
        every.append(Figure("shadow_log", books.shadow_log, "the gate saw a burst and only logged it"))
    if buffering:
        every += [
            Figure("mollify", books.mollify, "the gate saw a burst: the trigger's snapshot goes to the buffer"),
            Figure(
                "over_cap_created",
                books.over_cap_created or None,
                "kept out by a cap: their runs were created directly",
            ),
            Figure(
                "over_cap_rejected", books.over_cap_rejected or None, "kept out by a cap: rejected, as the policy says"
            ),
            Figure(
                "unbuffered",
                books.unbuffered or None,
                "the buffer did not answer for them in time: created directly, and maybe drained as well",
            ),
            Figure("buffered", books.buffered, "snapshots that went into it"),
            Figure("drained", books.drained, "snapshots that came out again"),
            Figure("sheltered", books.sheltered, "of these, not of a burst: held because the database was away"),
            Figure("attempts_used_up", books.attempts_used_up, "that took more than one attempt, or were given up"),
            Figure("hash_mismatches", books.hash_mismatches, "snapshots that came out other than they went in"),
        ]
    every += [
        Figure(
            "failed_open", books.failed_open, "times the gate or the buffer was too slow or away: the trigger passed"
        ),
        Figure("left_in_buffer", books.left_in_buffer, "entries still queued, waiting, draining or failed"),
        Figure("runs_created", books.runs_created, "runs in the database"),
        Figure("lost", books.lost, "accepted triggers without a run"),
        Figure("duplicated", books.duplicated, "runs beyond the first of a trigger"),
        Figure("executed", books.executed, "runs that the worker completed"),
    ]
    if played.mode is Mode.DIVERT:
        every += [
            Figure("sampled", books.sampled, "held runs that were looked up by their callers meanwhile"),
            Figure(
                "sampled_retrieved", books.sampled_retrieved, "of these, read as QUEUED with their payload while held"
            ),
            Figure("sampled_tagged", books.sampled_tagged, "of these, tagged while held: the tag is in the database"),
            Figure("sampled_cancelled", books.sampled_cancelled, "of these, cancelled while held, and never executed"),
            Figure(
                "sampled_too_late", books.sampled_too_late, "of these, created and started before the cancel arrived"
            ),
            Figure("sampled_faults", books.sampled_faults, "held runs that were not what they had to be"),
        ]
    if played.mode is Mode.OFF:
        every.append(
            Figure("connections", books.buffer_connections, "that the buffer's server saw: off touches nothing")
        )
    every += [
        Figure("p50 / p99", f"{timing.p50_ms:.1f} / {timing.p99_ms:.1f} ms", "how long a trigger call took"),
        Figure("lag p99", f"{timing.lag_p99_ms:.1f} ms", "how late calls left this player"),
        Figure("seconds", f"{timing.seconds:.1f}", "from the first call to the last answer"),
    ]
    return [figure for figure in every if figure.value is not None]


def figures_table(played: Played) -> Table:
    """Return the figures as a table."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for figure in figures(played):
        table.add_row(figure.name, _number(figure.value), figure.meaning)
    return table


def verdict(played: Played) -> Text:
    """Return whether the books balance, and if not why not."""
    if not played.imbalances:
        return Text(
            "The books balance: every accepted trigger is exactly one run, and nothing is left behind.",
            style="bold green",
        )
    lines = ["The books do not balance:", *(f"  - {each}" for each in played.imbalances)]
    reasons = played.complaints[:_COMPLAINTS_SHOWN]
    if reasons:
        lines += ["Calls were not accepted because:", *(f"  - {count} x {reason}" for reason, count in reasons)]
    return Text("\n".join(lines), style="bold red")


def as_record(played: Played) -> dict[str, Any]:
    """Return the play as `--json` prints it."""
    return {
        "balanced": not played.imbalances,
        "mode": played.mode,
        **msgspec.to_builtins(played.books),
        **msgspec.to_builtins(played.timing),
        "imbalances": played.imbalances,
        "complaints": dict(played.complaints),
    }


@contextmanager
def progress_bar(console: Console, total: int) -> Generator[Reporter]:
    """Show how far the play is, on this console, and nothing where that is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=5)
    with bar:
        task = bar.add_task("playing", total=total, note="")

        def report(what: str, answers: Sequence[Answers]) -> None:
            offered = sum(each.offered for each in answers)
            settled = sum(each.settled for each in answers)
            refused = sum(each.rejected + each.errors for each in answers)
            note = f"{offered - settled} in flight" + (f", {refused} not accepted" if refused else "")
            bar.update(task, description=what, completed=settled, note=note)

        yield report


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
