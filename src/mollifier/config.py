"""Reads the environment into `Settings`. Nothing else in this package reads it.

Every field of `Settings` has a variable of its name, prefixed `MOLLIFIER_`; the buffer's server may be named by its URL or by its
parts. An empty variable counts as unset. The OpenTelemetry SDK reads its own `OTEL_*`; here it is only told what to export.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import ssl
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_type_hints
from urllib.parse import quote, urlencode, urlsplit

import msgspec
from pydantic import BeforeValidator, Field, ValidationError, create_model
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from mollifier.errors import SettingsError
from mollifier.settings import PREFIX, Settings, variable

log = logging.getLogger(__name__)

HELP: Mapping[str, str] = {
    "database_url": "Postgres that records runs: postgresql://user:password@host/database",
    "redis_url": "Valkey or Redis of Mollifier's own: redis://, rediss:// or unix://; or name it by its parts, below",
    "redis_host": "host of the buffer's server, instead of the URL",
    "redis_port": "its port",
    "redis_username": "its user name",
    "redis_password": "its password",
    "redis_tls": "whether it speaks TLS",
    "redis_ca_file": "file of certificates (PEM) to trust beside the system's; goes with a rediss:// URL, too",
    "admin_token": "bearer token of the admin API; without one that API is closed",
    "tasks": "modules whose functions a worker runs as tasks, separated by commas",
    "body_limit_bytes": "largest request body the API takes",
    "request_limit": "requests of one API key that are let through in a window, by all replicas together; unset, any number",
    "request_limit_window_s": "length of that window in seconds",
    "worker_metrics_port": "port on which a worker serves its metrics to Prometheus, on every IPv4 address of its machine; unset, it does not",
    "enabled": "the kill switch: off, neither gate nor buffer is touched",
    "drainer_enabled": "whether workers drain the buffer and an API looks for held runs; unset, it follows ENABLED",
    "shadow_mode": "watch organizations whose flag is off: log what would be held, hold nothing",
    "divert": "hold triggers in the buffer instead of only copying them there",
    "partitions": "hash slots the buffer is spread over; fixed at the buffer's first boot",
    "ack_grace_ttl_s": "seconds a drained entry stays readable",
    "entry_ttl_s": "seconds an audit copy is kept (monitor mode)",
    "lease_ms": "milliseconds after which an entry whose drainer died is taken up by another",
    "trip_algorithm": "how triggers are counted: sliding (strict in any window) or fixed",
    "trip_window_ms": "length of the window in milliseconds",
    "trip_threshold": "triggers of one environment that pass in a window",
    "hold_ms": "milliseconds an environment is held after its last overage",
    "gate_deadline_ms": "milliseconds the gate waits for the buffer's server before it lets the trigger pass",
    "accept_deadline_ms": "milliseconds a buffer write may take on the trigger path",
    "accept_confirm": "what a held trigger waits for before it is answered: none, aof (on disk) or replicas:N; unconfirmed, it is created directly",
    "accept_confirm_timeout_ms": "milliseconds such a confirmation may take; from a server that syncs every second it takes up to 1,600",
    "held_env_max_entries": "triggers of one environment that may be held at a time; 0: any number",
    "held_env_max_bytes": "bytes that they may take; 0: any number",
    "held_org_max_entries": "triggers of one organization that may be held at a time; 0: any number",
    "held_org_max_bytes": "bytes that they may take; 0: any number",
    "held_max_entries": "triggers that may be held at a time in all; 0: any number",
    "held_max_bytes": "bytes that they may take, about half of the server's memory; 0: any number",
    "held_over_cap": "what becomes of a trigger that would be held beyond one of these: create its run directly, or reject it (429)",
    "drain_concurrency": "entries one worker handles at a time",
    "drain_batch_size": "entries of one environment taken in one tick; at most half of the concurrency",
    "drain_max_attempts": "attempts after which an entry is given up",
    "drain_retry_base_ms": "milliseconds that the first retry of an entry waits at most; each further one up to twice as long",
    "drain_retry_cap_ms": "milliseconds that any retry waits at most",
    "drain_max_reclaims": "how often an entry comes back after its drainer died, before it is given up",
    "drain_max_orgs_per_tick": "organizations served in one tick",
    "drain_shutdown_timeout_ms": "milliseconds a stopping worker waits for entries in hand",
    "drain_poll_interval_ms": "milliseconds between looks at an empty buffer",
    "sweep_interval_s": "seconds between sweeps, which look through the buffer for what is stale or does not fit together, and repair its index",
}
"""One line for every variable, by its name in lower case without the prefix."""

_REDIS_PARTS: Mapping[str, Any] = {
    "redis_host": (str | None, None),
    "redis_port": (int | None, None),
    "redis_username": (str | None, None),
    "redis_password": (str | None, None),
    "redis_tls": (bool | None, None),
}
_CA_FILE: Mapping[str, Any] = {"redis_ca_file": (str | None, None)}
_SECRETS = {"admin_token", "redis_password"}
_URLS = {"database_url", "redis_url"}
_MASK = "***"
_PORT_MAX = 65_535
# Read by the test suite.
_NOT_OURS = {"MOLLIFIER_FUZZ_SECONDS", "MOLLIFIER_FUZZ_SEED"}


class Variable(msgspec.Struct, frozen=True, kw_only=True):
    """One variable as it is in effect; `value` is fit to be shown, secrets masked, and empty when unset."""

    name: str
    value: str
    source: Literal["default", "environment"]
    help: str


class Exporters(msgspec.Struct, frozen=True, kw_only=True):
    """What the OpenTelemetry SDK is to send over OTLP, because somebody named an endpoint for it."""

    traces: bool = False
    metrics: bool = False


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of the environment, and warn of variables that look like ours and are not.

    Raises SettingsError, naming the variable, for a value that cannot be; secrets are never part of its message.
    """
    environ = os.environ if environ is None else environ
    for warning in unknown_variables(environ):
        log.warning("mollifier.unknown_setting", extra={"fields": {"detail": warning}})
    values = _read(environ)
    parts = {name: values.pop(name) for name in _REDIS_PARTS}
    ca_file = values.pop("redis_ca_file")
    url = _redis_url(values["redis_url"], parts)
    if ca_file is not None:
        url = _trusting(ca_file, url)
    return _settings({**values, "redis_url": url})


