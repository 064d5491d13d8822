"""2. The trip evaluator: is this environment bursting?

The problem. One tenant's thousand triggers in a moment are to be noticed within one window, by every replica together, at the
cost of one small script call. The promise has two halves: in *any* span of one window's length at most `threshold` triggers
pass, and an environment that stays under the threshold is never held.

Why the usual answers fail. A fixed window lets twice the threshold through around its edge: all of one window's allowance at its
end, all of the next one's at its start. The two-bucket weighted counter assumes that the previous window's triggers were spread
evenly, so a burst in its tail is forgotten too early. GCRA bounds a rate, with a burst tolerance on top: again more than the
threshold in some window.

What is done here. The window is cut into 20 buckets and the count is the sum of 21: the current one and the 20 before it. Any
span of one window touches at most 21 buckets, so all of its triggers are in the sum that its last trigger saw: if that one
passed, there were at most `threshold`. And the 21 buckets span at most 1.05 windows, so an environment that stays at or under the
threshold over every such span never trips. That 5 % is the price of counting conservatively; more buckets would cost memory.

          |<---------- window ---------->|
    ..|..|..|..|..|..|..|..|..|..|..|..|..|      <- 21 buckets, the last one still filling
      ^ counted from here                 ^ now

More than `threshold` in the sum trips the environment for `hold_ms`, and each further overage starts the hold anew. Held triggers
count too: the environment is let through again when its own rate has fallen, not when ours has. Time is the server's.

Triggers that come together, the items of a batch, are counted by one call, each as if the others had come before it.

The fixed window is the same script with one bucket as wide as the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mollifier import scripts
from mollifier.errors import BufferUnavailableError
from mollifier.keys import Keyspace
from mollifier.model import GateInputs, Verdict
from mollifier.scripts import Call, Scripts
from mollifier.settings import Settings

SUB_BUCKETS = 20


class Evaluator(Protocol):
    """What the gate asks; any failure counts as no burst."""

    async def evaluate_many(self, inputs: Sequence[GateInputs]) -> Sequence[Verdict]:
        """Count these triggers and tell of each, in order, whether its environment is bursting."""
        ...


class TripEvaluator:
    """Counts per environment on the buffer's server, so that all replicas share one count. One round trip, for any number."""

    def __init__(self, scripts: Scripts, keyspace: Keyspace, settings: Callable[[], Settings]) -> None:
        self._scripts = scripts
        self._keyspace = keyspace
        self._settings = settings

    async def evaluate(self, inputs: GateInputs) -> Verdict:
        """Count this trigger and tell whether its environment is bursting. Raises BufferUnavailableError."""
        (verdict,) = await self.evaluate_many([inputs])
        return verdict

    async def evaluate_many(self, inputs: Sequence[GateInputs]) -> Sequence[Verdict]:
        """Count these triggers in order and tell of each whether its environment is bursting. Raises BufferUnavailableError."""
        together: dict[tuple[str, str], list[int]] = {}
        for index, one in enumerate(inputs):
            together.setdefault((one.org_id, one.env_id), []).append(index)
        settings = self._settings()
        calls = [self._call(settings, org_id, env_id, len(indexes)) for (org_id, env_id), indexes in together.items()]
        verdicts: dict[int, Verdict] = {}
        for indexes, answer in zip(together.values(), await self._scripts.run_many(calls), strict=True):
            if isinstance(answer, BufferUnavailableError):
                raise answer
            verdicts.update(zip(indexes, answer, strict=True))
        return [verdicts[index] for index in range(len(inputs))]

    def _call(self, settings: Settings, org_id: str, env_id: str, number: int) -> Call[tuple[Verdict, ...]]:
        keys = self._keyspace.of(org_id)
        bucket_us, buckets = _buckets(settings)
        return scripts.trip(
            rate=keys.rate(env_id),
            tripped=keys.tripped(env_id),
            bucket_us=bucket_us,
            buckets=buckets,
            threshold=settings.trip_threshold,
            hold_ms=settings.hold_ms,
            number=number,
        )


def _buckets(settings: Settings) -> tuple[int, int]:
    """Return the width of a bucket (microseconds) and how many are counted."""
    window_us = settings.trip_window_ms * 1000
    if settings.trip_algorithm == "fixed":
        return window_us, 1
    # A width rounded up keeps 20 buckets at least as long as the window.
    return -(-window_us // SUB_BUCKETS), SUB_BUCKETS + 1
