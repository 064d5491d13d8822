"""How a scene is played: processes come to grief in it, something happens meanwhile, and at the end every promise is looked at."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import httpx

from mollifier.settings import Settings
from tests.core.support import until
from tests.crash import calls, drains, roles
from tests.crash.books import Book, all_kept
from tests.crash.caller import Caller
from tests.crash.ground import Ground, for_each, house_of, new_name, new_tenant
from tests.crash.points import Fault
from tests.crash.processes import TIMEOUT_S, Child, child

Meanwhile = Callable[[], Awaitable[None]]


class Halt:
    """Where `number` processes stop: once all of them have, something happens, and they go on."""

    def __init__(self, number: int, meanwhile: Meanwhile) -> None:
        self._missing = number
        self._meanwhile = meanwhile
        self._over = asyncio.Event()

    async def pass_through(self, process: Child) -> None:
        """Have a process that stopped go on, in its time."""
        self._missing -= 1
        if self._missing == 0:
            await self._meanwhile()
            self._over.set()
        async with asyncio.timeout(TIMEOUT_S):
            await self._over.wait()
        process.signal(signal.SIGCONT)


async def calling(
    ground: Ground,
    scene: calls.Scene,
    faults: Sequence[Fault],
    *,
    meanwhile: Meanwhile | None = None,
    surely: bool = True,
) -> int:
    """Play the scene once for each fault, against an API process that it befalls; then every promise has to be kept.

    The processes die; or, where something happens `meanwhile`, they stop and go on. Each has to come to its fault, unless that is not sure;
    return how many did.
    """
    halt = Halt(len(faults), meanwhile) if meanwhile is not None else None
    async with AsyncExitStack() as stack:
        _, healthy_url = await stack.enter_async_context(ground.api())
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=TIMEOUT_S))
        house = await stack.enter_async_context(house_of(ground.settings(), ground.database))

        async def one(fault: Fault) -> tuple[Book, bool]:
            name = new_name()
            tenant = await new_tenant(ground.database, name)
            async with ground.api(**scene.settings) as (process, url):
                urls = [url, healthy_url]
                caller = Caller(ground, client=client, urls=urls, tenant=tenant, house=house, name=f"{name} {fault}")
                story = scene.story(caller)
                await anext(story)
                await process.arm(fault)
                playing = asyncio.create_task(_play_on(story))
                await asyncio.wait({playing, process.reached}, return_when=asyncio.FIRST_COMPLETED)
                if not process.reached.done():
                    await playing
                    if not surely:
                        return caller.book, False
                    raise process.failure(f"never came to {fault}, but to {await process.ask('passed')}")
                if halt is not None:
                    await halt.pass_through(process)
                await playing
                await _ended(process, killed=halt is None)
            return caller.book, True

        played = await for_each(faults, one, at_once=len(faults) if halt is not None else None)
        await ground.inherit([ground.settings()])
        assert await all_kept(ground, (book for book, _ in played))
        assert house[0].buffer is not None
        counts = await house[0].buffer.counts()
        assert counts.left == 0, f"left in the buffer: {counts}"
        return sum(came for _, came in played)


async def draining(
    ground: Ground,
    scene: drains.Scene,
    faults: Sequence[Fault],
    *,
    meanwhile: Callable[[Sequence[Settings]], Awaitable[None]] | None = None,
    then: Sequence[Fault] = (),
) -> list[dict[str, int]]:
    """Have a drainer of a buffer of its own come to each fault; then every promise has to be kept.

    The drainers die; or, where something happens `meanwhile` to their buffers, they stop and go on. Return how many entries each of those
    settled which way. Of each buffer another drainer may come to a second fault, one of `then`, before the last takes over.
    """
    settings = [ground.settings(number, **scene.settings) for number in range(len(faults))]
    halt = Halt(len(faults), lambda: meanwhile(settings)) if meanwhile is not None else None
    async with AsyncExitStack() as stack:
        houses = [await stack.enter_async_context(house_of(each, ground.database)) for each in settings]
        outcomes: list[dict[str, int]] = []

        async def one(number: int) -> drains.Holding:
            holding = drains.Holding(ground, settings[number], houses[number], new_name())
            await scene.story(holding)
            for fault in (faults[number], *then[number : number + 1]):
                async with child(roles.worker, ground.log, settings[number], fault) as process:
                    await process.ready()
                    await process.comes_to_its_point()
                    if halt is not None:
                        await halt.pass_through(process)
                        outcomes.append(await process.ask("stop"))
                    await _ended(process, killed=halt is None)
            return holding

        holdings = await for_each(range(len(settings)), one, at_once=len(faults) if halt is not None else None)
        await ground.inherit(settings)
        assert await all_kept(ground, (holding.book for holding in holdings))
        left = [(await holding.buffer.counts()).left for holding in holdings]
        assert left == [scene.dead] * len(holdings), f"{left} entries are left"
    return outcomes


async def _play_on(story: AsyncGenerator[None]) -> None:
    async for _ in story:
        raise AssertionError("a story has one yield")


async def _ended(process: Child, *, killed: bool) -> None:
    code = await process.end(in_order=not killed)
    if code != (-signal.SIGKILL if killed else 0):
        raise process.failure(f"ended with exit code {code}")


async def points_of_calls(ground: Ground, scene: calls.Scene) -> Sequence[str]:
    """Return what an API process comes to in the scene when nothing befalls it."""
    async with AsyncExitStack() as stack:
        process, url = await stack.enter_async_context(ground.api(**scene.settings))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=TIMEOUT_S))
        house = await stack.enter_async_context(house_of(ground.settings(), ground.database))
        tenant = await new_tenant(ground.database, scene.name)
        caller = Caller(ground, client=client, urls=[url], tenant=tenant, house=house, name=scene.name)
        story = scene.story(caller)
        await anext(story)
        await process.arm(None)
        await _play_on(story)
        return await process.ask("passed")


async def points_of_drain(ground: Ground, scene: drains.Scene) -> Sequence[str]:
    """Return what a drainer comes to in the scene when nothing befalls it, up to the last thing that it does for an entry."""
    settings = ground.settings(**scene.settings)
    async with house_of(settings, ground.database) as house:
        holding = drains.Holding(ground, settings, house, new_name())
        await scene.story(holding)
        async with child(roles.worker, ground.log, settings, None) as process:
            await process.ready()
            await until(holding.is_drained, TIMEOUT_S)
            await process.ask("stop")
            passed: list[str] = await process.ask("passed")
            await _ended(process, killed=False)
    works = ("engine.", "valkey.ack.", "valkey.fail.")
    return passed[: max(number for number, point in enumerate(passed, 1) if point.startswith(works))]
