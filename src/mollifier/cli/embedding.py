"""What `dev`, `demo` and `replay --embedded` have in common: the mode, what is told of it, and the log of their processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mollifier.cli.output import note, stderr, tell_warnings
from mollifier.rollout import Mode

if TYPE_CHECKING:
    from mollifier.child_environment import ChildEnvironment

ModeOption = Annotated[
    Mode | None,
    typer.Option(help="The rollout's step: switched off, watched, written to both stores, held. [default: monitor]"),
]


def child_environment(mode: Mode | None, defaults: Mapping[str, str] | None = None) -> ChildEnvironment:
    """Return what API and worker are started with, having said which configured settings do not count here.

    `defaults` are variables for where the environment has none. Raises SettingsError.
    """
    from mollifier import processes

    with tell_warnings():
        environment = processes.child_environment(mode, defaults)
    if environment.ignored:
        note(f"mollifier: this command starts servers of its own; ignored: {', '.join(environment.ignored)}")
    if environment.overruled:
        note(f"mollifier: --mode {environment.mode} is in effect; ignored: {', '.join(environment.overruled)}")
    return environment


def finish(code: int) -> NoReturn:
    """End the command with this exit code."""
    raise typer.Exit(code)


def report(text: str) -> None:
    """Say in a few words what is being started, where somebody is watching."""
    console = stderr()
    if console.is_terminal:
        console.print(text, style="dim", markup=False)


@contextmanager
def kept_log(log: Path | None) -> Generator[Path]:
    """Lend the log, or a temporary one that is kept where the block is left with a failure."""
    if log is not None:
        yield log
        return
    file, name = tempfile.mkstemp(prefix="mollifier-", suffix=".log")
    os.close(file)
    path, keep = Path(name), True
    try:
        yield path
    except typer.Exit as ended:
        keep = ended.exit_code == 1
        raise
    finally:
        if keep:
            note(f"mollifier: the log of all processes is kept in {path}")
        else:
            path.unlink()


@contextmanager
def told_failures() -> Generator[None]:
    """Show the end of the log where a process that was started here fails."""
    from mollifier.processes import ProcessError

    try:
        yield
    except ProcessError as error:
        if error.tail:
            note(error.tail)
        raise
