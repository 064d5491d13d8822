"""`mollifier replay`: a real arrival trace against the system."""

from __future__ import annotations

import secrets
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.embedding import ModeOption, child_environment, finish, kept_log, report, told_failures
from mollifier.cli.output import Json, note, print_json, stderr, stdout
from mollifier.play.outage_kind import OutageKind

if TYPE_CHECKING:
    from mollifier.play.remote import Remote
    from mollifier.play.replay import Score
    from mollifier.play.stage import Stage
    from mollifier.play.trace import Survey

_USAGE_EXIT = 2

Trace = Annotated[
    Path,
    typer.Argument(
        metavar="TRACE.csv",
        help="A CSV file with a header; one row per arrival, in order of time. Times are dates, or numbers of seconds or an epoch.",
    ),
]


def replay(
    trace: Trace,
    *,
    embedded: Annotated[bool, typer.Option("--embedded", help="Play against an embedded stack of its own.")] = False,
    url: Annotated[
        list[str] | None,
        typer.Option("--url", metavar="URL", help="Play against this running API; repeat it for each replica."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="With --url: an environment's API key.")] = None,
    admin_token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="With --url: to ask what is left in the buffer.")
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(metavar="URL", help="With --url: where the runs are counted.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.001, max=100_000, help="How many times faster than the trace's own clock.")
    ] = 1.0,
    envs: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Spread the arrivals over so many environments. [default: 1]")
    ] = None,
    task: Annotated[str, typer.Option(help="The task to trigger.")] = "echo",
    time_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The column with the times. [default: TIMESTAMP, or the first that holds times]"
        ),
    ] = None,
    env_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="A column each of whose values is an environment.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Play only so many arrivals.")] = None,
    replicas: Annotated[int, typer.Option(min=1, max=16, help="With --embedded: API processes, called in turn.")] = 1,
    log_file: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="The structured log of all processes: written with --embedded [default: a temporary file], read with --url.",
        ),
    ] = None,
    outage: Annotated[
        OutageKind | None,
        typer.Option(
            metavar="KIND",
            help="With --embedded: take Postgres away for ten seconds in the middle of the play: `shutdown`, or `freeze` (SIGSTOP).",
        ),
    ] = None,
    mode: ModeOption = None,
    as_json: Json = False,
) -> None:
    """Play a real arrival trace through the HTTP API, and check that the books balance.

    An open loop: each call leaves at its time in the trace, whatever became of the calls before it, so bursts stay bursts. The other
    columns of a row are the payload of its trigger. Afterwards the decisions, the structured log, the buffer and the database are
    compared: every accepted trigger has to be exactly one run, and what was buffered has to come out unchanged.

    In divert mode some of the held runs are read, tagged and cancelled meanwhile, and looked up in the database afterwards.

    Exits 0 when the books balance, 1 when they do not, 2 when the trace or the options cannot be used.

    For example:

        $ mollifier replay trace.csv --embedded --speed 10
        $ mollifier replay trace.csv --embedded --mode divert --outage freeze
        $ mollifier replay trace.csv --url http://localhost:8000 --api-key KEY --admin-token TOKEN --database-url URL
    """
    from mollifier.play.replay import Score
    from mollifier.play.trace import TraceError

    if embedded and (url or api_key or database_url):
        raise typer.BadParameter("--embedded starts a stack of its own: leave out --url, --api-key and --database-url")
    if not embedded and (mode is not None or replicas != 1):
        raise typer.BadParameter("--mode and --replicas are for --embedded; a running API has its own")
    if not embedded and outage is not None:
        raise typer.BadParameter("--outage is for --embedded: only its own Postgres may be taken away")
    remote = None if embedded else _remote(url, api_key, admin_token, database_url, log_file)
    score = Score(
        path=trace, speed=speed, environments=envs, time_column=time_column, env_column=env_column, limit=limit
    )
    try:
        seen = score.survey()
    except TraceError as error:
        note(f"mollifier: {error}")
        raise typer.Exit(_USAGE_EXIT) from error
    environments = score.environments_of(seen)
    if outage is not None:
        _check_outage_fits(seen.span_ns / 1e9 / speed)

    from mollifier.processes import run

    if remote is not None:
        from mollifier.play.remote import remote_stage

        finish(run(_play(remote_stage(remote, environments), score, seen, task, as_json=as_json)))

    from mollifier.play.stage import Organization, embedded_stage

    environment = child_environment(mode)
    with kept_log(log_file) as log, told_failures():
        organizations = [Organization("replay", environments)]
        stage = embedded_stage(environment, organizations, log=log, replicas=replicas, on_progress=report)
        finish(run(_play(stage, score, seen, task, outage=outage, as_json=as_json)))


async def _play(
    stage: AbstractAsyncContextManager[Stage],
    score: Score,
    seen: Survey,
    task: str,
    *,
    outage: OutageKind | None = None,
    as_json: bool,
) -> int:
    from mollifier.play.client import Marker
    from mollifier.play.outage import OUTAGE_S, Outage
    from mollifier.play.render import as_record, figures_table, progress_bar, verdict
    from mollifier.play.replay import PEAK_WINDOW_MS
    from mollifier.play.session import Session

    marker = Marker(secrets.token_hex(4))
    span_s = seen.span_ns / 1e9 / score.speed
    async with stage as ready:
        planned = None
        if outage is not None and ready.stack is not None:
            planned = Outage(ready.stack, outage, after_s=max(0.0, (span_s - OUTAGE_S) / 2), tell=_tell)
        with progress_bar(stderr(), seen.arrivals) as show:
            session = Session(
                ready.system,
                ready.tenants,
                task_id=task,
                marker=marker,
                report=show,
                peak=seen.peak,
                span_s=span_s,
                outage=planned,
            )
            played = await ready.alongside(session.play(score.calls(seen, marker)))
    if as_json:
        print_json(as_record(played))
        for imbalance in played.imbalances:
            note(f"mollifier: {imbalance}")
    else:
        console = stdout()
        console.print(figures_table(played))
        console.print(f"\nThe trace's densest moment at this speed: {seen.peak} calls within {PEAK_WINDOW_MS} ms.")
        console.print(verdict(played))
    return 1 if played.imbalances else 0


def _check_outage_fits(span_s: float) -> None:
    from mollifier.play.outage import BEFORE_AND_AFTER_S, OUTAGE_S

    least_s = OUTAGE_S + 2 * BEFORE_AND_AFTER_S
    if span_s < least_s:
        detail = f"--outage lasts {OUTAGE_S:g} s and this play {span_s:.1f} s: it has to be {least_s:g} s or longer; lower --speed"
        raise typer.BadParameter(detail)


def _tell(text: str) -> None:
    note(f"mollifier: {text}")


def _remote(
    urls: list[str] | None, api_key: str | None, admin_token: str | None, database_url: str | None, log: Path | None
) -> Remote:
    """Take what is needed to ask a running system; the token and the database may come from the settings."""
    from mollifier.cli.servers import load_settings
    from mollifier.play.remote import Remote

    if not urls or api_key is None:
        raise typer.BadParameter("give --embedded, or --url and --api-key of a running API")
    settings = load_settings()
    admin_token, database_url = admin_token or settings.admin_token, database_url or settings.database_url
    if admin_token is None or database_url is None:
        raise typer.BadParameter(
            "--url needs --admin-token and --database-url too: without them the books cannot be closed"
        )
    return Remote([url.rstrip("/") for url in urls], api_key, admin_token, database_url, log)
