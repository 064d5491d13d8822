"""How a torture looks at the terminal: a progress bar while it goes on, and its accounts afterwards."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mollifier.play.torture.ledger import Ledger
from mollifier.play.torture.recovery import p99_s
from mollifier.play.torture.session import Reporter, Tortured

_COMPLAINTS_SHOWN = 8


def accounts_table(tortured: Tortured) -> Table:
    """Return the accounts as a table: each number with what it means."""
    accounts, kills = tortured.accounts, tortured.kills
    rows: list[tuple[str, Any, str]] = [
        ("kills", sum(kills.values()), ", ".join(f"{count} of {name}" for name, count in kills.items())),
        ("other faults", sum(tortured.faults.values()) - sum(kills.values()), "frozen processes, links that misbehave"),
        ("offered", accounts.offered, "triggers"),
        ("accepted", accounts.accepted, "answered with a run id, or in a batch that was accepted"),
        ("rejected", accounts.rejected, "answered 4xx: every trigger was valid, so there should be none"),
        ("errors", accounts.errors, "answered 5xx, or by nobody: may have made one run"),
        ("unknown", accounts.unknown, "never answered: may have made one run"),
        ("retries", accounts.retries, "requests that were sent again under the same name"),
        ("created", accounts.created, "runs in the database"),
        ("lost", accounts.lost, "accepted triggers without a run"),
        ("duplicated", accounts.duplicated, "runs beyond the first of a trigger"),
        ("superseded", accounts.superseded, "held runs whose key another took in an outage: created CANCELED"),
        ("corrupted", accounts.corrupted, "runs with another payload than was sent"),
        ("cancelled", accounts.cancelled, "runs whose cancellation was answered"),
        ("cancelled_executed", accounts.cancelled_executed, "of these, executed all the same"),
        ("changes_lost", accounts.changes_lost, "tags that were answered and are not there"),
        ("unexecuted", accounts.unexecuted, "runs that have not come to an end"),
        ("gave_up", accounts.gave_up, "runs that the system failed or crashed"),
        ("left_in_buffer", tortured.left_in_buffer, "entries still queued, waiting, draining or failed"),
        ("recovered", len(tortured.recovery_s), "entries of killed workers that others took over"),
        (
            "recovery p99",
            _seconds(p99_s(tortured.recovery_s)),
            f"from the moment that they were stopped to their settlement; bound {tortured.bound_s:g} s",
        ),
        ("recovery_late", tortured.recovery_late, "of these, later than the bound though nothing else was at fault"),
        (
            "disturbed p99",
            _seconds(p99_s(tortured.recovery_disturbed_s)),
            f"of {len(tortured.recovery_disturbed_s)} more during which a server was away too",
        ),
        ("seconds", f"{tortured.seconds:.0f}", f"seed {tortured.torture.seed}"),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for name, value, meaning in rows:
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value), meaning)
    return table


def verdict(tortured: Tortured) -> Text:
    """Return whether the accounts balance, and if not why not."""
    if not tortured.imbalances:
        return Text(
            "\nThe accounts balance: nothing was lost, nothing was done twice, nothing was late, nothing is left.",
            "bold green",
        )
    asked = tortured.torture
    again = f"mollifier torture --seed {asked.seed} --minutes {asked.minutes:g} --lease-s {asked.lease_s:g} --rate {asked.rate_per_s:g}"
    lines = ["\nThe accounts do not balance:", *(f"  - {each}" for each in tortured.imbalances)]
    reasons = list(tortured.complaints.items())[:_COMPLAINTS_SHOWN]
    if reasons:
        lines += ["Answers that should not have been:", *(f"  - {count} x {reason}" for reason, count in reasons)]
    return Text("\n".join([*lines, f"The same again: {again}"]), "bold red")


@contextmanager
def progress_bar(console: Console) -> Generator[tuple[Reporter, Callable[[str], None]]]:
    """Show how far it is, where somebody is watching; yields what to call with news and with faults."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=5)
    latest = [""]
    with bar:
        task = bar.add_task("starting", total=1.0, note="")

        def show(what: str, ledger: Ledger, share: float) -> None:
            calls = f"{ledger.offered:,} calls, {ledger.offered - ledger.settled} under way"
            bar.update(task, description=what, completed=share, note=f"{calls}  {latest[0]}")

        def tell(fault: str) -> None:
            latest[0] = fault

        yield show, tell


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
