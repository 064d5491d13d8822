"""`mollifier torture`: a whole system under load, whose every part is killed again and again, and the books at its end."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.embedding import child_environment, finish, kept_log, report, told_failures
from mollifier.cli.output import Json, note, print_json, stderr, stdout
from mollifier.rollout import Mode

if TYPE_CHECKING:
    from mollifier.child_environment import ChildEnvironment
    from mollifier.play.torture.session import Torture

_SEEDS = 1_000_000
# A burst of the torture's own load has to be seen as one, and a system that is short of breath may take longer to say so.
_DEFAULTS = {"trip_threshold": "5", "gate_deadline_ms": "250"}


def torture(
    *,
    seed: Annotated[
        int | None, typer.Option(help="Repeats a torture: the same load and the same faults. [default: any]")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.05, help="About how long to go on; the faults of a round are all done.")
    ] = 1.0,
    lease_s: Annotated[
        float, typer.Option(min=0.5, help="How long an entry waits for a worker that has died, in seconds.")
    ] = 2.0,
    rate: Annotated[float, typer.Option(min=1.0, help="Triggers each second, most of them in bursts.")] = 50.0,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", metavar="FILE", help="Append the log of all processes to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Kill everything again and again under load, and check that nothing was lost and nothing done twice.

    Starts an embedded stack of its own in divert mode, with two API and two worker processes, and calls it in bursts: plain triggers,
    ones with idempotency or request keys, batches, delayed ones; their runs are read, tagged and cancelled. Meanwhile a plan that follows from the seed
    kills workers, API processes, Valkey and Postgres (SIGKILL), each about every 12 seconds, freezes them (SIGSTOP), and has the
    connections between them hang, lag, trickle and break in mid-message. Workers are killed while they hold entries.

    At the end the accounts are closed: every accepted trigger is exactly one run, with the payload it was sent with; whoever got no answer has one run at
    most; nothing is left in the buffer; nothing that was cancelled was executed; every change that was answered is there. Valkey syncs its append-only
    file before each answer (`appendfsync always`): with less, a crash of the machine may cost what docs/reliability.md says.

    What a killed worker held has to be settled by another one within twice the lease, unless a server, a link or a worker was at fault meanwhile:
    entries that took longer (`recovery_late`) count against the accounts. `recovery_p99_s` is
    from the moment that the worker was stopped, to be killed, to the settlement.

    Exits 0 when the accounts balance, 1 when they do not.

    For example:

        $ mollifier torture
        $ mollifier torture --seed 1 --minutes 5 --json
    """
    from mollifier.play.torture.session import Torture
    from mollifier.processes import run
    from mollifier.settings import variable

    defaults = {variable(name): text for name, text in _DEFAULTS.items()}
    environment = child_environment(Mode.DIVERT, {**defaults, variable("lease_ms"): str(int(lease_s * 1000))})
    asked = Torture(
        seed=secrets.randbelow(_SEEDS) if seed is None else seed,
        minutes=minutes,
        lease_s=environment.settings.lease_ms / 1000,
        rate_per_s=rate,
    )
    with kept_log(log_file) as log, told_failures():
        finish(run(_torture(asked, environment, log, as_json=as_json)))


async def _torture(asked: Torture, environment: ChildEnvironment, log: Path, *, as_json: bool) -> int:
    from mollifier.play.torture.render import accounts_table, progress_bar, verdict
    from mollifier.play.torture.session import run_torture

    note(f"mollifier: the seed is {asked.seed}")
    with progress_bar(stderr()) as (show, tell):
        tortured = await run_torture(asked, environment, log=log, report=show, on_progress=report, tell=tell)
    if as_json:
        print_json(tortured.record())
        for imbalance in tortured.imbalances:
            note(f"mollifier: {imbalance}")
    else:
        console = stdout()
        console.print(accounts_table(tortured))
        console.print(verdict(tortured))
    return 1 if tortured.imbalances else 0
