"""Carries the plan out: kills, freezes, and has the links misbehave."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from mollifier.embedded import ServerName, Stack
from mollifier.play.outage import processes_of, signal_all
from mollifier.play.proxy import HANG, LOSE, Fate, Proxy
from mollifier.play.torture.fleet import Fleet, Place
from mollifier.play.torture.plan import Fault, Kind, Plan
from mollifier.play.torture.recovery import Held, Recoveries

_HUNT_S = 2.5
_HUNT_PAUSE_S = 0.02
_OTHERS_SETTLE_S = 0.15
_DELAY_MAX_S = 0.12
_CUT_MAX_BYTES = 4000
_TRICKLE = Fate(piece_bytes=48, delay_s=0.001)


class Links(NamedTuple):
    """The proxies between Mollifier and its servers."""

    valkey: Proxy
    postgres: Proxy


class Chaos:
    """Carries a plan out on one system. `counts` has how often each fault happened; `tell` is told of each."""

    def __init__(
        self,
        stack: Stack,
        fleet: Fleet,
        links: Links,
        recoveries: Recoveries,
        *,
        tell: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._stack = stack
        self._fleet = fleet
        self._links = links
        self._recoveries = recoveries
        self._tell = tell
        self._clock = clock
        self._sleep = sleep
        self.counts: Counter[Kind] = Counter()

    async def carry_out(self, plan: Plan) -> None:
        """Do all of it, each fault at its time, or as much later as the ones before it have taken longer than planned."""
        async with asyncio.TaskGroup() as lanes:
            lanes.create_task(self._lane(plan.in_turn))
            lanes.create_task(self._lane(plan.on_apis))
        await self._fleet.complete()

    async def _lane(self, faults: Sequence[Fault]) -> None:
        started_s = self._clock()
        late_s, not_before_s = 0.0, started_s
        for fault in faults:
            begins_s = max(started_s + fault.at_s + late_s, not_before_s)
            late_s = begins_s - started_s - fault.at_s
            await self._sleep(begins_s - self._clock())
            await asyncio.gather(*(self._do(kind, fault) for kind in fault.kinds))
            not_before_s = self._clock() + fault.quiet_s

    async def _do(self, kind: Kind, fault: Fault) -> None:
        self._tell(kind.replace("_", " "))
        match kind:
            case Kind.KILL_API:
                await self._fleet.kill(self._fleet.apis[fault.which], fault.seconds)
            case Kind.KILL_WORKER:
                await self._kill_worker(self._fleet.workers[fault.which])
            case Kind.KILL_VALKEY | Kind.KILL_POSTGRES:
                await self._kill_server("valkey" if kind is Kind.KILL_VALKEY else "postgres", fault.seconds)
            case Kind.FREEZE_API:
                await self._fleet.freeze(self._fleet.apis[fault.which], fault.seconds)
            case _:
                with self._disturbing():
                    await self._impair(kind, fault)
        self.counts[kind] += 1

    async def _impair(self, kind: Kind, fault: Fault) -> None:
        slow = Fate(delay_s=_DELAY_MAX_S * fault.amount)
        cut = Fate(after_bytes=int(_CUT_MAX_BYTES * fault.amount), end="cut")
        match kind:
            case Kind.FREEZE_WORKER:
                await self._fleet.freeze(self._fleet.workers[fault.which], fault.seconds)
            case Kind.FREEZE_VALKEY:
                await self._freeze([pid for pid in (self._stack.valkey_pid,) if pid is not None], fault.seconds)
            case Kind.FREEZE_POSTGRES:
                await self._freeze(processes_of(self._stack), fault.seconds)
            case Kind.HANG_VALKEY | Kind.HANG_POSTGRES:
                await self._misbehave(kind, HANG, HANG, fault.seconds)
            case Kind.LOSE_VALKEY | Kind.LOSE_POSTGRES:
                # Whatever is asked is done, and no answer arrives.
                await self._misbehave(kind, Fate(), LOSE, fault.seconds)
            case Kind.SLOW_VALKEY | Kind.SLOW_POSTGRES:
                await self._misbehave(kind, slow, slow, fault.seconds)
            case Kind.TRICKLE_VALKEY | Kind.TRICKLE_POSTGRES:
                await self._misbehave(kind, _TRICKLE, _TRICKLE, fault.seconds)
            case Kind.CUT_VALKEY | Kind.CUT_POSTGRES:
                # Half an answer, or half a question, and then no more.
                await self._misbehave(kind, cut, cut, fault.seconds)
            case _:
                raise ValueError(f"{kind} is no impairment")

    async def _kill_worker(self, place: Place) -> None:
        """Kill it while entries are under its lease, if it comes to hold any soon. Stopped first, it settles none while they are read."""
        give_up_s = self._clock() + _HUNT_S
        while True:
            async with place.lock:
                if place.child is None:
                    return
                stopped_s = self._clock()
                place.child.signal(signal.SIGSTOP)
                held = await self._held_by_frozen()
                if not held and self._clock() < give_up_s:
                    place.child.signal(signal.SIGCONT)
            if held or self._clock() >= give_up_s:
                break
            await self._sleep(_HUNT_PAUSE_S)
        await self._fleet.kill(place, 0.3)
        self._recoveries.watch(held, stopped_s)

    async def _held_by_frozen(self) -> list[Held]:
        """Return what is under a lease and stays so: what other workers hold they settle meanwhile."""
        held = await self._recoveries.held()
        if held:
            await self._sleep(_OTHERS_SETTLE_S)
            still = await self._recoveries.held()
            held = [one for one in held if one in still]
        return held

    async def _kill_server(self, name: ServerName, away_s: float) -> None:
        with self._disturbing():
            await self._stack.stop(name, kill=True)
            self._fleet.kills[name] += 1
            await self._sleep(away_s)
            await self._stack.start(name)

    async def _freeze(self, pids: Sequence[int], seconds: float) -> None:
        try:
            signal_all(pids, signal.SIGSTOP)
            await self._sleep(seconds)
        finally:
            signal_all(pids, signal.SIGCONT)

    async def _misbehave(self, kind: Kind, requests: Fate, replies: Fate, seconds: float) -> None:
        link = self._links.valkey if kind.endswith("valkey") else self._links.postgres
        link.misbehave(requests=requests, replies=replies)
        try:
            await self._sleep(seconds)
        finally:
            link.behave()

    @contextmanager
    def _disturbing(self) -> Generator[None]:
        self._recoveries.disturb()
        try:
            yield
        finally:
            self._recoveries.calm()
