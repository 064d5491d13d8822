"""The app: which commands there are, and how they fail.

An expected failure is a MollifierError: one line on stderr, and exit code 2 where the command line or a setting is at fault, 1 otherwise.
Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mollifier.cli import dead_letters, environments, flags, keys, organizations, projects
from mollifier.cli.audit import audit
from mollifier.cli.demo import demo
from mollifier.cli.dev import dev
from mollifier.cli.doctor import doctor
from mollifier.cli.migrate import migrate
from mollifier.cli.output import note, print_text
from mollifier.cli.replay import replay
from mollifier.cli.serve import serve
from mollifier.cli.settings import settings
from mollifier.cli.torture import torture
from mollifier.cli.worker import worker
from mollifier.errors import InvalidRequestError, MollifierError, NotFoundError, SettingsError

_TRYING = "Try it here"
_SERVERS = "Run it"
_CHECKS = "Check it"
_ADMINISTRATION = "Administer it"
_USAGE_EXIT = 2
_EMBEDDED = ("aiohttp",)
"""What only the `embedded` extra brings and commands import."""

_HINTS = {
    "organization": "`mollifier org list` shows them.",
    "project": "`mollifier project list --org ID` shows an organization's.",
    "environment": "`mollifier env list --project ID` shows a project's.",
    "dead letter": "`mollifier dead-letters list` shows them.",
    "API key": "`mollifier key list --env ID` shows an environment's.",
}

app = typer.Typer(
    name="mollifier",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print_text(version("mollifier"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Smooth bursts of triggers in front of the database that records runs.

    New here? `mollifier demo` shows all of it within a minute; `mollifier dev` keeps it running for you to try. Against servers of your
    own: set MOLLIFIER_DATABASE_URL and MOLLIFIER_REDIS_URL, then `mollifier migrate`, `serve` and `worker`.

    Results go to stdout, everything else to stderr; --json where a program reads them. Exit codes: 0 fine, 1 failed, 2 wrong usage or setting.
    """


app.command(rich_help_panel=_TRYING)(demo)
app.command(rich_help_panel=_TRYING)(dev)
app.command(rich_help_panel=_TRYING)(replay)
app.command(rich_help_panel=_SERVERS)(serve)
app.command(rich_help_panel=_SERVERS)(worker)
app.command(rich_help_panel=_SERVERS)(migrate)
app.command(rich_help_panel=_CHECKS)(doctor)
app.command(rich_help_panel=_CHECKS)(audit)
app.command(rich_help_panel=_CHECKS)(settings)
app.command(rich_help_panel=_CHECKS)(torture)
app.add_typer(organizations.app, name="org", rich_help_panel=_ADMINISTRATION)
app.add_typer(projects.app, name="project", rich_help_panel=_ADMINISTRATION)
app.add_typer(environments.app, name="env", rich_help_panel=_ADMINISTRATION)
app.add_typer(keys.app, name="key", rich_help_panel=_ADMINISTRATION)
app.add_typer(flags.app, name="flags", rich_help_panel=_ADMINISTRATION)
app.add_typer(dead_letters.app, name="dead-letters", rich_help_panel=_ADMINISTRATION)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, `sys.argv` by default, and exit."""
    try:
        app(arguments, prog_name="mollifier")
    except MollifierError as error:
        note(f"mollifier: {_told(error)}")
        sys.exit(_USAGE_EXIT if isinstance(error, SettingsError | InvalidRequestError) else 1)
    except ModuleNotFoundError as error:
        if error.name not in _EMBEDDED:
            raise
        note(f"mollifier: {error.name} is not installed; this command needs: pip install 'mollifier[embedded]'")
        sys.exit(1)


def _told(error: MollifierError) -> str:
    if isinstance(error, NotFoundError) and error.kind in _HINTS:
        return f"there is no {error.kind} {error.id!r}; {_HINTS[error.kind]}"
    return " ".join(str(error).split())
