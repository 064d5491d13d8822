"""A process is killed after everything that it asks a store for, and another one takes over: nothing is lost, nothing happens twice."""

from __future__ import annotations

import pytest

from tests.crash import calls, drains
from tests.crash.ground import Ground
from tests.crash.plays import calling, draining


@pytest.mark.parametrize("scene", calls.SCENES, ids=lambda scene: scene.name)
async def test_an_api_may_die_anywhere_in_a_call(ground: Ground, scene: calls.Scene) -> None:
    await calling(ground, scene, scene.faults)


@pytest.mark.parametrize("scene", drains.SCENES, ids=lambda scene: scene.name)
async def test_a_drainer_may_die_anywhere(ground: Ground, scene: drains.Scene) -> None:
    await draining(ground, scene, scene.faults)
