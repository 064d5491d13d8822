import pytest

from mollifier.config import HELP
from tests.cli.conftest import Cli


def test_every_setting_is_shown_with_its_value_its_source_and_what_it_does(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLLIFIER_TRIP_THRESHOLD", "7")
    shown = {each["name"]: each for each in cli("settings", "--json").json}
    assert shown.keys() == {f"MOLLIFIER_{name.upper()}" for name in HELP}
    assert (shown["MOLLIFIER_TRIP_THRESHOLD"]["value"], shown["MOLLIFIER_TRIP_THRESHOLD"]["source"]) == (
        "7",
        "environment",
    )
    assert (shown["MOLLIFIER_HOLD_MS"]["value"], shown["MOLLIFIER_HOLD_MS"]["source"]) == ("500", "default")
    assert all(each["help"] for each in shown.values())


def test_people_see_a_line_per_setting(cli: Cli) -> None:
    ended = cli("settings")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert len(lines) == 1 + len(HELP)
    assert next(line for line in lines if line.startswith("MOLLIFIER_HOLD_MS")).split()[:3] == [
        "MOLLIFIER_HOLD_MS",
        "500",
        "default",
    ]


@pytest.mark.parametrize("arguments", [["settings"], ["settings", "--json"]], ids=" ".join)
def test_secrets_are_never_shown(cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv("MOLLIFIER_ADMIN_TOKEN", "hush-token")
    monkeypatch.setenv("MOLLIFIER_DATABASE_URL", "postgresql://me:hush-database@db/name")
    monkeypatch.setenv("MOLLIFIER_REDIS_URL", "redis://me:hush-redis@cache/0")
    ended = cli(*arguments)
    assert ended.code == 0
    assert "hush" not in ended.out + ended.err
    assert "@cache/0" in ended.out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOLLIFIER_HOLD_MS", "soon"),
        ("MOLLIFIER_HOLD_MS", "0"),
        ("MOLLIFIER_TRIP_ALGORITHM", "leaky"),
        ("MOLLIFIER_ENABLED", "perhaps"),
        ("MOLLIFIER_REDIS_URL", "http://cache"),
    ],
)
def test_a_bad_value_exits_2_with_the_variable(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    ended = cli("settings")
    assert (ended.code, ended.out) == (2, "")
    assert name in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_misspelt_variable_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLLIFIER_TRIP_TRESHOLD", "5")
    ended = cli("settings", "--json")
    assert ended.code == 0
    assert "did you mean MOLLIFIER_TRIP_THRESHOLD" in ended.err
