"""What the trigger path costs with Mollifier switched off, beside the same path without a gate in it."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable

from benchmarks.database import house
from benchmarks.report import Figure, Report, median
from benchmarks.stage import REQUEST, Counters, environment
from mollifier.admission import Triggered, answer
from mollifier.server import connect
from mollifier.trigger import Checked, TriggerService

ROUNDS = 60
TRIGGERS_PER_ROUND = 50


class WithoutGate(TriggerService):
    """The trigger path as it is for triggers without keys, less whatever asks whether there is a gate to pass."""

    async def trigger_checked(self, checked: Checked) -> list[Triggered]:
        """Trigger what `check` found nothing wrong with."""
        now = self._clock()
        snapshots = [self._snapshot(checked, request, now) for request in checked.requests]
        return [Triggered(answer(outcome)) for outcome in await self._engine.create_runs(snapshots)]


async def measure(_redis_url: str, scale: float) -> Report:
    """Trigger in short rounds, one side after the other, so that both meet the same machine; each makes its runs in Postgres."""
    rounds = max(4, int(ROUNDS * scale))
    async with house(enabled=False) as parts, connect(parts.stack.redis_url) as redis:
        counters = Counters(redis)
        before_reads = await counters.reads()
        sides: dict[str, Callable[[], Awaitable[float]]] = {
            "off": lambda: _round_us(parts.mollifier.triggers),
            "without": lambda: _round_us(_without_gate(parts.mollifier.triggers)),
        }
        taken_us: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides) if number % 2 else list(sides)[::-1]:
                taken_us[name].append(await sides[name]())
        # The last look at the counters is a read of its own.
        round_trips = await counters.reads() - before_reads - 1
    off_us, without_us = median(taken_us["off"]), median(taken_us["without"])
    return Report(
        "off",
        "what does a trigger cost with Mollifier switched off, beside a build without the gate?",
        (
            Figure("triggers", rounds * TRIGGERS_PER_ROUND),
            Figure("off_us", off_us),
            Figure("without_gate_us", without_us),
            Figure("ratio", off_us / without_us, "about 1"),
            Figure("round_trips_to_the_buffers_server", round_trips, "0"),
        ),
    )


def _without_gate(service: TriggerService) -> TriggerService:
    bare = WithoutGate.__new__(WithoutGate)
    bare.__dict__.update(service.__dict__)
    return bare


async def _round_us(service: TriggerService) -> float:
    who = environment()
    gc.collect()
    started = time.perf_counter()
    for _ in range(TRIGGERS_PER_ROUND):
        await service.trigger(who, REQUEST)
    return (time.perf_counter() - started) / TRIGGERS_PER_ROUND * 1_000_000
