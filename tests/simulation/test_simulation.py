"""A short simulation, the bugs that it has to find, and that a seed is the same world every time. `make simulate` plays thousands."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import pytest

from tests.simulation.__main__ import is_expected, played, seeds_until_found
from tests.simulation.invariants import SENTENCES
from tests.simulation.planted import PLANTED
from tests.simulation.world import play

ALWAYS = range(50)
"""Seeds that every run plays, so that what they have once shown is never forgotten."""
SEEDS = int(os.environ.get("MOLLIFIER_SIM_SEEDS", "100"))
"""How many others each run plays: ones that nobody has seen yet, unless the first of them is given."""
FIRST_SEED = int(os.environ.get("MOLLIFIER_SIM_SEED", "") or ALWAYS.stop + secrets.randbelow(10**9))
PARTS = 5

_DIGESTS = """
import hashlib
from tests.simulation.world import play
print(*(hashlib.sha256(play(seed)[0].history.shown(10_000).encode()).hexdigest() for seed in range(5)))
"""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_sentence_of_the_specification_holds_after_every_step(part: int) -> None:
    print(f"{SEEDS} seeds from {FIRST_SEED}: make simulate MOLLIFIER_SIM_SEED={FIRST_SEED} MOLLIFIER_SIM_SEEDS={SEEDS}")  # noqa: T201 - to replay
    for seed in (*ALWAYS[part::PARTS], *range(FIRST_SEED + part, FIRST_SEED + SEEDS, PARTS)):
        report = played(seed).report
        assert not report, report


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_by_the_sentence_that_it_breaks(bug: str) -> None:
    found = seeds_until_found(bug, range(300))
    assert found is not None, "300 seeds have not found it"
    assert found.sentence in {sentence.__name__ for sentence in PLANTED[bug].breaks}, found.report
    assert is_expected(found, bug), f"seed {found.seed} fails without it, too"
    print(f"{bug}: found after {found.seed + 1} seeds")  # noqa: T201 - the figure


def test_a_failing_seed_says_which_sentence_and_how_to_see_it_again() -> None:
    found = seeds_until_found("acknowledge before creating", range(300))
    assert found is not None
    assert "AnAcknowledgedRunExists: " in found.report
    assert "`ack(run_id)`: the run exists now" in found.report
    assert f"make simulate MOLLIFIER_SIM_SEED={found.seed} MOLLIFIER_SIM_SEEDS=1" in found.report
    assert played(found.seed, bug="acknowledge before creating").report == found.report


def test_a_seed_is_the_same_world_in_every_process() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", _DIGESTS],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]


def test_seeds_differ() -> None:
    journals = {play(seed)[0].history.shown(10_000) for seed in range(5)}
    assert len(journals) == 5


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.__name__)
def test_each_sentence_says_what_it_is_about(sentence: type) -> None:
    assert (sentence.__doc__ or "").strip().endswith(".")
