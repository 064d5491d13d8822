"""What a seed stands for: the settings, the tenants, what they ask and when, and what goes wrong meanwhile.

Each seed has only some of the kinds of requests and some of the kinds of faults, and these more often: what hides one bug behind another, or
makes it rare, is missing in other seeds (Groce and others, "Swarm Testing").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from random import Random
from typing import Any, Literal, get_args

import msgspec
from msgspec.structs import replace

from mollifier.flags import ORG_FLAG
from mollifier.model import Debounce, Environment, TriggerRequest
from mollifier.settings import Settings
from tests.simulation.engine import FLAKY, POISON, STUBBORN
from tests.simulation.history import Kind
from tests.simulation.network import Weather

FaultKind = Literal[
    "buffer dies",
    "buffer stops",
    "buffer is full",
    "engine dies",
    "engine stops",
    "process dies",
    "process stops",
    "process ends",
    "an entry is spoilt",
    "settings change",
    "the flag flips",
]
FaultOf = Literal["api", "worker", "pop"]
FAULTS: Sequence[FaultKind] = get_args(FaultKind)
_PROCESSES: Sequence[FaultKind] = ("process dies", "process stops", "process ends")
_NO_CAPS: Mapping[str, Any] = {}
_CAPS: Mapping[str, Any] = {"held_env_max_entries": 2, "held_org_max_entries": 3, "held_max_entries": 4}
_MUCH_AT_HAND: Mapping[str, Any] = {"partitions": 1, "drain_concurrency": 10, "drain_batch_size": 5}
CALM = Weather(latency_s=(0.0001, 0.0004))


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that goes wrong: at a moment; or right after the `at_step`-th step `of` a kind, to the process that made it; for a while.

    The kinds are those of any API, those of any worker, and pops that took something.
    """

    kind: FaultKind
    at_s: float = 0.0
    at_step: int | None = None
    of: FaultOf = "worker"
    lasts_s: float = 0.0
    target: int = 0


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a caller. `pick` chooses among the runs the caller knows by then, where the request is about a run, or has a parent."""

    kind: Kind
    at_s: float
    tenant: int
    api: int
    requests: tuple[TriggerRequest, ...] = ()
    has_parent: bool = False
    pick: float = 0.0
    value: Any = None
    patience_s: float = 5.0
    tries: int = 1
    again_after_s: float = 0.05


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One seed."""

    seed: int
    settings: Settings
    changed_settings: Settings
    global_flag: bool | None
    tenants: tuple[Environment, ...]
    apis: int
    workers: int
    skews_us: tuple[int, ...]
    shuffles: bool
    buffer_weather: Weather
    engine_weather: Weather
    patience_s: float
    engine_deadline_ms: int
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    unconfirmed: float
    executes: float
    sweeps: bool
    reclaim_portion: int
    ends_s: float

    @property
    def changes(self) -> bool:
        """True when the operator turns to other settings on the way."""
        return self.has("settings change")

    def has(self, kind: FaultKind) -> bool:
        """Return whether a fault of this kind is to come."""
        return any(fault.kind == kind for fault in self.faults)


def plan_of(seed: int) -> Plan:
    """Return what the seed stands for."""
    chance = Random(seed)
    tenants = _tenants(chance)
    settings = _settings(chance)
    ends_s = chance.uniform(0.6, 2.5)
    apis, workers = chance.choice([1, 2, 2]), chance.choice([1, 2])
    faults = _faults(chance, settings.lease_ms / 1000, ends_s)
    rough = chance.random() < 0.5
    engine_latency_s = chance.choice([(0.0005, 0.004), (0.002, 0.02), (0.01, 0.08)])
    asks = _asks(chance, settings, len(tenants), apis, ends_s)
    strands = not rough and chance.random() < 0.2
    if strands:
        settings = replace(settings, **_MUCH_AT_HAND)
        engine_latency_s = (0.01, 0.08)
        asks = tuple(sorted((*asks, *_burst(chance, apis, ends_s)), key=lambda ask: ask.at_s))
        faults = (*faults, _death_with_full_hands(chance))
    return Plan(
        seed=seed,
        settings=settings,
        changed_settings=_changed(chance, settings),
        global_flag=chance.choice([None, True, False]),
        tenants=tenants,
        apis=apis,
        workers=workers,
        skews_us=tuple(chance.choice([0, chance.randint(-40_000, 40_000)]) for _ in range(apis + workers)),
        shuffles=chance.random() < 0.5,
        buffer_weather=_weather(chance, (0.0001, 0.0005), rough=rough),
        engine_weather=_weather(chance, engine_latency_s, rough=rough),
        patience_s=chance.choice([0.3, 1.0, 5.0]),
        engine_deadline_ms=chance.choice([300, 600, 1000]),
        asks=asks,
        faults=faults,
        unconfirmed=chance.choice([0.0, 0.5]),
        executes=chance.choice([0.0, 0.3, 1.0]),
        sweeps=chance.random() < 0.3,
        reclaim_portion=1 if strands else chance.choice([1, 2, 100]),
        ends_s=ends_s,
    )


