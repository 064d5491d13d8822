import json
import logging
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest

from mollifier.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one line of JSON on stdout."""
        (line,) = self.out.splitlines()
        return json.loads(line)


Cli = Callable[..., Ended]


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a setting of ours."""
    for name in [name for name in os.environ if name.startswith("MOLLIFIER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def own_log() -> Generator[None]:
    """Take back what a command does to the logging of this process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for opened in [handler for handler in root.handlers if handler not in handlers]:
        opened.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def cli(unconfigured: None, own_log: None, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run `mollifier` with the given arguments through its entry point."""

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capfd.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def configured(cli: Cli, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """As `cli`, with a migrated database configured."""
    monkeypatch.setenv("MOLLIFIER_DATABASE_URL", database_url)
    return cli
