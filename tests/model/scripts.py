"""What each script has to do, said plainly: the model that the scripts in `lua/` are held against, and that the simulation runs on.

A method here has the name of its script and takes the names of its header. It is written from the contract, not from the script, so the
two agree only where both are right. Replies are what the server would send, bytes and all.
"""

from __future__ import annotations

from typing import Any

from tests.model.letters import Letters
from tests.model.mending import Mending
from tests.model.settling import Settling
from tests.model.store import Store
from tests.model.storing import Storing
from tests.model.taking import Taking


class ScriptModel(Storing, Taking, Settling, Mending, Letters):
    """The scripts over one store."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._arrivals_us: dict[str, list[int]] = {}
        self._requests_us: dict[str, list[int]] = {}

    def trip(
        self, *, rate: str, tripped: str, bucket_us: int, buckets: int, threshold: int, hold_ms: int, number: int
    ) -> Any:
        """Triggers are counted with those in the buckets before; more than the threshold hold the environment."""
        now = self.store.now_us // bucket_us
        arrivals = [moment for moment in self._arrivals_us.get(rate, []) if abs(now - moment // bucket_us) < buckets]
        self._arrivals_us[rate] = [*arrivals, *[self.store.now_us] * number]
        was_held = self.store.exists(tripped)
        if len(arrivals) + number > threshold:
            self.store.put(tripped, b"1", self.store.now_ms + hold_ms)
        return [was_held, len(arrivals)]

    def limit(self, *, requests: str, bucket_us: int, buckets: int, limit: int) -> Any:
        """A request is let through, and counted, unless as many as the limit are in the buckets that count."""
        now = self.store.now_us // bucket_us
        counted = [moment for moment in self._requests_us.get(requests, []) if abs(now - moment // bucket_us) < buckets]
        is_allowed = len(counted) < limit
        if is_allowed:
            counted.append(self.store.now_us)
        self._requests_us[requests] = counted
        oldest = min((moment // bucket_us for moment in counted), default=now)
        reset_us = (oldest + buckets) * bucket_us - self.store.now_us
        return [int(is_allowed), max(limit - len(counted), 0), -(-reset_us // 1000)]
