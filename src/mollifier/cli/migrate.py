"""`mollifier migrate`: the database's schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mollifier.cli.output import Json, note, print_json, show_rows, stderr
from mollifier.cli.servers import database_url

if TYPE_CHECKING:
    from mollifier.postgres.migrate import Migration


def migrate(as_json: Json = False) -> None:
    """Bring the database's schema up to date.

    Run it once per release, before the API and the workers start. Any number of replicas may run it at once: one works, the others wait
    and find nothing left to do. Each step commits by itself, so that an interrupted migration goes on where it stopped.

    Prints the steps that were applied, one a line; nothing when the schema was current.

    For example:

        $ export MOLLIFIER_DATABASE_URL=postgresql://mollifier@db/mollifier
        $ mollifier migrate
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from mollifier.postgres.migrate import migrate as apply_pending

    url = database_url()
    console = stderr()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    steps: list[Migration] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Waiting for the database", total=None)

        def advance(step: Migration) -> None:
            steps.append(step)
            progress.update(bar, completed=step.number, total=step.total, description=step.description)

        apply_pending(url, advance)
    if as_json:
        print_json({"applied": [step.name for step in steps]})
    elif steps:
        show_rows([(step.name, step.description) for step in steps])
    else:
        note("The schema is up to date; nothing to do.")
