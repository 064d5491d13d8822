"""The `mollifier` command: one file per command or group of commands, registered in `main.py`."""

import sys

try:
    from mollifier.cli.main import main
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    sys.exit("mollifier: the library alone has no command line; install it with: pip install 'mollifier[server]'")

__all__ = ["main"]
