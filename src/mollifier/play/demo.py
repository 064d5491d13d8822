"""The demo's story: one organization fires a burst while four others go about their business."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mollifier.play.bursts import Traffic, together
from mollifier.play.client import Call, Marker
from mollifier.play.stage import Organization

SEED = 7
# Lower than the default: a busy laptop answers too slowly for its gate to see a hundred triggers in 200 ms.
TRIP_THRESHOLD = 30
# Where runs are held they are created one at a time, or a burst this small is over before anybody could see it being held.
DRAIN_CONCURRENCY = 1
SECONDS = 6.0
BURST = Traffic(rate_per_s=1800, seconds=0.25, begins_s=2.0)
BUSY = Traffic(rate_per_s=12, seconds=SECONDS)
QUIET = Traffic(rate_per_s=8, seconds=SECONDS)


class Part(NamedTuple):
    """One organization of the story, with its traffic."""

    name: str
    traffics: Sequence[Traffic]


STORY = (
    Part("noisy-imports", (BUSY, BURST)),
    Part("quiet-bakery", (QUIET,)),
    Part("quiet-clinic", (QUIET,)),
    Part("quiet-library", (QUIET,)),
    Part("quiet-museum", (QUIET,)),
)


def organizations(story: Sequence[Part] = STORY) -> list[Organization]:
    """Return the organizations to be made, one environment each, in the order of the story."""
    return [Organization(part.name) for part in story]


def arrivals(story: Sequence[Part] = STORY, *, seed: int = SEED) -> list[tuple[float, int]]:
    """Return when each trigger leaves, in seconds, and whose it is; ascending, and the same for the same seed."""
    times = [(at_s, place) for place, part in enumerate(story) for at_s in together(*part.traffics, seed=seed + place)]
    return sorted(times)


def calls(times: Sequence[tuple[float, int]], marker: Marker) -> Iterator[Call]:
    """Yield the calls; each one's payload is its number."""
    for number, (at_s, place) in enumerate(times):
        yield Call(number, at_s, place, marker.body(number, b'{"order":%d}' % number))


def densest(times_s: Sequence[float], window_s: float) -> int:
    """Return the most of these ascending times within any window of this length."""
    first = most = 0
    for last, at_s in enumerate(times_s):
        while times_s[first] <= at_s - window_s:
            first += 1
        most = max(most, last - first + 1)
    return most
