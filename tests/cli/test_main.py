import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mollifier.cli.main import app
from tests.cli.conftest import Cli

ROOT = Path(__file__).parent.parent.parent
HEAVY = ["alembic", "litestar", "procrastinate", "psycopg", "rich", "sqlalchemy", "structlog", "uvicorn"]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that does something, as the words that call it."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


COMMANDS = list(commands())


def test_the_contract_s_commands_are_there() -> None:
    groups = {path[0] for path in COMMANDS}
    assert {"serve", "worker", "migrate", "org", "project", "env", "key", "flags", "audit", "settings"} <= groups


def test_alone_it_shows_its_help(cli: Cli) -> None:
    ended = cli()
    for path in COMMANDS:
        assert path[0] in ended.out + ended.err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example(cli: Cli, command: tuple[str, ...]) -> None:
    ended = cli(*command, "--help")
    assert ended.code == 0
    words = " ".join(["mollifier", *command])
    assert any(line.strip().startswith("$ ") and words in line for line in ended.out.splitlines())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_option_and_argument_is_explained(command: tuple[str, ...]) -> None:
    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    assert [parameter.name for parameter in found.params if not parameter.help] == []


def test_the_version_is_the_package_s(cli: Cli) -> None:
    ended = cli("--version")
    assert (ended.code, ended.out) == (0, version("mollifier") + "\n")


@pytest.mark.parametrize("arguments", [["nonsense"], ["audit", "--nonsense"], ["flags", "nonsense"]], ids=" ".join)
def test_what_is_not_there_is_bad_usage(cli: Cli, arguments: list[str]) -> None:
    ended = cli(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "nonsense" in ended.err


def test_the_package_runs_as_the_installed_command_does() -> None:
    module = subprocess.run(
        [sys.executable, "-m", "mollifier", "--version"], capture_output=True, text=True, check=True
    )
    installed = subprocess.run(
        [Path(sys.executable).parent / "mollifier", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout == installed.stdout
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mollifier": "mollifier.cli:main"}


def test_loading_the_command_loads_nothing_that_only_some_commands_need() -> None:
    probe = f"import sys, mollifier.cli; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [("typer", ["--help"], "mollifier[server]"), ("aiohttp", ["demo"], "mollifier[embedded]")],
)
def test_a_missing_extra_is_named(missing: str, arguments: list[str], extra: str) -> None:
    probe = f"import sys; sys.modules[{missing!r}] = None; from mollifier.cli import main; main({arguments!r})"
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert extra in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_what_nobody_expected_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mollifier.config.describe", fail)
    with pytest.raises(ZeroDivisionError):
        cli("settings")
