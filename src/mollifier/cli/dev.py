"""`mollifier dev`: everything, kept running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.embedding import ModeOption, child_environment, finish, report, told_failures
from mollifier.cli.output import Json, print_json, stdout

if TYPE_CHECKING:
    from mollifier.development import Started

_SIGNALLED = 128


def dev(
    *,
    data: Annotated[
        Path, typer.Option(file_okay=False, help="The folder that keeps everything for the next start.")
    ] = Path(".mollifier"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty that folder first.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The API's port; 0 picks a free one.")] = 8000,
    mode: ModeOption = None,
    as_json: Json = False,
) -> None:
    """Start everything for development, and keep it running: Valkey, Postgres, the API and a worker.

    Prints the URL and an API key of a ready organization; the key stays the same from start to start. Two tasks are there to be triggered:
    `echo` returns its payload, `sleep` sleeps as many seconds as its payload says; MOLLIFIER_TASKS adds modules of your own. With --json,
    one line on stdout says when all of it is ready.

    Stop it with Ctrl-C.

    For example:

        $ mollifier dev
        $ MOLLIFIER_TASKS=myapp.tasks mollifier dev --port 0 --mode shadow
    """
    from mollifier.development import develop
    from mollifier.processes import check_port, run

    environment = child_environment(mode)

    def show(started: Started) -> None:
        if as_json:
            print_json(started.addresses)
        else:
            _show(started)

    log = data / "mollifier.log"
    work = develop(data, environment, port=check_port(port), fresh=fresh, log=log, on_progress=report, on_ready=show)
    with told_failures():
        code = run(work)
    # A signal is how one stops it.
    finish(0 if code > _SIGNALLED else code)


def _show(started: Started) -> None:
    from rich.text import Text

    where = started.addresses
    rows = {
        "API": where.url,
        "API key": where.api_key,
        "admin token": where.admin_token,
        "Valkey": where.redis_url,
        "Postgres": where.database_url,
        "organization": f"{started.org_id}, in mode {started.mode}",
        "data": f"{started.data}, kept for the next start",
        "log": str(started.log),
    }
    console = stdout()
    console.print("Mollifier is ready.\n", style="bold green")
    width = max(map(len, rows))
    for name, text in rows.items():
        # Nothing that is to be copied is folded.
        console.print(Text.assemble((f"{name:<{width}}  ", "bold"), text), soft_wrap=True)
    console.print(
        "\nTrigger a task, then read its run (put the id from the answer in place of RUN_ID):\n", soft_wrap=True
    )
    for line in _examples(where.url, where.api_key):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print(
        f"\nEvery route: {where.url}/docs. Another step of the rollout: --mode. Stop with Ctrl-C.",
        markup=False,
        soft_wrap=True,
    )
    console.print("Going to servers of your own? `mollifier doctor` checks them first.", markup=False, soft_wrap=True)


def _examples(url: str, api_key: str) -> tuple[str, ...]:
    authorization = f"-H 'Authorization: Bearer {api_key}'"
    body = """-H 'Content-Type: application/json' -d '{"payload": {"hello": "world"}}'"""
    return (
        f"curl {url}/api/v1/tasks/echo/trigger {authorization} {body}",
        f"curl {url}/api/v3/runs/RUN_ID {authorization}",
    )
