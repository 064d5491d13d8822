"""`mollifier dead-letters`: what died in the buffer, and what to do about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.logs import start_log
from mollifier.cli.output import Json, Record, confirmed, note, print_json, show, show_all, show_rows
from mollifier.cli.servers import with_buffer

if TYPE_CHECKING:
    from mollifier.buffer import Buffer
    from mollifier.dead_letters import Outcome
    from mollifier.letters import Letter, LetterPlace

    Change = Callable[[Buffer, Sequence[str]], Awaitable[list[Outcome]]]

_AT_ONCE = 1000
_NONE = "There are no dead letters. What failed and could be recorded is a run in SYSTEM_FAILURE."

app = typer.Typer(
    no_args_is_help=True,
    help="List, read, replay and delete what died in the buffer: dead letters, triggers without a run.",
)

Org = Annotated[str | None, typer.Option("--org", metavar="ID", help="Those of this organization only.")]
Env = Annotated[str | None, typer.Option("--env", metavar="ID", help="Those of this environment only.")]
RunIds = Annotated[list[str] | None, typer.Argument(metavar="RUN_ID", help="Their runs; or --all.")]
All = Annotated[bool, typer.Option("--all", help="All there are now, or all of an organization or environment.")]
LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", metavar="FILE", help="Append an event for each to this file, as JSON lines."),
]


@app.command("list")
def list_all(
    org: Org = None,
    env: Env = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="How many, the newest.")] = 100,
    everything: Annotated[bool, typer.Option("--all", help="All of them, however many.")] = False,
    as_json: Json = False,
) -> None:
    """List dead letters, newest first, with what they died of.

    `failed` was given up with an error that not even a failed run could be made of. `reclaim_limit`: its drainers died or hung, time and
    again. `malformed` does not read as an entry. `evicted`: the buffer's server let go of it, and of its payload. `expired` was an audit copy.

    What failed, or used its attempts up, and could be recorded is a run in SYSTEM_FAILURE and not listed here: its tenant finds it with
    filter[status]=SYSTEM_FAILURE and replays it as any run.

    For example:

        $ mollifier dead-letters list
        $ mollifier dead-letters list --org org_4f1c --all --json
    """
    letters = with_buffer(lambda buffer: _listed(buffer, org, env, None if everything else limit + 1))
    shown = letters if everything else letters[:limit]
    show_all([_record(letter) for letter in shown], as_json=as_json, when_none=_NONE)
    if len(letters) > len(shown):
        note("There are more: --limit N or --all shows them.")


@app.command("show")
def show_one(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="Its run, from `mollifier dead-letters list`.")],
    as_json: Json = False,
) -> None:
    """Show one dead letter with its payload.

    The payload is the trigger's, as text; where the entry's does not read as a trigger, it is shown whole in base64.

    For example:

        $ mollifier dead-letters show run_0mh9k2vz1x3c5v7b9n1m3a5s7
    """
    from mollifier.errors import NotFoundError
    from mollifier.letters import shown_payload

    letter = with_buffer(lambda buffer: buffer.get_letter(run_id))
    if letter is None:
        raise NotFoundError("dead letter", run_id, "RUN_ID")
    show({**_record(letter), **shown_payload(letter)}, as_json=as_json)


@app.command()
def replay(
    run_ids: RunIds = None,
    *,
    everything: All = False,
    org: Org = None,
    env: Env = None,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Queue dead letters again, in their places and with all of their attempts.

    Mend first what they died of. A letter whose payload is gone, or that does not read as an entry, is refused and stays. A run that exists
    by now is not made twice; one whose idempotency key is another run's by now is created CANCELED, and names that one. Exits 1 when any
    was refused.

    For example:

        $ mollifier dead-letters replay run_0mh9k2vz1x3c5v7b9n1m3a5s7
        $ mollifier dead-letters replay --all --env env_77d2
    """
    from mollifier.dead_letters import replay_many

    named = _named(run_ids, org, env, everything=everything)
    _change(named, replay_many, "replayed", log_file, as_json=as_json)


