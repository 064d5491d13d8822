"""What the environment may say, and what is told of what it may not say."""

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier import config
from mollifier.errors import SettingsError
from mollifier.settings import Settings


def load(**variables: str) -> Settings:
    return config.load({f"MOLLIFIER_{name}": value for name, value in variables.items()})


def test_an_empty_environment_gives_the_defaults() -> None:
    assert config.load({}) == Settings()
    assert load(REDIS_URL="", ENABLED="", TASKS="") == Settings()


def test_every_setting_has_a_line_of_help() -> None:
    assert set(Settings.__struct_fields__) <= set(config.HELP)


@pytest.mark.parametrize("field", Settings.__struct_fields__)
def test_every_setting_is_read_from_its_variable(field: str) -> None:
    samples: dict[type, tuple[str, Any]] = {bool: ("1", True), int: ("7", 7), tuple: ("a,b", ("a", "b"))}
    special: dict[str, tuple[str, Any]] = {
        "database_url": ("postgresql://h/d", "postgresql://h/d"),
        "redis_url": ("unix:///run/v.sock", "unix:///run/v.sock"),
        "admin_token": ("token", "token"),
        "drainer_enabled": ("off", False),
        "trip_algorithm": ("fixed", "fixed"),
        "accept_confirm": ("replicas:2", "replicas:2"),
        "body_limit_bytes": ("2048", 2048),
        "lease_ms": ("200", 200),
        "drain_retry_cap_ms": ("60000", 60_000),
        "worker_metrics_port": ("9100", 9100),
        "request_limit": ("600", 600),
        "held_over_cap": ("reject", "reject"),
    }
    text, value = special.get(field) or samples[type(getattr(Settings(), field))]
    assert getattr(load(**{field.upper(): text}), field) == value


@pytest.mark.parametrize(("text", "value"), [(t, True) for t in ("1", "true", "YES", "on")])
def test_a_switch_is_on(text: str, value: bool) -> None:
    assert load(ENABLED=text).enabled is value


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_a_switch_is_off(text: str) -> None:
    assert load(ENABLED=text).enabled is False


def test_tasks_are_separated_by_commas() -> None:
    assert load(TASKS=" app.tasks, app.more,").tasks == ("app.tasks", "app.more")


@pytest.mark.parametrize(
    ("variables", "variable", "told"),
    [
        ({"ENABLED": "maybe"}, "MOLLIFIER_ENABLED", "'maybe'"),
        ({"HOLD_MS": "soon"}, "MOLLIFIER_HOLD_MS", "whole number"),
        ({"HOLD_MS": "1.5"}, "MOLLIFIER_HOLD_MS", "whole number"),
        ({"HOLD_MS": "0"}, "MOLLIFIER_HOLD_MS", "between 1 and"),
        ({"PARTITIONS": "9" * 30}, "MOLLIFIER_PARTITIONS", "between 1 and"),
        ({"TRIP_ALGORITHM": "gcra"}, "MOLLIFIER_TRIP_ALGORITHM", "'sliding' or 'fixed'"),
        ({"REDIS_URL": "http://host"}, "MOLLIFIER_REDIS_URL", "redis://"),
        ({"REDIS_URL": "redis://host:port"}, "MOLLIFIER_REDIS_URL", "port"),
        ({"DATABASE_URL": "mysql://host"}, "MOLLIFIER_DATABASE_URL", "postgresql://"),
        ({"DATABASE_URL": "postgresql://[::1"}, "MOLLIFIER_DATABASE_URL", "URL"),
        ({"REDIS_URL": "redis://a", "REDIS_HOST": "b"}, "MOLLIFIER_REDIS_URL", "MOLLIFIER_REDIS_HOST"),
        ({"REDIS_URL": "redis://a", "REDIS_TLS": "1"}, "MOLLIFIER_REDIS_URL", "MOLLIFIER_REDIS_TLS"),
        ({"REDIS_PASSWORD": "p"}, "MOLLIFIER_REDIS_HOST", "MOLLIFIER_REDIS_PASSWORD"),
        ({"REDIS_HOST": "a", "REDIS_PORT": "70000"}, "MOLLIFIER_REDIS_PORT", "between 1 and"),
    ],
)
def test_a_value_that_cannot_be_stops_with_the_name_of_the_variable(
    variables: dict[str, str], variable: str, told: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(**variables)
    assert caught.value.variable == variable
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "url"),
    [
        ({"HOST": "h"}, "redis://h:6379"),
        ({"HOST": "h", "PORT": "7000", "TLS": "1"}, "rediss://h:7000"),
        ({"HOST": "h", "TLS": "0", "USERNAME": "u", "PASSWORD": "p@:/"}, "redis://u:p%40%3A%2F@h:6379"),
        ({"HOST": "::1", "PASSWORD": "p"}, "redis://:p@[::1]:6379"),
    ],
)
def test_the_buffers_server_may_be_named_by_its_parts(parts: dict[str, str], url: str) -> None:
    assert load(**{f"REDIS_{name}": value for name, value in parts.items()}).redis_url == url


