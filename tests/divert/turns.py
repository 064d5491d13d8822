"""Actors that take turns: each call to a store is one step, and whoever holds the schedule says whose step is next.

The stores are real. Between two steps of an actor any number of the others' may happen, so a schedule is one order of events out of
all that concurrency allows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from typing import Any

_actor: ContextVar[str] = ContextVar("actor")


class Turns:
    """Lets one actor at a time do one step; `choose` picks among the names of those that wait."""

    def __init__(self, choose: Callable[[list[str]], str]) -> None:
        self._choose = choose
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._moved = asyncio.Event()
        self._is_broken_off = False
        self.step = 0

    async def turn(self) -> None:
        """Wait for the calling actor's turn; outside of actors, and after a play that was broken off, there is nothing to wait for."""
        name = _actor.get("")
        if name and not self._is_broken_off:
            self._waiting[name] = asyncio.get_running_loop().create_future()
            self._moved.set()
            await self._waiting[name]

    async def play(self, actors: Mapping[str, Coroutine[Any, Any, None]]) -> None:
        """Run the actors to their ends. Raises what one of them raises."""
        tasks = {name: asyncio.create_task(self._act(name, actor)) for name, actor in actors.items()}
        try:
            while any(not task.done() for task in tasks.values()):
                await self._settled(tasks)
                for task in tasks.values():
                    if task.done():
                        task.result()
                if self._waiting:
                    name = self._choose(sorted(self._waiting))
                    self.step += 1
                    self._waiting.pop(name).set_result(None)
        except BaseException:
            # What an actor gives back when it is cancelled, it gives back at once.
            self._is_broken_off = True
            raise
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _act(self, name: str, actor: Coroutine[Any, Any, None]) -> None:
        _actor.set(name)
        try:
            await actor
        finally:
            self._moved.set()

    async def _settled(self, tasks: Mapping[str, asyncio.Task[None]]) -> None:
        """Return once every actor waits for its turn or has come to its end."""
        while any(not task.done() and name not in self._waiting for name, task in tasks.items()):
            self._moved.clear()
            await self._moved.wait()
            await asyncio.sleep(0)


def stepping(part: Any, turns: Turns, *names: str) -> None:
    """Have each call of these methods wait for its turn."""
    for name in names:
        setattr(part, name, _stepped(getattr(part, name), turns))


def _stepped(method: Callable[..., Any], turns: Turns) -> Callable[..., Any]:
    async def stepped(*args: Any, **options: Any) -> Any:
        await turns.turn()
        return await method(*args, **options)

    return stepped
