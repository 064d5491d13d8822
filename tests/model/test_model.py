"""The real buffer against the model, in any history; and bugs planted in the scripts, which that finds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test  # pyright: ignore[reportUnknownVariableType] - untyped
from redis import Redis

from mollifier.scripts import load
from tests.core.support import SCRIPT_NAMES
from tests.model.machine import BufferMachine
from tests.model.planted import PLANTED, places, planting
from tests.model.server import missing_scripts
from tests.model.twins import Twins

pytestmark = pytest.mark.leaves_keys

STEPS = int(os.environ.get("MOLLIFIER_MODEL_STEPS", "1500"))
FIRST_SEED = int(os.environ.get("MOLLIFIER_MODEL_SEED", "0"))
EXAMPLES_PER_ROUND = 30
QUIET = settings(
    max_examples=EXAMPLES_PER_ROUND,
    stateful_step_count=100,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:  # pyright: ignore[reportUnknownMemberType] - untyped options
        yield client


def play(twins: Twins, number: int, how: settings) -> None:
    """Play one round of histories, the same ones for the same number."""

    class Machine(BufferMachine):
        pass

    Machine.twins = twins
    seed(number)(Machine)
    run_state_machine_as_test(Machine, settings=how)


def test_the_model_has_every_script_with_the_parameters_of_its_header() -> None:
    assert missing_scripts() == set()


def test_the_buffer_is_after_every_step_as_its_model_says(client: Redis) -> None:
    twins = Twins(client)
    started_s = shown_s = time.monotonic()
    number = FIRST_SEED
    while twins.steps < STEPS:
        try:
            play(twins, number, QUIET)
        except BaseException as error:
            error.add_note(f"replay this round: MOLLIFIER_MODEL_SEED={number} MOLLIFIER_MODEL_STEPS=1 make model")
            raise
        number += 1
        if time.monotonic() - shown_s > 10:
            shown_s = time.monotonic()
            per_s = twins.steps / (shown_s - started_s)
            print(f"{twins.steps:,} of {STEPS:,} steps, {per_s:,.0f}/s", file=sys.stderr, flush=True)  # noqa: T201 - progress
    print(f"{twins.steps:,} steps from seed {FIRST_SEED}: the server and the model agree")  # noqa: T201 - the figure


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_has_its_place_in_the_scripts(bug: str) -> None:
    sources = {name: load(name).source for name in SCRIPT_NAMES}
    assert all(places(bug, sources).values()), "the scripts have changed: plant the bug where it now belongs"


@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_planted_in_the_scripts_is_found(client: Redis, bug: str) -> None:
    twins = Twins(client, planting(bug))
    for number in range(60):
        try:
            play(twins, number, settings(QUIET, phases=[Phase.generate], report_multiple_bugs=False))
        except AssertionError:
            # The scripts are all that the two sides differ in: a difference is the bug, whatever step shows it.
            assert twins.first_difference is not None
            print(f"{bug}: found after {twins.first_difference:,} steps")  # noqa: T201 - the figure
            return
    pytest.fail(f"{twins.steps:,} steps have not found it")