@app.command()
def delete(
    run_ids: RunIds = None,
    *,
    everything: All = False,
    org: Org = None,
    env: Env = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Delete dead letters for good: their triggers never become runs.

    With --all it takes what is there when it begins, and nothing that dies meanwhile. Exits 1 when any of the named ones was none.

    For example:

        $ mollifier dead-letters delete run_0mh9k2vz1x3c5v7b9n1m3a5s7
        $ mollifier dead-letters delete --all --org org_4f1c --yes
    """
    from mollifier.dead_letters import delete_many

    named = _named(run_ids, org, env, everything=everything)
    if named and not yes:
        what = f"{len(named)} dead letters" if len(named) > 1 else f"the dead letter of {named[0]}"
        if not confirmed(f"Delete {what} for good?"):
            note("Nothing was deleted.")
            raise typer.Exit(1)
    _change(named, delete_many, "deleted", log_file, as_json=as_json)


def _named(run_ids: Sequence[str] | None, org: str | None, env: str | None, *, everything: bool) -> Sequence[str]:
    """Return the runs that are meant: those named, or those of all letters that are there now."""
    if bool(run_ids) == everything:
        raise typer.BadParameter("give either RUN_ID... or --all", param_hint="RUN_ID")
    if run_ids:
        if org is not None or env is not None:
            raise typer.BadParameter("go with --all, not with RUN_ID", param_hint="--org, --env")
        return list(dict.fromkeys(run_ids))
    return [letter.run_id for letter in with_buffer(lambda buffer: _listed(buffer, org, env, None))]


def _change(run_ids: Sequence[str], change: Change, done: str, log_file: Path | None, *, as_json: bool) -> None:
    from mollifier.letters import Letter

    if log_file is not None:
        start_log(log_file)

    async def in_parts(buffer: Buffer) -> list[Outcome]:
        parts = [run_ids[first : first + _AT_ONCE] for first in range(0, len(run_ids), _AT_ONCE)]
        return [outcome for part in parts for outcome in await change(buffer, part)]

    outcomes = with_buffer(in_parts) if run_ids else []
    named = list(zip(run_ids, outcomes, strict=True))
    refused = [(run_id, _told(outcome)) for run_id, outcome in named if not isinstance(outcome, Letter)]
    if as_json:
        succeeded = [run_id for run_id, outcome in named if isinstance(outcome, Letter)]
        print_json({done: succeeded, "refused": [{"run_id": run_id, "error": told} for run_id, told in refused]})
    elif named:
        show_rows([(run_id, _told(outcome) or done) for run_id, outcome in named])
    else:
        note(_NONE)
    if refused:
        note(f"mollifier: {len(named) - len(refused)} {done}, {len(refused)} refused")
        raise typer.Exit(1)


async def _listed(buffer: Buffer, org: str | None, env: str | None, limit: int | None) -> list[Letter]:
    """Return the newest letters, page by page: so many, or all."""
    letters: list[Letter] = []
    place: LetterPlace | None = None
    while limit is None or len(letters) < limit:
        size = _AT_ONCE if limit is None else min(_AT_ONCE, limit - len(letters))
        page = await buffer.list_letters(org_id=org, env_id=env, beyond=place, limit=size)
        letters += page.letters
        if (place := page.next) is None:
            break
    return letters


def _told(outcome: Outcome) -> str:
    """Return why nothing was done about it; empty where it was."""
    from mollifier.dead_letters import Refused
    from mollifier.errors import BufferUnavailableError

    match outcome:
        case Refused(detail=detail):
            return detail
        case BufferUnavailableError():
            return f"the buffer's server refused: {outcome}"
        case _:
            return ""


def _record(letter: Letter) -> Record:
    from mollifier.cursors import from_ms

    return {
        "run_id": letter.run_id,
        "reason": letter.reason,
        "died_at": from_ms(letter.died_at_ms),
        "org_id": letter.org_id,
        "env_id": letter.env_id,
        "task_id": letter.task_id,
        "kind": letter.kind,
        "attempts": letter.attempts,
        "reclaims": letter.reclaims,
        "accepted_at": from_ms(letter.accepted_at_ms),
        "payload_bytes": letter.payload_bytes,
        "error": letter.error,
    }
