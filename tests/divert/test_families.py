"""Parents and children: a run's family is the same, whichever store has which of them."""

from __future__ import annotations

import pytest

from mollifier.buffer import reading, storing
from mollifier.model import Environment
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


async def children(house: House, run_id: str, environment: Environment = ENVIRONMENT, limit: int = 100) -> list[str]:
    run = await house.runs.get(environment, run_id)
    assert run is not None
    return [child.id for child in await house.runs.children(environment, run, limit)]


async def test_a_runs_children_are_the_same_while_they_are_held_while_they_are_drained_and_after(house: House) -> None:
    parent = await house.trigger()
    created = await house.trigger(parent_run_id=parent)
    await house.trip()
    held = [await house.trigger(parent_run_id=parent) for _ in range(3)]
    await house.trigger(parent_run_id=created)
    family = [created, *held]

    assert await children(house, parent) == family
    entry = await house.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
    assert entry is not None
    assert await children(house, parent) == family
    assert await house.mollifier.drain_handler()([entry]) == [None]
    assert await children(house, parent) == family
    await house.buffer.ack(entry)
    assert await children(house, parent) == family
    await house.drain()
    assert await children(house, parent) == family


async def test_a_held_runs_children_are_known_while_both_are_held(holding: House) -> None:
    parent = await holding.trigger()
    child = await holding.trigger(parent_run_id=parent)
    grandchild = await holding.trigger(parent_run_id=child)

    assert await children(holding, parent) == [child]
    assert await children(holding, child) == [grandchild]
    assert await children(holding, grandchild) == []


async def test_of_many_children_the_oldest_are_given(holding: House) -> None:
    parent = await holding.trigger()
    family = [await holding.trigger(parent_run_id=parent) for _ in range(5)]

    assert await children(holding, parent, limit=2) == family[:2]


async def test_children_are_looked_for_beyond_everything_else_that_is_held(holding: House) -> None:
    parent = await holding.trigger()
    await holding.mollifier.triggers.trigger_many(ENVIRONMENT, [holding.request() for _ in range(1200)])
    await holding.trip()
    child = await holding.trigger(parent_run_id=parent)

    assert await children(holding, parent) == [child]


async def test_a_held_runs_child_that_passed_the_gate_is_known_while_its_parent_is_held(house: House) -> None:
    await house.trip()
    parent = await house.trigger()
    await house.calm()
    child = await house.trigger(parent_run_id=parent)

    assert await house.created(child) is not None
    assert await children(house, parent) == [child]


async def test_children_of_two_parents_that_share_a_number_are_told_apart(
    holding: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_number(_run_id: str) -> int:
        return 1

    for part in (storing, reading):
        monkeypatch.setattr(part, "parent_number", one_number)
    first, second = await holding.trigger(), await holding.trigger()
    of_first, of_second = [await holding.trigger(parent_run_id=parent) for parent in (first, second)]

    assert await children(holding, first) == [of_first]
    assert await children(holding, second) == [of_second]
