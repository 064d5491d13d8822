"""Settings: one frozen struct with defaults and checks. It reads no environment; `config.py` does."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from mollifier.errors import SettingsError

PREFIX = "MOLLIFIER_"

GIVE_UPS_MAX = 3
"""How often an entry that is to be given up may come back from those who died while they did it."""

SECRET = frozenset({"database_url", "redis_url", "admin_token"})
"""The fields that are secret, or hold a password."""

_RANGES: dict[str, tuple[int, int]] = {
    "partitions": (1, 1024),
    "body_limit_bytes": (1024, 256 * 1024 * 1024),
    "trip_window_ms": (1, 3_600_000),
    "trip_threshold": (1, 1_000_000_000),
    "hold_ms": (1, 3_600_000),
    "gate_deadline_ms": (1, 60_000),
    "accept_deadline_ms": (1, 60_000),
    "accept_confirm_timeout_ms": (1, 4_000),
    "held_env_max_entries": (0, 10**12),
    "held_env_max_bytes": (0, 10**15),
    "held_org_max_entries": (0, 10**12),
    "held_org_max_bytes": (0, 10**15),
    "held_max_entries": (0, 10**12),
    "held_max_bytes": (0, 10**15),
    "lease_ms": (100, 3_600_000),
    "drain_concurrency": (1, 10_000),
    "drain_batch_size": (1, 10_000),
    "drain_max_attempts": (1, 1_000),
    "drain_retry_base_ms": (1, 3_600_000),
    "drain_retry_cap_ms": (1, 86_400_000),
    "drain_max_reclaims": (0, 1_000),
    "drain_max_orgs_per_tick": (1, 100_000),
    "drain_shutdown_timeout_ms": (0, 3_600_000),
    "drain_poll_interval_ms": (1, 60_000),
    "sweep_interval_s": (1, 86_400),
    "request_limit": (1, 1_000_000_000),
    "request_limit_window_s": (1, 86_400),
    "worker_metrics_port": (1, 65_535),
    "ack_grace_ttl_s": (1, 86_400),
    "entry_ttl_s": (1, 30 * 86_400),
}


_CONFIRMATION = re.compile(r"none|aof|replicas:[1-9]")


class Confirmation(msgspec.Struct, frozen=True):
    """That the accept is on the server's disk, or on so many replicas; neither where nothing is asked."""

    aof: bool = False
    replicas: int = 0

    @property
    def is_asked(self) -> bool:
        """True when there is something to wait for."""
        return self.aof or self.replicas > 0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How Mollifier behaves. Every field has an environment variable of the same name, prefixed `MOLLIFIER_`.

    Raises SettingsError, naming the variable, when a value is out of range or two contradict each other.
    """

    # Servers and the edge
    database_url: str | None = None
    redis_url: str | None = None
    admin_token: str | None = None
    tasks: tuple[str, ...] = ()
    body_limit_bytes: int = 3 * 1024 * 1024
    request_limit: int | None = None
    request_limit_window_s: int = 60
    worker_metrics_port: int | None = None

    # Rollout
    enabled: bool = False
    drainer_enabled: bool | None = None
    shadow_mode: bool = False
    divert: bool = False

    # Buffer
    partitions: int = 64
    ack_grace_ttl_s: int = 30
    entry_ttl_s: int = 600
    lease_ms: int = 30_000

    # Gate and trip evaluator
    trip_algorithm: Literal["sliding", "fixed"] = "sliding"
    trip_window_ms: int = 200
    trip_threshold: int = 100
    hold_ms: int = 500
    gate_deadline_ms: int = 25
    accept_deadline_ms: int = 250
    accept_confirm: str = "none"
    accept_confirm_timeout_ms: int = 2_000

    # How much may be held; 0 is any amount
    held_env_max_entries: int = 250_000
    held_env_max_bytes: int = 512 * 1024 * 1024
    held_org_max_entries: int = 500_000
    held_org_max_bytes: int = 1024 * 1024 * 1024
    held_max_entries: int = 1_000_000
    held_max_bytes: int = 2 * 1024 * 1024 * 1024
    held_over_cap: Literal["create", "reject"] = "create"

    # Drainer
    drain_concurrency: int = 50
    drain_batch_size: int = 50
    drain_max_attempts: int = 3
    drain_retry_base_ms: int = 200
    drain_retry_cap_ms: int = 30_000
    drain_max_reclaims: int = 10
    drain_max_orgs_per_tick: int = 500
    drain_shutdown_timeout_ms: int = 30_000
    drain_poll_interval_ms: int = 100
    sweep_interval_s: int = 30

    def __post_init__(self) -> None:
        """Check ranges first, then what contradicts what."""
        for name, (low, high) in _RANGES.items():
            value: int | None = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise SettingsError(variable(name), f"must be between {low} and {high}, is {value}")
        if self.drain_retry_base_ms > self.drain_retry_cap_ms:
            detail = f"is {self.drain_retry_base_ms}, more than {variable('drain_retry_cap_ms')}, which is {self.drain_retry_cap_ms}"
            raise SettingsError(variable("drain_retry_base_ms"), detail)
        if self.trip_algorithm not in ("sliding", "fixed"):
            raise SettingsError(variable("trip_algorithm"), f"must be sliding or fixed, is {self.trip_algorithm!r}")
        if self.held_over_cap not in ("create", "reject"):
            raise SettingsError(variable("held_over_cap"), f"must be create or reject, is {self.held_over_cap!r}")
        if not _CONFIRMATION.fullmatch(self.accept_confirm):
            detail = f"must be none, aof or replicas:N with N from 1 to 9, is {self.accept_confirm!r}"
            raise SettingsError(variable("accept_confirm"), detail)
        if self.redis_url is not None and not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise SettingsError(variable("redis_url"), "must start with redis://, rediss:// or unix://")
        if self.database_url is not None and not self.database_url.startswith(("postgresql://", "postgres://")):
            raise SettingsError(variable("database_url"), "must start with postgresql://")

    def __repr__(self) -> str:
        """Show every setting but those that hold passwords: settings get into messages of all kinds."""
        shown = (f"{name}={'***' if name in SECRET and value else repr(value)}" for name, value in _values(self))
        return f"Settings({', '.join(shown)})"

    @property
    def active(self) -> bool:
        """True when the gate may be asked: switched on, and there is a server to ask."""
        return self.enabled and self.redis_url is not None

    @property
    def confirmation(self) -> Confirmation:
        """What has to be known of an accept before it is answered."""
        kind, _, replicas = self.accept_confirm.partition(":")
        return Confirmation(aof=kind == "aof", replicas=int(replicas or 0))

    @property
    def max_returns(self) -> int:
        """How often an entry comes back at all: beyond `drain_max_reclaims`, to be given up instead of handled."""
        return self.drain_max_reclaims + GIVE_UPS_MAX

    @property
    def drains(self) -> bool:
        """True when a worker process runs the drainer: `drainer_enabled`, or `enabled` where that is unset."""
        return self.enabled if self.drainer_enabled is None else self.drainer_enabled


def _values(settings: Settings) -> list[tuple[str, object]]:
    return [(name, getattr(settings, name)) for name in settings.__struct_fields__]


def variable(field: str) -> str:
    """Return the environment variable of a settings field: `hold_ms` -> `MOLLIFIER_HOLD_MS`."""
    return PREFIX + field.upper()