# --- who and how ---------------------------------------------------------------------------------------------------


def _tenants(chance: Random) -> tuple[Environment, ...]:
    found: list[Environment] = []
    for org in range(chance.choice([1, 1, 2, 3])):
        flags = {ORG_FLAG: True} if chance.random() < 0.85 else chance.choice([{ORG_FLAG: False}, "unreadable", None])
        for env in range(chance.choice([1, 1, 2])):
            name = f"env_{org}{'ab'[env]}"
            found.append(Environment(id=name, name=name, project_id="p", org_id=f"org_{org}", org_flags=flags))
    return tuple(found)


def _settings(chance: Random) -> Settings:
    mode = chance.random()
    return Settings(
        enabled=mode < 0.96,
        drainer_enabled=True,
        shadow_mode=chance.random() < 0.2,
        divert=mode < 0.82,
        redis_url="unix:///simulated",
        partitions=chance.choice([1, 2, 3]),
        lease_ms=chance.choice([100, 200, 200, 500]),
        ack_grace_ttl_s=1,
        entry_ttl_s=chance.choice([1, 5]),
        trip_window_ms=chance.choice([20, 50, 200]),
        trip_threshold=chance.choice([1, 2, 4]),
        hold_ms=chance.choice([50, 300, 1000]),
        gate_deadline_ms=25,
        accept_deadline_ms=chance.choice([30, 100]),
        accept_confirm=chance.choice(["none"] * 9 + ["aof"]),
        drain_concurrency=chance.choice([1, 2, 5]),
        drain_batch_size=chance.choice([1, 2, 5]),
        drain_max_attempts=chance.choice([1, 2, 3]),
        drain_max_reclaims=chance.choice([1, 10, 10]),
        drain_poll_interval_ms=chance.choice([100, 200, 400]),
        sweep_interval_s=1,
        **chance.choice([_NO_CAPS, _NO_CAPS, _NO_CAPS, _CAPS]),
        held_over_cap=chance.choice(["create", "reject"]),
    )


def _changed(chance: Random, settings: Settings) -> Settings:
    """Return what the operator turns to: another step of the rollout."""
    return replace(settings, enabled=chance.random() < 0.6, divert=not settings.divert)


def _weather(chance: Random, latency_s: tuple[float, float], *, rough: bool) -> Weather:
    weather = Weather(latency_s=latency_s, split=chance.choice([0.0, 0.2]))
    if not rough:
        return weather
    return replace(
        weather,
        lost=chance.choice([0.0, 0.02, 0.1]),
        answer_lost=chance.choice([0.0, 0.02, 0.1]),
        silent=chance.choice([0.0, 0.5, 1.0]),
        slow=chance.choice([0.0, 0.05]),
        slow_s=(0.01, chance.choice([0.05, 0.6])),
    )


# --- what is asked -------------------------------------------------------------------------------------------------


def _asks(chance: Random, settings: Settings, tenants: int, apis: int, ends_s: float) -> tuple[Ask, ...]:
    traits = _Traits(chance)
    asks: list[Ask] = []
    for _ in range(chance.randint(1, 3)):
        at_s, tenant = chance.uniform(0, ends_s * 0.7), chance.randrange(tenants)
        spread_s = chance.choice([0.0, 0.002, 0.03])
        number = settings.trip_threshold * chance.choice([1, 2, 3]) + chance.randint(0, 3)
        asks += [
            traits.trigger(at_s + chance.uniform(0, spread_s), tenant, chance.randrange(apis)) for _ in range(number)
        ]
    asks += [
        traits.trigger(chance.uniform(0, ends_s), chance.randrange(tenants), chance.randrange(apis))
        for _ in range(chance.randint(0, 6))
    ]
    asks += [
        traits.change(chance.uniform(0.01, ends_s), chance.randrange(tenants), chance.randrange(apis))
        for _ in range(chance.choice([0, 6, 14]))
    ]
    return tuple(sorted(asks, key=lambda ask: ask.at_s))


def _burst(chance: Random, apis: int, ends_s: float) -> list[Ask]:
    """Return more plain triggers at once than a drainer takes into its hands."""
    at_s, api = chance.uniform(0, ends_s * 0.5), chance.randrange(apis)
    request = TriggerRequest(task_id="task", payload=b"burst")
    return [Ask(kind="trigger", at_s=at_s, tenant=0, api=api, requests=(request,)) for _ in range(25)]


