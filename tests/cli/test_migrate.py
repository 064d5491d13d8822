import asyncio

import pytest

from mollifier.postgres.database import Database
from mollifier.postgres.migrate import schema_status
from tests.cli.conftest import Cli


async def is_current(database_url: str) -> bool:
    async with Database(database_url) as database:
        return (await schema_status(database)).is_current


def test_migrate_brings_an_empty_database_up_to_date_and_lists_the_steps(
    cli: Cli, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLLIFIER_DATABASE_URL", empty_database_url)
    ended = cli("migrate")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()][:2] == ["0001", "0002"]
    assert asyncio.run(is_current(empty_database_url))


def test_migrate_prints_the_applied_steps_as_json(
    cli: Cli, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLLIFIER_DATABASE_URL", empty_database_url)
    assert cli("migrate", "--json").json["applied"][:2] == ["0001", "0002"]
    assert cli("migrate", "--json").json == {"applied": []}


def test_a_current_schema_is_left_alone(configured: Cli) -> None:
    ended = configured("migrate")
    assert (ended.code, ended.out) == (0, "")
    assert "up to date" in ended.err


def test_a_command_on_a_database_without_schema_says_to_migrate(
    cli: Cli, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLLIFIER_DATABASE_URL", empty_database_url)
    ended = cli("org", "list")
    assert (ended.code, ended.out) == (1, "")
    assert "mollifier migrate" in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("command", [["migrate"], ["org", "list"]], ids=" ".join)
def test_a_database_that_cannot_be_reached_is_one_line_on_stderr(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("MOLLIFIER_DATABASE_URL", "postgresql://127.0.0.1:1/none")
    ended = cli(*command)
    assert (ended.code, ended.out) == (1, "")
    assert "cannot be reached" in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("command", [["migrate"], ["org", "list"]], ids=" ".join)
def test_a_missing_database_setting_exits_2_with_its_name(cli: Cli, command: list[str]) -> None:
    ended = cli(*command)
    assert (ended.code, ended.out) == (2, "")
    assert "MOLLIFIER_DATABASE_URL" in ended.err
