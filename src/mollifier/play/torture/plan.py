"""What happens to the system, and when: the same for the same seed. Pure.

The plan is made of rounds, and each round kills one process of every kind: a worker, Valkey, Postgres, in any order, and an API process at
any moment beside them. One more fault of the round is drawn from the rest: processes frozen, links that hang, lag, trickle, lose or cut, or two
kills at once. After a worker's death nothing else befalls what its entries need until twice the lease has passed, so that their
recovery is measured and not somebody else's absence; API processes, which they do not need, may die meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from math import ceil
from random import Random

import msgspec

WORKERS = 2
APIS = 2
_SERVER_QUIET_S = 1.0
_SERVER_SLOT_S = 2.5
_RECOVERY_MARGIN_S = 0.3


class Kind(StrEnum):
    """A fault, by what it does and to whom."""

    KILL_API = "kill_api"
    KILL_WORKER = "kill_worker"
    KILL_VALKEY = "kill_valkey"
    KILL_POSTGRES = "kill_postgres"
    FREEZE_API = "freeze_api"
    FREEZE_WORKER = "freeze_worker"
    FREEZE_VALKEY = "freeze_valkey"
    FREEZE_POSTGRES = "freeze_postgres"
    HANG_VALKEY = "hang_valkey"
    HANG_POSTGRES = "hang_postgres"
    LOSE_VALKEY = "lose_valkey"
    LOSE_POSTGRES = "lose_postgres"
    SLOW_VALKEY = "slow_valkey"
    SLOW_POSTGRES = "slow_postgres"
    TRICKLE_VALKEY = "trickle_valkey"
    TRICKLE_POSTGRES = "trickle_postgres"
    CUT_VALKEY = "cut_valkey"
    CUT_POSTGRES = "cut_postgres"


KILLS = (Kind.KILL_API, Kind.KILL_WORKER, Kind.KILL_VALKEY, Kind.KILL_POSTGRES)
_SOMETIMES = tuple(kind for kind in Kind if kind not in KILLS)
_AT_ONCE = (
    (Kind.KILL_WORKER, Kind.KILL_VALKEY),
    (Kind.KILL_WORKER, Kind.KILL_POSTGRES),
    (Kind.KILL_API, Kind.KILL_VALKEY),
    (Kind.KILL_API, Kind.KILL_WORKER),
    (Kind.KILL_VALKEY, Kind.KILL_POSTGRES),
)
_AT_ONCE_SHARE = 0.3


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Faults that begin together, `at_s` seconds after the start.

    `seconds` is how long the victim stays away, or the fault lasts; `quiet_s` how long nothing else happens after that. `which` is the
    place of the process where there are several, `amount` between 0 and 1 says how much of the fault there is (bytes, delay).
    """

    at_s: float
    kinds: tuple[Kind, ...]
    seconds: float
    quiet_s: float
    which: int
    amount: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The faults in their order. `on_apis` happen beside `in_turn`, of which one has to be over before the next begins."""

    in_turn: tuple[Fault, ...]
    on_apis: tuple[Fault, ...]
    seconds: float


def make_plan(seed: int, seconds: float, lease_s: float) -> Plan:
    """Return the plan for about so many seconds, one round at least. With a lease of 2 s a round takes about 12 s."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    rounds = max(1, ceil(seconds / _round_s(lease_s)))
    in_turn: list[Fault] = []
    on_apis: list[Fault] = []
    at_s = 0.0
    for _ in range(rounds):
        begins_s = at_s
        for fault in _round(random, lease_s):
            in_turn.append(msgspec.structs.replace(fault, at_s=at_s + fault.at_s))
            at_s += fault.at_s + fault.seconds + fault.quiet_s
        on_apis.append(_fault(random, (Kind.KILL_API,), random.uniform(begins_s, at_s), (0.0, 1.0), 0.0))
    return Plan(in_turn=tuple(in_turn), on_apis=tuple(on_apis), seconds=at_s)


def _round_s(lease_s: float) -> float:
    """Return about how long a round takes."""
    return _recovery_s(lease_s) + 3 * _SERVER_SLOT_S


def _recovery_s(lease_s: float) -> float:
    return 2 * lease_s + _RECOVERY_MARGIN_S


def _round(random: Random, lease_s: float) -> Iterator[Fault]:
    """Yield the faults of one round, each with its distance from the one before."""
    kinds: list[tuple[Kind, ...]] = [(Kind.KILL_WORKER,), (Kind.KILL_VALKEY,), (Kind.KILL_POSTGRES,)]
    at_once = random.random() < _AT_ONCE_SHARE
    kinds.append(random.choice(_AT_ONCE) if at_once else (random.choice(_SOMETIMES),))
    random.shuffle(kinds)
    for some in kinds:
        match some:
            case (Kind.KILL_WORKER,):
                yield _fault(random, some, random.uniform(0.0, 0.4), (0.0, 0.0), _recovery_s(lease_s))
            case (Kind.FREEZE_WORKER,):
                yield _fault(random, some, random.uniform(0.0, 0.4), (1.2 * lease_s, 2.0 * lease_s), _SERVER_QUIET_S)
            case _:
                yield _fault(random, some, random.uniform(0.0, 0.4), (0.0, 1.2), _SERVER_QUIET_S)


def _fault(random: Random, kinds: tuple[Kind, ...], at_s: float, seconds: tuple[float, float], quiet_s: float) -> Fault:
    return Fault(
        at_s=round(at_s, 3),
        kinds=kinds,
        seconds=round(random.uniform(*seconds), 3),
        quiet_s=quiet_s,
        which=random.randrange(WORKERS),
        amount=round(random.random(), 3),
    )