class _Traits:
    """How likely each kind of request is in this seed."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self._keys = chance.choice([0.0, 0.3, 0.9])
        self._key_pool = chance.choice([1, 2, 4])
        self._request_keys = chance.choice([0.0, 0.5, 1.0])
        self._shared_requests = chance.choice([0.0, 0.3])
        self._short_lives = chance.choice([0.0, 0.0, 0.3])
        self._bypasses = chance.choice([0.0, 0.2])
        self._spoilt = chance.choice([0.0, 0.0, 0.3])
        self._delays = chance.choice([0.0, 0.3])
        self._ttls = chance.choice([0.0, 0.0, 0.3])
        self._batches = chance.choice([0.0, 0.0, 0.3])
        self._parents = chance.choice([0.0, 0.0, 0.5])
        self._kinds: list[Kind] = chance.sample(
            ["tag", "count", "cancel", "move", "reset", "read", "list", "replay"], k=chance.randint(2, 8)
        )
        self._numbers = 0

    def trigger(self, at_s: float, tenant: int, api: int) -> Ask:
        chance = self._chance
        number = 1
        if chance.random() < self._batches:
            number = chance.randint(2, 4)
        requests = tuple(self._request() for _ in range(number))
        is_keyed = all(one.request_key or one.idempotency_key for one in requests)
        return Ask(
            kind="trigger",
            at_s=at_s,
            tenant=tenant,
            api=api,
            requests=requests,
            has_parent=chance.random() < self._parents,
            pick=chance.random(),
            patience_s=chance.choice([0.2, 2.0, 10.0]),
            tries=chance.choice([1, 3]) if is_keyed else 1,
            again_after_s=chance.choice([0.0, 0.05, 0.3]),
        )

    def change(self, at_s: float, tenant: int, api: int) -> Ask:
        chance = self._chance
        kind = chance.choice(self._kinds)
        self._numbers += 1
        value: Any = None
        match kind:
            case "tag":
                value = f"t{chance.randrange(6)}"
            case "move":
                value = timedelta(seconds=chance.choice([1, 5, 60]))
            case "list":
                value = chance.choice([1, 3, 100])
            case "reset":
                value = f"k{chance.randrange(self._key_pool)}"
            case _:
                pass
        return Ask(
            kind=kind,
            at_s=at_s,
            tenant=tenant,
            api=api,
            pick=chance.random(),
            value=value,
            patience_s=chance.choice([0.2, 2.0, 10.0]),
        )

    def _request(self) -> TriggerRequest:
        chance = self._chance
        self._numbers += 1
        payload = b"%d" % self._numbers
        if chance.random() < self._spoilt:
            payload = chance.choice([POISON, STUBBORN, FLAKY])
        bypass = chance.random() < self._bypasses
        kind = chance.choice(["debounce", "wait", "token"]) if bypass else ""
        has_key = kind != "debounce" and chance.random() < self._keys
        has_request_key = kind != "debounce" and chance.random() < self._request_keys
        request = f"r{chance.randrange(3)}" if chance.random() < self._shared_requests else f"q{self._numbers}"
        return TriggerRequest(
            task_id="task",
            payload=payload,
            tags=("born",) if chance.random() < 0.2 else (),
            metadata=b'{"n":0}' if chance.random() < 0.2 else None,
            idempotency_key=f"k{chance.randrange(self._key_pool)}" if has_key else None,
            idempotency_lifetime=timedelta(seconds=1) if chance.random() < self._short_lives else None,
            request_key=request if has_request_key else None,
            delay=timedelta(seconds=chance.choice([1, 60])) if chance.random() < self._delays else None,
            ttl=timedelta(seconds=chance.choice([1, 60])) if chance.random() < self._ttls else None,
            debounce=Debounce(key="d", delay=timedelta(seconds=1)) if kind == "debounce" else None,
            resume_parent_on_completion=kind == "wait",
            one_time_token="token" if kind == "token" else None,
        )


# --- what goes wrong -----------------------------------------------------------------------------------------------


def _faults(chance: Random, lease_s: float, ends_s: float) -> tuple[Fault, ...]:
    pool: list[FaultKind] = [*FAULTS, *_PROCESSES]
    kinds = chance.sample(pool, k=chance.randint(0, 4))
    if not kinds:
        return ()
    return tuple(_fault(chance, chance.choice(kinds), lease_s, ends_s) for _ in range(chance.randint(1, 5)))


def _death_with_full_hands(chance: Random) -> Fault:
    """Return the death of a worker that has just taken more while what it had before is still being created."""
    return Fault(kind="process dies", at_step=chance.randint(2, 5), of="pop", lasts_s=chance.choice([0.01, 0.05]))


def _fault(chance: Random, kind: FaultKind, lease_s: float, ends_s: float) -> Fault:
    follows = kind in _PROCESSES and chance.random() < 0.8
    of: FaultOf = chance.choice(get_args(FaultOf))
    return Fault(
        kind=kind,
        at_s=chance.uniform(0, ends_s),
        at_step=chance.randint(1, 5 if of == "pop" else 25) if follows else None,
        of=of,
        # Longer than a lease, too: what its holder had in its hands may be another's by then.
        lasts_s=chance.choice([0.01, 0.2, lease_s * chance.uniform(1, 2), lease_s * 2.5]),
        target=chance.randrange(4),
    )
