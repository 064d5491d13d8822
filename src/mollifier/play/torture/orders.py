"""What the callers of a torture want: an endless stream of orders in bursts, the same for the same seed. Pure."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from enum import StrEnum
from itertools import count
from random import Random
from typing import TypeVar

import msgspec

T = TypeVar("T")
BURST_EVERY_S = 1.2
BURST_LASTS_S = 0.08
_QUIET_SHARE = 0.3
_SHARERS_MAX = 3
_BATCH_MIN, _BATCH_MAX = 3, 8
_FILL_MAX_CHARS = 600


class Want(StrEnum):
    """How a trigger is sent.

    PLAIN once, whatever becomes of it; NAMED under a request key, again and again until it is answered; SHARED by several callers
    under one idempotency key; DELAYED; BATCH, several in one named request.
    """

    PLAIN = "plain"
    NAMED = "named"
    SHARED = "shared"
    DELAYED = "delayed"
    BATCH = "batch"


class Then(StrEnum):
    """What the caller does with the run once it has its id."""

    NOTHING = "nothing"
    READ = "read"
    TAG = "tag"
    CANCEL = "cancel"


_WANTS = ((Want.PLAIN, 60), (Want.NAMED, 20), (Want.SHARED, 8), (Want.DELAYED, 5), (Want.BATCH, 7))
_THENS = ((Then.NOTHING, 70), (Then.READ, 8), (Then.TAG, 11), (Then.CANCEL, 11))


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One request: `calls` triggers, numbered from `number` on, `at_s` seconds after the start, for the tenant of that place.

    A trigger's `trial` names the run that is to come of it: its own number, or that of the first caller with the same idempotency key.
    """

    number: int
    at_s: float
    tenant: int
    want: Want
    then: Then = Then.NOTHING
    calls: int = 1
    trial: int


def payload_of(seed: int, trial: int) -> bytes:
    """Return the payload of a trial: JSON text of some length, no two alike."""
    digest = hashlib.sha256(f"{seed}:{trial}".encode()).hexdigest()
    length = int(digest[:8], 16) % _FILL_MAX_CHARS
    return b'{"trial":%d,"fill":"%b"}' % (trial, (digest * (length // 64 + 1))[:length].encode())


def make_orders(seed: int, *, rate_per_s: float, tenants: int) -> Iterator[Order]:
    """Yield orders by their time, for ever: quiet traffic of all tenants, and every second or so a burst of one of them."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    quiet = _arrivals(Random(random.random()), rate_per_s * _QUIET_SHARE, tenants)  # noqa: S311 - as above
    bursts = _bursts(Random(random.random()), rate_per_s * (1 - _QUIET_SHARE) * BURST_EVERY_S, tenants)  # noqa: S311 - as above
    number = 0
    for at_s, tenant in heapq.merge(quiet, bursts):
        want = _draw(random, _WANTS)
        size = random.randint(_BATCH_MIN, _BATCH_MAX)
        sharers = random.randint(2, _SHARERS_MAX)
        then = _draw(random, _THENS)
        match want:
            case Want.BATCH:
                yield Order(number=number, at_s=at_s, tenant=tenant, want=want, calls=size, trial=number)
                number += size
            case Want.SHARED:
                for place in range(sharers):
                    yield Order(number=number + place, at_s=at_s, tenant=tenant, want=want, trial=number)
                number += sharers
            case _:
                yield Order(number=number, at_s=at_s, tenant=tenant, want=want, then=then, trial=number)
                number += 1


def _arrivals(random: Random, rate_per_s: float, tenants: int) -> Iterator[tuple[float, int]]:
    at_s = 0.0
    while True:
        at_s += random.expovariate(rate_per_s)
        yield at_s, random.randrange(tenants)


def _bursts(random: Random, size: float, tenants: int) -> Iterator[tuple[float, int]]:
    for burst in count(1):
        tenant = random.randrange(tenants)
        begins_s = burst * BURST_EVERY_S
        times = sorted(begins_s + random.uniform(0.0, BURST_LASTS_S) for _ in range(round(size)))
        yield from ((at_s, tenant) for at_s in times)


def _draw(random: Random, weighted: tuple[tuple[T, int], ...]) -> T:
    return random.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]