def describe(environ: Mapping[str, str] | None = None) -> list[Variable]:
    """Return every variable with what it is set to. Raises SettingsError as `load` does."""
    environ = os.environ if environ is None else environ
    load(environ)
    values = _read(environ)
    given = {name.upper() for name, value in environ.items() if value}
    return [
        Variable(
            name=variable(name),
            value=_shown(name, values[name]),
            source="environment" if variable(name) in given else "default",
            help=help_line,
        )
        for name, help_line in HELP.items()
    ]


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return one line for each variable with our prefix that nothing reads, with the name that may have been meant."""
    known = [variable(name) for name in HELP]
    warnings: list[str] = []
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and name.upper() not in {*known, *_NOT_OURS}:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; `mollifier settings` lists what is"
            warnings.append(f"{name} is no setting of Mollifier{hint}")
    return warnings


def exporters(environ: Mapping[str, str] | None = None) -> Exporters:
    """Return what to send over OTLP: signals with an endpoint, unless the SDK or that signal is switched off."""
    environ = os.environ if environ is None else environ
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Exporters()

    def wanted(signal: str) -> bool:
        chosen = environ.get(f"OTEL_{signal}_EXPORTER", "otlp").split(",")
        endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
        return "otlp" in chosen and any(environ.get(name) for name in endpoints)

    return Exporters(traces=wanted("TRACES"), metrics=wanted("METRICS"))


# --- inside --------------------------------------------------------------------------------------------------------


def _fields() -> dict[str, Any]:
    hints = get_type_hints(Settings)
    hints["tasks"] = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
    ours = {field.name: (hints[field.name], field.default) for field in msgspec.structs.fields(Settings)}
    return {
        name: (kind, Field(default, description=HELP[name]))
        for name, (kind, default) in {**ours, **_REDIS_PARTS, **_CA_FILE}.items()
    }


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class _Prefixed(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )


_Variables = create_model("_Variables", __base__=_Prefixed, **_fields())


def _read(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the value of every variable, its default where it is unset."""

    class Source(EnvSettingsSource):
        def __init__(self, settings_cls: type[BaseSettings]) -> None:
            super().__init__(settings_cls)
            self.env_vars = {name.lower(): value for name, value in environ.items() if value}

    class Variables(_Variables):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (Source(settings_cls),)

    try:
        return dict(Variables())
    except ValidationError as error:
        raise _explained(error, environ) from None


