"""Play many seeds on all cores: `make simulate`. The first that contradicts the specification ends it, and is told of."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

from tests.simulation.planted import PLANTED
from tests.simulation.world import play

_CHUNK = 25
_TELL_EVERY_S = 5.0


class Played(NamedTuple):
    """What is left of one seed. `sentence` is the one that was violated, if any; `report` says how, and what happened before."""

    seed: int
    steps: int
    calls: int
    sentence: str
    report: str


def played(seed: int, last: int = 60, bug: str | None = None) -> Played:
    """Play one seed, with a bug planted or without."""
    planted = PLANTED[bug] if bug is not None else None
    world, violation = play(seed) if planted is None else play(seed, model=planted.model, facade=planted.facade)
    report = ""
    if violation is not None:
        report = f"{world.history.shown(last)}\n\nseed {seed}: {violation}\n\nreplay it: {replay(seed, bug)}"
    sentence = "" if violation is None else violation.sentence
    return Played(seed, world.history.steps, len(world.history.calls), sentence, report)


def replay(seed: int, bug: str | None = None) -> str:
    """Return the command that plays one seed again."""
    planted = "" if bug is None else f" ARGS=\"--bug '{bug}'\""
    return f"make simulate MOLLIFIER_SIM_SEED={seed} MOLLIFIER_SIM_SEEDS=1{planted}"


def seeds_until_found(bug: str, seeds: Iterable[int]) -> Played | None:
    """Play seeds with the bug planted until one finds it; None when none does."""
    return next((one for one in (played(seed, bug=bug) for seed in seeds) if one.report), None)


def is_expected(found: Played, bug: str) -> bool:
    """Return whether what was found is the bug: a sentence that it breaks is violated, and without the bug none is."""
    return found.sentence in {kind.__name__ for kind in PLANTED[bug].breaks} and not played(found.seed).report


def main() -> int:
    arguments = _arguments()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if arguments.planted:
        return _find_planted(seeds)
    began_s = told_s = time.monotonic()
    number = steps = calls = 0
    with multiprocessing.Pool(arguments.jobs, _work_without_pauses) as pool:
        jobs = pool.imap(_Play(arguments.last, arguments.bug), seeds, chunksize=_CHUNK)
        for one in jobs:
            number, steps, calls = number + 1, steps + one.steps, calls + one.calls
            if one.report:
                pool.terminate()
                print(one.report)
                return 1
            if time.monotonic() - told_s > _TELL_EVERY_S:
                told_s = time.monotonic()
                print(f"{number:,} of {len(seeds):,} seeds, {_rate(number, began_s)}", file=sys.stderr, flush=True)
    print(
        f"{number:,} seeds from {arguments.first:,}: every sentence holds after each of {steps:,} steps and {calls:,} "
        f"requests; {_rate(number, began_s)}"
    )
    return 0


class _Play:
    """Plays a seed in a process of the pool."""

    def __init__(self, last: int, bug: str | None) -> None:
        self._last = last
        self._bug = bug
        self._number = 0

    def __call__(self, seed: int) -> Played:
        self._number += 1
        if self._number % _CHUNK == 0:
            gc.collect()
        return played(seed, self._last, self._bug)


def _work_without_pauses() -> None:
    """Have garbage collected between seeds: worlds are full of cycles, and all of them live as long as the world."""
    gc.freeze()
    gc.disable()


def _find_planted(seeds: range) -> int:
    missed = 0
    for bug in PLANTED:
        found = seeds_until_found(bug, seeds)
        if found is None:
            missed += 1
            print(f"{bug}: not found within {len(seeds):,} seeds")
        else:
            (sentence,) = [line for line in found.report.splitlines() if line.startswith("seed ")]
            is_bug = is_expected(found, bug)
            missed += not is_bug
            print(
                f"{bug}: {'found' if is_bug else 'something else found'} after {found.seed - seeds.start + 1:,} seeds; {sentence}"
            )
    return min(missed, 1)


def _rate(number: int, began_s: float) -> str:
    return f"{number / (time.monotonic() - began_s) * 60:,.0f} a minute"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    whole = int
    parser.add_argument(
        "--seeds", type=whole, default=os.environ.get("MOLLIFIER_SIM_SEEDS", "10000"), help="how many to play"
    )
    parser.add_argument("--first", type=whole, default=os.environ.get("MOLLIFIER_SIM_SEED", "0"), help="the first one")
    parser.add_argument("--jobs", type=whole, default=os.cpu_count(), help="how many at once; one per core")
    parser.add_argument("--last", type=whole, default=60, help="how many of the last events of a failing seed to show")
    parser.add_argument("--bug", choices=PLANTED, help="plant this bug")
    parser.add_argument("--planted", action="store_true", help="tell after how many seeds each planted bug is found")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
