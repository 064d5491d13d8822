"""`mollifier demo`: what Mollifier does, within a minute."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from mollifier.cli.embedding import ModeOption, child_environment, finish, kept_log, report, told_failures
from mollifier.cli.output import Json, note, print_json, stderr, stdout
from mollifier.rollout import Mode

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from mollifier.child_environment import ChildEnvironment
    from mollifier.play.session import Played, TenantFigures

_STEPS = {
    Mode.OFF: "Mollifier is switched off: triggers take the path they would take without it, and the buffer's server is not even connected to.",
    Mode.SHADOW: "Shadow mode: nothing is held. Where the gate sees a burst, it logs that it would have held the trigger.",
    Mode.MONITOR: (
        "Monitor mode: every run is created at once, as always. The triggers of a burst are also copied to the buffer and drained again, "
        "and the copies are compared with what went in: a rehearsal without a risk."
    ),
    Mode.DIVERT: (
        "Divert mode: the triggers of a burst are answered with a run id at once and held in the buffer; the drainer creates their runs a "
        "little later, at a rate the database can take (here one at a time: MOLLIFIER_DRAIN_CONCURRENCY). Their callers notice nothing: a held run can "
        "be read, tagged and cancelled as any other."
    ),
}


def demo(*, mode: ModeOption = None, as_json: Json = False) -> None:
    """See within a minute what Mollifier does, with nothing to install or configure.

    Starts a real Valkey and a real Postgres, the API and a worker. One organization then fires a burst of triggers through the HTTP API
    while four others go about their business. Prints what was decided, buffered, drained and executed, and checks that the books balance.

    Exits 0 only if they do. They do not where the burst went unseen or, in divert mode, no held run was tagged and cancelled. Nothing is left behind.

    For example:

        $ mollifier demo
        $ mollifier demo --mode shadow
    """
    from mollifier.play.demo import DRAIN_CONCURRENCY, TRIP_THRESHOLD
    from mollifier.processes import run
    from mollifier.settings import variable

    defaults = {variable("trip_threshold"): str(TRIP_THRESHOLD)}
    if mode is Mode.DIVERT:
        defaults[variable("drain_concurrency")] = str(DRAIN_CONCURRENCY)
    environment = child_environment(mode, defaults)
    with kept_log(None) as log, told_failures():
        finish(run(_play(environment, log, as_json=as_json)))


async def _play(environment: ChildEnvironment, log: Path, *, as_json: bool) -> int:
    from mollifier.play import demo as story
    from mollifier.play.client import Marker
    from mollifier.play.render import progress_bar
    from mollifier.play.session import Session
    from mollifier.play.stage import embedded_stage

    times, marker = story.arrivals(), Marker(secrets.token_hex(4))
    threshold, window_ms = environment.settings.trip_threshold, environment.settings.trip_window_ms
    peak = story.densest([at_s for at_s, place in times if place == 0], window_ms / 1000)
    burst = {"peak": peak, "window_ms": window_ms, "threshold": threshold}
    async with embedded_stage(environment, story.organizations(), log=log, on_progress=report) as stage:
        with progress_bar(stderr(), len(times)) as show:
            session = Session(
                stage.system,
                stage.tenants,
                task_id="echo",
                marker=marker,
                report=show,
                peak=peak,
                span_s=story.SECONDS,
                until_executed=True,
                has_burst=True,
            )
            played = await stage.alongside(session.play(story.calls(times, marker)))
    tenants = dict(zip((part.name for part in story.STORY), played.tenants, strict=True))
    if as_json:
        _print_record(played, tenants, burst)
    else:
        _show(played, tenants, burst)
    return 1 if played.imbalances else 0


def _print_record(played: Played, tenants: dict[str, TenantFigures], burst: dict[str, int]) -> None:
    from msgspec import to_builtins

    from mollifier.play.render import as_record

    rows = [{"name": name, **to_builtins(figures)} for name, figures in tenants.items()]
    print_json({**as_record(played), "burst": burst, "tenants": rows})
    for imbalance in played.imbalances:
        note(f"mollifier: {imbalance}")


def _show(played: Played, tenants: dict[str, TenantFigures], burst: dict[str, int]) -> None:
    from rich.padding import Padding
    from rich.rule import Rule

    from mollifier.play.render import figures_table, verdict

    console = stdout()
    if not console.is_terminal:
        console.width = 120
    mode = played.mode or Mode.MONITOR
    sections: list[tuple[str, list[Any]]] = [
        ("What happened", [_story(tenants, burst), _STEPS[mode]]),
        ("Tenant by tenant", [_tenants_table(tenants, mode), _reading(tenants, mode)]),
        ("The books", [figures_table(played), _audited(played), _sampled(played), verdict(played)]),
        ("What to try next", []),
    ]
    for title, parts in sections:
        console.print()
        console.print(Rule(f"[bold]{title}[/bold]", align="left", style="dim"))
        for part in parts:
            if part:
                console.print(Padding(part, (1, 0, 0, 2)))
    console.print()
    for line in _next_steps(mode):
        # Never folded: it is there to be copied.
        console.print(f"  {line}", soft_wrap=True, markup=False)


def _story(tenants: dict[str, TenantFigures], burst: dict[str, int]) -> str:
    noisy = next(iter(tenants))
    return (
        f"[bold]{noisy}[/bold] fired up to {burst['peak']} triggers within {burst['window_ms']} ms, where {burst['threshold']} of one environment "
        f"may pass (MOLLIFIER_TRIP_THRESHOLD). Meanwhile {len(tenants) - 1} other organizations triggered a few tasks a second."
    )


def _tenants_table(tenants: dict[str, TenantFigures], mode: Mode) -> Table:
    from rich import box
    from rich.table import Table

    columns = ["offered", "accepted"]
    columns += {Mode.OFF: [], Mode.SHADOW: ["would_mollify"]}.get(mode, ["mollified", "buffered", "drained"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tenant")
    for column in (*columns, "p50_ms", "p99_ms"):
        table.add_column(column.replace("_ms", " ms").replace("_", " "), justify="right")
    for name, figures in tenants.items():
        counts = [f"{getattr(figures, column):,}" for column in columns]
        style = "yellow" if figures.mollified or figures.would_mollify else ""
        table.add_row(name, *counts, f"{figures.p50_ms:.1f}", f"{figures.p99_ms:.1f}", style=style)
    return table


def _reading(tenants: dict[str, TenantFigures], mode: Mode) -> str:
    caught = [name for name, figures in tenants.items() if figures.mollified or figures.would_mollify]
    if mode is Mode.OFF:
        return ""
    if not caught:
        return "Nobody was over the threshold."
    others = (
        "every other tenant's triggers passed untouched" if len(caught) < len(tenants) else "every tenant was over it"
    )
    if mode is Mode.SHADOW:
        return f"Only what {', '.join(caught)} sent above the threshold would have been held; {others}."
    if mode is Mode.DIVERT:
        return (
            f"Only what {', '.join(caught)} sent above the threshold was held; {others}. The database did not take the burst: the "
            "drainer wrote those runs at its own pace, so the writes were flattened. What the others still waited for, in the moment of the "
            "burst, is the one API process that has every call to answer, on the cores that play and serve here: that is what more of "
            "`mollifier serve` are for."
        )
    return (
        f"Only what {', '.join(caught)} sent above the threshold was recognised as a burst; {others}. In this mode the database still takes "
        "the whole burst, so everybody waits for it a while: sparing them that is what holding, the step after this one, is for."
    )


def _audited(played: Played) -> str:
    audit = played.audit
    if audit is None or not audit.buffered:
        return ""
    return (
        f"Audited from the structured log: {audit.matched:,} of {audit.buffered:,} buffered snapshots came out of the buffer with the very "
        "SHA-256 they went in with."
    )


def _sampled(played: Played) -> str:
    sample = played.sample
    if sample is None:
        return ""
    if not sample.sampled:
        return "The drainer was faster than the look into the buffer: no run was held for long enough to be sampled."
    too_late = f" {sample.too_late} had started before they could be cancelled." if sample.too_late else ""
    return (
        f"While they were held, {sample.retrieved} runs were read through the API, {sample.tagged} tagged and {sample.cancelled} cancelled: the "
        f"database has every tag, and none of the cancelled ones was ever executed.{too_late}"
    )


def _next_steps(mode: Mode) -> tuple[str, ...]:
    another = Mode.SHADOW if mode is not Mode.SHADOW else Mode.MONITOR
    commands = {
        "mollifier dev": "keep all of this running, with an API key to use",
        f"mollifier demo --mode {another}": "the same burst at another step of the rollout",
        "mollifier replay FILE --embedded": "arrivals of your own, from a CSV file",
        "mollifier doctor": "check servers of your own for what would lose data or hurt",
    }
    return (
        *(f"{command:<34}{what}" for command, what in commands.items()),
        "",
        "With `mollifier dev` running, a trigger is one call:",
        "",
        "curl http://127.0.0.1:8000/api/v1/tasks/echo/trigger -H 'Authorization: Bearer API_KEY' \\",
        """  -H 'Content-Type: application/json' -d '{"payload": {"hello": "world"}}'""",
        "",
    )
