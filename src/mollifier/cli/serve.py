"""`mollifier serve`: the HTTP API."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from mollifier.cli.logs import LogFile, start_log
from mollifier.cli.output import note, print_json

log = logging.getLogger(__name__)


def serve(
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    log_file: LogFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print {url} on stdout when ready, for programs.")] = False,
) -> None:
    """Serve the HTTP API against the configured servers.

    Takes triggers, answers questions about runs, and holds nothing itself: run as many as you like behind a load balancer, and at least one
    `worker` beside them. Runs with the database or the buffer's server away, too, and says so on /readyz. The log is JSON lines.

    Stops on SIGTERM or Ctrl-C, after the requests in hand.

    For example:

        $ mollifier serve --host 0.0.0.0 --port 8000
        $ mollifier serve --port 0 --json --log-file api.log
    """
    from mollifier import config
    from mollifier.errors import MollifierError
    from mollifier.http import serve as serve_api

    start_log(log_file)
    settings = config.load()

    def ready(url: str) -> None:
        log.info("mollifier.api_started", extra={"fields": {"url": url}})
        if log_file is not None:
            note(f"Serving {url}.")
        if as_json:
            print_json({"url": url})

    try:
        serve_api(settings, host=host, port=port, log_file=log_file, on_ready=ready)
    except OSError as error:
        detail = (
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port, or --port 0"
        )
        raise MollifierError(detail) from error
