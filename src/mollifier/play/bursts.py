"""Arrivals that are made up: quiet Poisson traffic with a burst in it, the same for the same seed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple


class Traffic(NamedTuple):
    """Arrivals at `rate_per_s` for `seconds`, beginning at `begins_s`."""

    rate_per_s: float
    seconds: float
    begins_s: float = 0.0


def poisson(traffic: Traffic, random: Random) -> Iterator[float]:
    """Yield the times of a Poisson process in seconds, ascending: independent arrivals, as from many callers."""
    at_s = traffic.begins_s
    while (at_s := at_s + random.expovariate(traffic.rate_per_s)) < traffic.begins_s + traffic.seconds:
        yield at_s


def together(*traffics: Traffic, seed: int) -> list[float]:
    """Return the times of all these at once, ascending."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    return sorted(at_s for traffic in traffics for at_s in poisson(traffic, random))


def write_trace(path: Path, times_s: list[float], *, seed: int = 0, limit: int | None = None) -> int:
    """Write a trace of these times, with a size for each arrival; return how many rows it has."""
    random = Random(seed)  # noqa: S311 - as above
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
        written = 0
        for at_s in islice(times_s, limit):
            rows.writerow((f"{at_s:.7f}", random.randint(50, 8000), random.randint(1, 400)))
            written += 1
    return written
