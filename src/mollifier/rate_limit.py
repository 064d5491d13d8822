"""How many requests an API key may make: counted on the buffer's server, so that all replicas share the count.

In any span of one window at most so many requests of a key are let through; the count is that of the trip evaluator, see there. It fails
open: where the server does not answer within the gate's deadline, or keeps failing, the request passes as if there were no limit.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mollifier import scripts
from mollifier.deadline import Breaker, within
from mollifier.keys import Keyspace
from mollifier.scripts import Scripts
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry
from mollifier.trip import SUB_BUCKETS


class Quota(msgspec.Struct, frozen=True):
    """Where a key stands after one more request: `remaining` may follow now, more after `reset_ms`."""

    allowed: bool
    limit: int
    window_s: int
    remaining: int
    reset_ms: int


class RateLimiter:
    """Counts requests by API key. Without a limit in the settings it asks nobody; with one, a request costs one round trip."""

    def __init__(
        self,
        scripts: Scripts,
        keyspace: Keyspace,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        breaker: Breaker | None = None,
    ) -> None:
        self._scripts = scripts
        self._keyspace = keyspace
        self._settings = settings
        self._telemetry = telemetry
        self._breaker = breaker or Breaker()

    async def spend(self, org_id: str, key_id: str) -> Quota | None:
        """Count one request of the organization's key; None where there is no limit, or nobody who could tell."""
        settings = self._settings()
        limit, window_s = settings.request_limit, settings.request_limit_window_s
        if limit is None:
            return None
        call = scripts.limit(
            requests=self._keyspace.of(org_id).requests(key_id),
            # A width rounded up keeps 20 buckets at least as long as the window.
            bucket_us=-(-window_s * 1_000_000 // SUB_BUCKETS),
            buckets=SUB_BUCKETS + 1,
            limit=limit,
        )
        try:
            reply = await self._breaker.ask(lambda: within(settings.gate_deadline_ms, self._scripts.run(call)))
        except Exception as error:  # noqa: BLE001 - a limit that cannot be told is none, whatever the reason
            self._telemetry.failed_open("limit", error)
            return None
        allowed, remaining, reset_ms = reply
        return Quota(allowed=allowed, limit=limit, window_s=window_s, remaining=remaining, reset_ms=reset_ms)
