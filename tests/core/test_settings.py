"""Settings: defaults as documented, and every bad value refused with the variable's name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mollifier.caps import CAPS
from mollifier.errors import MollifierError, SettingsError
from mollifier.settings import Confirmation, Settings, variable

MIB = 1024 * 1024
DOCUMENTED: dict[str, Any] = {
    "enabled": False,
    "drainer_enabled": None,
    "shadow_mode": False,
    "divert": False,
    "partitions": 64,
    "trip_algorithm": "sliding",
    "body_limit_bytes": 3 * 1024 * 1024,
    "redis_url": None,
    "worker_metrics_port": None,
    "trip_window_ms": 200,
    "trip_threshold": 100,
    "hold_ms": 500,
    "drain_concurrency": 50,
    "drain_batch_size": 50,
    "drain_max_attempts": 3,
    "drain_retry_base_ms": 200,
    "drain_retry_cap_ms": 30_000,
    "drain_max_reclaims": 10,
    "drain_max_orgs_per_tick": 500,
    "drain_shutdown_timeout_ms": 30_000,
    "drain_poll_interval_ms": 100,
    "ack_grace_ttl_s": 30,
    "entry_ttl_s": 600,
    "accept_confirm": "none",
    "accept_confirm_timeout_ms": 2_000,
    "held_env_max_entries": 250_000,
    "held_env_max_bytes": 512 * MIB,
    "held_org_max_entries": 500_000,
    "held_org_max_bytes": 1024 * MIB,
    "held_max_entries": 1_000_000,
    "held_max_bytes": 2048 * MIB,
    "held_over_cap": "create",
}

ZERO_HAS_A_MEANING = ["drain_shutdown_timeout_ms", "drain_max_reclaims", *CAPS]
NUMBERS = [field.name for field in msgspec.structs.fields(Settings) if field.type in (int, int | None)]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_setting_has_its_documented_default(name: str) -> None:
    assert getattr(Settings(), name) == DOCUMENTED[name]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, -(10**9), 10**16])
def test_a_number_out_of_range_is_refused_with_the_variables_name(name: str, value: int) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(
        SettingsError, match=rf"^MOLLIFIER_{name.upper()}: must be between \d+ and \d+, is {value}$"
    ) as e:
        Settings(**given)
    assert e.value.variable == f"MOLLIFIER_{name.upper()}"
    assert isinstance(e.value, MollifierError)


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in ZERO_HAS_A_MEANING])
def test_zero_is_refused_where_nothing_could_work_with_it(name: str) -> None:
    given: dict[str, Any] = {name: 0}
    with pytest.raises(SettingsError, match=variable(name)):
        Settings(**given)


@pytest.mark.parametrize("name", ZERO_HAS_A_MEANING)
def test_zero_is_taken_where_it_means_not_at_all(name: str) -> None:
    given: dict[str, Any] = {name: 0}
    assert getattr(Settings(**given), name) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("redis_url", "localhost:6379"),
        ("redis_url", "http://localhost"),
        ("redis_url", ""),
        ("redis_url", "redis"),
        ("database_url", "mysql://localhost/db"),
        ("database_url", "postgres"),
        ("database_url", ""),
        ("trip_algorithm", "gcra"),
        ("held_over_cap", "drop"),
    ],
)
def test_a_value_of_the_wrong_form_is_refused_with_the_variables_name(name: str, value: str) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(SettingsError, match=rf"^{variable(name)}: must"):
        Settings(**given)


@pytest.mark.parametrize("url", ["redis://localhost", "rediss://user:pass@host:1/2", "unix:///run/valkey.sock"])
def test_the_servers_urls_are_accepted(url: str) -> None:
    assert Settings(redis_url=url).redis_url == url


@pytest.mark.parametrize(
    ("enabled", "redis_url", "active"),
    [(False, None, False), (False, "redis://host", False), (True, None, False), (True, "redis://host", True)],
)
def test_mollifier_is_active_when_it_is_switched_on_and_has_a_server(
    enabled: bool, redis_url: str | None, active: bool
) -> None:
    assert Settings(enabled=enabled, redis_url=redis_url).active is active


@pytest.mark.parametrize(
    ("enabled", "drainer_enabled", "drains"),
    [
        (False, None, False),
        (True, None, True),
        (False, False, False),
        (True, False, False),
        (False, True, True),
        (True, True, True),
    ],
)
def test_the_drainer_follows_enabled_unless_it_is_told_otherwise(
    enabled: bool, drainer_enabled: bool | None, drains: bool
) -> None:
    assert Settings(enabled=enabled, drainer_enabled=drainer_enabled).drains is drains


def test_settings_cannot_be_changed_in_place() -> None:
    settings: Any = Settings()
    with pytest.raises(AttributeError):
        settings.enabled = True


def test_settings_that_are_shown_show_no_secret() -> None:
    settings = Settings(
        database_url="postgresql://u:hunter2@h/d", redis_url="redis://u:hunter2@h", admin_token="hunter2", hold_ms=7
    )
    assert "hunter2" not in repr(settings)
    assert "hold_ms=7" in repr(settings)
    assert "redis_url=None" in repr(Settings())


@pytest.mark.parametrize(
    ("text", "confirmation"),
    [
        ("none", Confirmation()),
        ("aof", Confirmation(aof=True)),
        ("replicas:1", Confirmation(replicas=1)),
        ("replicas:9", Confirmation(replicas=9)),
    ],
)
def test_what_an_accept_waits_for_is_read_from_its_setting(text: str, confirmation: Confirmation) -> None:
    assert Settings(accept_confirm=text).confirmation == confirmation
    assert confirmation.is_asked is (text != "none")


@pytest.mark.parametrize("text", ["", "AOF", "replicas", "replicas:0", "replicas:10", "replicas:1 ", "aof,replicas:1"])
def test_a_confirmation_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^MOLLIFIER_ACCEPT_CONFIRM: must be none, aof or replicas:N"):
        Settings(accept_confirm=text)


def test_a_first_retry_that_may_wait_longer_than_any_other_is_refused() -> None:
    assert Settings(drain_retry_base_ms=30_000).drain_retry_cap_ms == 30_000
    with pytest.raises(
        SettingsError, match=r"^MOLLIFIER_DRAIN_RETRY_BASE_MS: is 30001, more than MOLLIFIER_DRAIN_RETRY_CAP"
    ):
        Settings(drain_retry_base_ms=30_001)
