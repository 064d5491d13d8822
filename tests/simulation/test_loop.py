"""The virtual loop: time jumps, frozen owners wait, dead ones never go on."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from random import Random

import pytest

from tests.simulation.loop import Call, StandstillError, VirtualLoop, owner


class Somebody:
    def __init__(self) -> None:
        self.frozen = False
        self.kept: list[Call] = []


def test_a_sleep_takes_no_time_and_the_clock_tells_how_long_it_was() -> None:
    loop = VirtualLoop()

    async def sleep() -> float:
        await asyncio.sleep(3600)
        return loop.time()

    assert loop.run(sleep()) == 3600


def test_timeouts_and_events_are_asyncios_own() -> None:
    async def wait() -> float:
        event = asyncio.Event()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await event.wait()
        asyncio.get_running_loop().call_later(2, event.set)
        await event.wait()
        return asyncio.get_running_loop().time()

    assert VirtualLoop().run(wait()) == 7


def test_waiting_for_what_never_comes_is_an_error() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    loop = VirtualLoop()
    with pytest.raises(StandstillError):
        loop.run(wait())
    loop.unwind()


def test_a_frozen_owner_goes_on_where_it_was_and_the_clock_has_gone_on_without_it() -> None:
    loop, one, seen = VirtualLoop(), Somebody(), list[float]()

    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            seen.append(loop.time())

    async def watch() -> None:
        context = copy_context()
        context.run(owner.set, one)
        loop.create_task(tick(), context=context)
        await asyncio.sleep(2.5)
        one.frozen = True
        await asyncio.sleep(3)
        loop.thaw(one)
        await asyncio.sleep(1.2)

    loop.run(watch())
    loop.unwind()
    assert seen == [1, 2, 5.5, 6.5]


def test_a_dead_owner_does_nothing_any_more_not_even_on_its_way_out() -> None:
    loop, one, ended = VirtualLoop(), Somebody(), list[str]()

    async def work() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            ended.append("finally")

    async def watch() -> None:
        context = copy_context()
        context.run(owner.set, one)
        task = loop.create_task(work(), context=context)
        await asyncio.sleep(0)
        one.frozen = True
        task.cancel()
        await asyncio.sleep(5)

    loop.run(watch())
    assert ended == []
    loop.thaw(one)
    loop.unwind()
    assert ended == ["finally"]


@pytest.mark.parametrize("seed", range(3))
def test_chance_decides_who_goes_first_the_same_way_for_the_same_seed(seed: int) -> None:
    def order() -> list[int]:
        loop, seen = VirtualLoop(Random(seed).randrange), list[int]()

        async def go() -> None:
            for number in range(10):
                loop.call_soon(seen.append, number)
            await asyncio.sleep(1)

        loop.run(go())
        return seen

    assert order() == order()
    assert sorted(order()) == list(range(10))
    assert order() != list(range(10))
