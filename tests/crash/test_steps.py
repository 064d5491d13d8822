"""Every single step, not only the named ones: each process dies at its first point, at its second, and so on to its last.

This takes minutes: `make crash`. A run's order, and where second drainers die, follow from MOLLIFIER_CRASH_SEED.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence

import pytest

from tests.crash import calls, drains
from tests.crash.ground import DATABASES, Ground
from tests.crash.plays import calling, draining, points_of_calls, points_of_drain
from tests.crash.points import Fault

pytestmark = pytest.mark.crash

SECOND_MAX = 40


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("MOLLIFIER_CRASH_SEED") or random.SystemRandom().randrange(1_000_000))
    print(f"MOLLIFIER_CRASH_SEED={seed}")  # noqa: T201 - what a failing test has printed is shown
    return random.Random(seed)


def at_every(points: Sequence[str], dice: random.Random) -> Iterator[list[Fault]]:
    """Yield the death at each of so many points, some at a time."""
    faults = [Fault(None, nth) for nth in range(1, len(points) + 1)]
    dice.shuffle(faults)
    for first in range(0, len(faults), DATABASES):
        yield faults[first : first + DATABASES]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scene", calls.SCENES, ids=lambda scene: scene.name)
async def test_an_api_may_die_at_any_step(ground: Ground, scene: calls.Scene, dice: random.Random) -> None:
    points = await points_of_calls(ground, scene)
    # A process that reads something ahead of time, as sums of what is held, takes a step less now and then.
    deaths = sum([await calling(ground, scene, faults, surely=False) for faults in at_every(points, dice)])
    print(f"{scene.name}: {deaths} deaths at {len(points)} steps")  # noqa: T201 - as above
    assert deaths > len(points) * 3 / 4


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scene", drains.SCENES, ids=lambda scene: scene.name)
async def test_a_drainer_may_die_at_any_step_and_so_may_the_next(
    ground: Ground, scene: drains.Scene, dice: random.Random
) -> None:
    points = await points_of_drain(ground, scene)
    for faults in at_every(points, dice):
        await ground.empty()
        await draining(ground, scene, faults, then=[Fault(None, dice.randint(1, SECOND_MAX)) for _ in faults])
    print(f"{scene.name}: {2 * len(points)} deaths at {len(points)} steps")  # noqa: T201 - as above