def _explained(error: ValidationError, environ: Mapping[str, str]) -> SettingsError:
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0])
    match first["type"]:
        case "bool_parsing" | "bool_type":
            wanted = "must be 1, true, yes or on, or 0, false, no or off"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            wanted = "must be a whole number"
        case "literal_error":
            wanted = f"must be {first['ctx']['expected']}" if "ctx" in first else first["msg"]
        case _:
            wanted = first["msg"].removeprefix("Value error, ")
    given = next((value for key, value in environ.items() if key.upper() == variable(name)), "")
    shown = "" if name in _SECRETS | _URLS else f", is {given!r}"
    return SettingsError(variable(name), wanted + shown)


def _redis_url(url: str | None, parts: Mapping[str, Any]) -> str | None:
    given = [name for name, value in parts.items() if value is not None]
    if not given:
        return url
    if url is not None:
        raise SettingsError(
            variable("redis_url"),
            f"is set and {variable(given[0])} too; name the server by its URL or by its parts, not both",
        )
    host, port = parts["redis_host"], parts["redis_port"]
    if host is None:
        raise SettingsError(variable("redis_host"), f"is required where {variable(given[0])} is set: name the host")
    if port is not None and not 0 < port <= _PORT_MAX:
        raise SettingsError(variable("redis_port"), f"must be between 1 and {_PORT_MAX}, is {port}")
    scheme = "rediss" if parts["redis_tls"] else "redis"
    username, password = parts["redis_username"], parts["redis_password"]
    login = (
        ""
        if username is None and password is None
        else f"{quote(username or '', safe='')}:{quote(password or '', safe='')}@"
    )
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{login}{host}:{port or 6379}"


def _trusting(ca_file: str, url: str | None) -> str:
    """Have the client of this URL check the server's certificate against those in the file."""
    name = variable("redis_ca_file")
    if url is None or not url.startswith("rediss://"):
        raise SettingsError(
            name,
            f"is set, but the buffer's server is not asked over TLS: set {variable('redis_tls')}=1, or use rediss://",
        )
    try:
        ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        # What ssl says of a file without certificates names none; both are OSErrors.
        raise SettingsError(name, f"cannot be used: {ca_file!r}: {error.strerror or error}") from None
    parts = urlsplit(url)
    query = "&".join(part for part in (parts.query, urlencode({"ssl_ca_certs": ca_file})) if part)
    return parts._replace(query=query).geturl()


def _settings(values: Mapping[str, Any]) -> Settings:
    for name in sorted(_URLS):
        url: str | None = values[name]
        try:
            _ = urlsplit(url).port if url is not None else None
        except ValueError:
            raise SettingsError(variable(name), "is no URL: its host or its port cannot be read") from None
    return Settings(**values)


def _shown(name: str, value: Any) -> str:
    match value:
        case None | ():
            return ""
        case bool():
            return str(int(value))
        case tuple():
            return ",".join(str(part) for part in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        case _ if name in _SECRETS:
            return _MASK
        case _ if name in _URLS:
            return masked(value)
        case _:
            return str(value)


def masked(url: str) -> str:
    """Return the URL with a mask where its password is."""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    netloc = parts.netloc if parts.password is None else f"{login.partition(':')[0]}:{_MASK}@{host}"
    query = re.sub(r"(?<=password=)[^&]*", _MASK, parts.query)
    shown = parts._replace(netloc=netloc, query=query).geturl()
    # Some versions of Python lose the slashes before an empty host.
    return shown.replace(":", "://", 1) if "://" in url and "://" not in shown else shown