@pytest.mark.parametrize(
    "variables",
    [
        {"REDIS_URL": "redis://u:hunter2@h:x"},
        {"DATABASE_URL": "mysql://u:hunter2@h"},
        {"REDIS_PASSWORD": "hunter2"},
        {"REDIS_URL": "redis://a", "REDIS_PASSWORD": "hunter2"},
    ],
)
def test_no_message_repeats_a_secret(variables: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(**variables)
    assert "hunter2" not in str(caught.value)


def test_a_variable_that_is_almost_ours_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(TRIP_TRESHOLD="5", FUZZ_SECONDS="1") == Settings()
    (record,) = caplog.records
    fields: dict[str, str] = record.__dict__["fields"]
    assert "MOLLIFIER_TRIP_TRESHOLD" in fields["detail"]
    assert "did you mean MOLLIFIER_TRIP_THRESHOLD?" in fields["detail"]


@pytest.mark.parametrize("url", ["unix:///tmp/valkey.sock", "unix:///tmp/valkey.sock?db=1", "redis://host:6379/0"])
def test_a_url_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert config.masked(url) == url


def test_a_password_in_a_query_is_masked_too() -> None:
    assert (
        config.masked("postgresql://host/db?user=u&password=hunter2&x=1")
        == "postgresql://host/db?user=u&password=***&x=1"
    )


def test_other_peoples_variables_are_not_ours_to_read() -> None:
    assert config.unknown_variables({"PATH": "/bin", "REDIS_URL": "redis://other", "XMOLLIFIER_A": "1"}) == []


def test_settings_are_described_with_their_source_and_without_secrets() -> None:
    described = {
        one.name: one
        for one in config.describe(
            {
                "MOLLIFIER_DATABASE_URL": "postgresql://user:hunter2@host/db",
                "MOLLIFIER_ADMIN_TOKEN": "hunter2",
                "MOLLIFIER_ENABLED": "yes",
                "MOLLIFIER_HOLD_MS": "",
            }
        )
    }
    assert described["MOLLIFIER_DATABASE_URL"].value == "postgresql://user:***@host/db"
    assert described["MOLLIFIER_ADMIN_TOKEN"].value == "***"
    assert (described["MOLLIFIER_ENABLED"].value, described["MOLLIFIER_ENABLED"].source) == ("1", "environment")
    assert (described["MOLLIFIER_HOLD_MS"].value, described["MOLLIFIER_HOLD_MS"].source) == ("500", "default")
    assert all(one.help for one in described.values())


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, config.Exporters()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, config.Exporters(traces=True, metrics=True)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, config.Exporters(traces=True)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_METRICS_EXPORTER": "none"}, config.Exporters(traces=True)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, config.Exporters()),
    ],
)
def test_signals_are_exported_where_an_endpoint_is_named(environ: dict[str, str], expected: config.Exporters) -> None:
    assert config.exporters(environ) == expected


@given(
    st.dictionaries(
        st.sampled_from([f"MOLLIFIER_{name.upper()}" for name in config.HELP]),
        st.text(max_size=20) | st.sampled_from(["0", "1", "redis://h", "postgresql://h"]),
    )
)
def test_any_environment_gives_settings_or_names_a_variable(environ: dict[str, str]) -> None:
    try:
        config.load(environ)
    except SettingsError as error:
        named = error.variable
    else:
        return
    assert named.startswith("MOLLIFIER_")
