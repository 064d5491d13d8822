"""The log of a long-running command: JSON lines on standard error, or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mollifier.cli.output import note

LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log-file", metavar="FILE", help="Append the log to this file instead of writing it to standard error."
    ),
]


def start_log(log_file: Path | None) -> None:
    """Send this process's log where the option says."""
    from mollifier.observability import configure_logging

    try:
        configure_logging(log_file)
    except OSError as error:
        raise typer.BadParameter(
            f"{str(log_file)!r} cannot be written: {error.strerror}", param_hint="--log-file"
        ) from error
    if log_file is not None:
        # Without a file, standard error is the log, and holds JSON lines only.
        note(f"Logging to {log_file}.")
