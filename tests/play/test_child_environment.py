"""What API and worker are started with, given what the environment holds and which mode was asked for."""

from collections.abc import Mapping

import pytest

from mollifier import config
from mollifier.child_environment import ChildEnvironment
from mollifier.errors import SettingsError
from mollifier.rollout import Mode
from mollifier.settings import Settings


def settings_of(environment: ChildEnvironment) -> Settings:
    ours = {"redis_url": "redis://ours", "database_url": "postgresql://ours/db", "admin_token": "token"}
    return config.load(environment.on(**ours))


@pytest.mark.parametrize(
    ("mode", "enabled", "shadow", "divert", "drains"),
    [
        (Mode.OFF, False, False, False, False),
        (Mode.SHADOW, True, True, False, True),
        (Mode.MONITOR, True, False, False, True),
        (Mode.DIVERT, True, False, True, True),
        (None, True, False, False, True),
    ],
)
def test_each_mode_makes_its_settings(
    mode: Mode | None, enabled: bool, shadow: bool, divert: bool, drains: bool
) -> None:
    environment = ChildEnvironment({}, mode)
    settings = settings_of(environment)
    assert (settings.enabled, settings.shadow_mode, settings.divert) == (enabled, shadow, divert)
    assert settings.drains == drains
    assert environment.mode == (mode or Mode.MONITOR)


@pytest.mark.parametrize(
    ("inherited", "asked", "mode", "overruled"),
    [
        ({"MOLLIFIER_ENABLED": "0"}, None, Mode.OFF, []),
        ({"MOLLIFIER_DIVERT": "true"}, None, Mode.DIVERT, []),
        ({"MOLLIFIER_SHADOW_MODE": "1"}, None, Mode.MONITOR, []),
        ({"MOLLIFIER_ENABLED": ""}, None, Mode.MONITOR, []),
        ({"mollifier_enabled": "off"}, None, Mode.OFF, []),
        ({"MOLLIFIER_ENABLED": "0"}, Mode.MONITOR, Mode.MONITOR, ["MOLLIFIER_ENABLED"]),
        ({"MOLLIFIER_ENABLED": "yes"}, Mode.MONITOR, Mode.MONITOR, []),
    ],
)
def test_a_mode_that_was_asked_for_beats_the_environment_which_beats_the_default(
    inherited: Mapping[str, str], asked: Mode | None, mode: Mode, overruled: list[str]
) -> None:
    environment = ChildEnvironment(inherited, asked)
    assert (environment.mode, environment.overruled) == (mode, overruled)
    expected = mode.settings if asked else {"enabled": mode is not Mode.OFF}
    settings = settings_of(environment)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_configured_servers_are_left_out_and_named() -> None:
    inherited = {
        "MOLLIFIER_DATABASE_URL": "postgresql://production/db",
        "MOLLIFIER_REDIS_HOST": "production",
        "MOLLIFIER_REDIS_PASSWORD": "secret",
    }
    environment = ChildEnvironment(inherited, None)
    assert environment.ignored == sorted(inherited)
    settings = settings_of(environment)
    assert (settings.database_url, settings.redis_url) == ("postgresql://ours/db", "redis://ours")


def test_every_other_setting_is_respected_and_defaults_yield_to_it() -> None:
    inherited = {"MOLLIFIER_TRIP_THRESHOLD": "7", "MOLLIFIER_DRAINER_ENABLED": "0", "PATH": "/bin", "EMPTY": ""}
    defaults = {"MOLLIFIER_TRIP_THRESHOLD": "30", "MOLLIFIER_HOLD_MS": "9"}
    environment = ChildEnvironment(inherited, Mode.MONITOR, defaults)
    settings = settings_of(environment)
    assert (settings.trip_threshold, settings.hold_ms, settings.drains) == (7, 9, False)
    assert environment.settings.trip_threshold == 7
    assert (environment.variables["PATH"], environment.variables["EMPTY"]) == ("/bin", "")


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("", ("mollifier.demo_tasks",)),
        ("mine, other", ("mollifier.demo_tasks", "mine", "other")),
        ("mine,mollifier.demo_tasks", ("mollifier.demo_tasks", "mine")),
    ],
)
def test_the_demo_tasks_come_beside_ones_own(tasks: str, expected: tuple[str, ...]) -> None:
    assert settings_of(ChildEnvironment({"MOLLIFIER_TASKS": tasks}, None)).tasks == expected


def test_a_bad_setting_is_named_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match="MOLLIFIER_TRIP_THRESHOLD"):
        ChildEnvironment({"MOLLIFIER_TRIP_THRESHOLD": "many"}, None)
