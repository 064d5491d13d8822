"""The `mollifier` command: one file per command or group of commands, registered in `main.py`."""

from mollifier.cli.main import main

__all__ = ["main"]
