"""`mollifier doctor`: what would lose data or hurt, and what to do about it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from mollifier.cli.output import Json, note, print_json, show_rows, stdout
from mollifier.cli.servers import load_settings

if TYPE_CHECKING:
    from collections import Counter

    from mollifier.doctor import Finding, Severity
    from mollifier.settings import Settings

_STYLES = {"ok": "green", "info": "cyan", "unknown": "magenta", "warning": "yellow", "critical": "bold red"}


def doctor(as_json: Json = False) -> None:
    """Check the servers and the settings for what would lose data or hurt, and say what to do about it.

    Persistence and eviction of the buffer's server, memory, versions, replicas, migrations, durability and connections of the database,
    clocks, TLS, contradictory settings, work that nobody does. Changes nothing, and enumerates no keys. Run it with the settings of the
    processes it is about, before each step of the rollout; a worker runs it by itself when it starts, and logs what it finds.

    What a managed server refuses to tell is `unknown`, which fails nothing. Exit codes, as monitoring plugins have them: 0 when nothing is
    worse than info or unknown, 1 with warnings, 2 when something is critical.

    For example:

        $ mollifier doctor
        $ MOLLIFIER_DIVERT=1 mollifier doctor --json
    """
    from mollifier.doctor import exit_code

    findings = asyncio.run(_examine(load_settings()))
    if as_json:
        print_json(_record(findings))
    else:
        _show(findings)
    if code := exit_code(findings):
        raise typer.Exit(code)


async def _examine(settings: Settings) -> list[Finding]:
    from contextlib import AsyncExitStack

    from mollifier.doctor import diagnose
    from mollifier.postgres.database import Database
    from mollifier.server import Server, connect

    async with AsyncExitStack() as stack:
        server = database = None
        if settings.redis_url is not None:
            redis = connect(settings.redis_url)
            stack.push_async_callback(redis.aclose)
            server = Server(redis)
        if settings.database_url is not None:
            database = await stack.enter_async_context(Database(settings.database_url, pool_size=1))
        return await diagnose(settings, server=server, database=database)


def _record(findings: list[Finding]) -> dict[str, object]:
    from mollifier.doctor.findings import worst

    counts = _counted(findings)
    return {"worst": worst(findings), **{level.value: counts[level] for level in counts}, "findings": findings}


def _counted(findings: list[Finding]) -> Counter[Severity]:
    from collections import Counter

    from mollifier.doctor import Severity

    counts = Counter(finding.severity for finding in findings)
    return Counter({level: counts[level] for level in reversed(Severity)})


def _show(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mollifier.doctor.diagnosis import worst_first

    console = stdout()
    if console.is_terminal:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for finding in worst_first(findings):
            said = Text(finding.what)
            if finding.why:
                said.append(f"\n{finding.why}", style="dim").append(f"\n-> {finding.fix}")
            table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), Text(finding.check), said)
        console.print(table)
    else:
        rows = [(each.severity, each.check, each.what, each.why, each.fix) for each in worst_first(findings)]
        show_rows(rows, header=("severity", "check", "what", "why it matters", "what to do"))
    told = ", ".join(f"{number} {level}" for level, number in _counted(findings).items() if number)
    note(f"mollifier: {told}")
