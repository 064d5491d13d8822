"""Expiry: a run that has not started when its time to live is over never does. One rule, whichever store the run is in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from mollifier.model import RunError, Snapshot

EXPIRED_ERROR = RunError(message="The run did not start within its time to live.", name="Expired")
"""What a run that expired says of itself."""
_LATEST = datetime.max.replace(tzinfo=UTC)


def expiry(start: datetime, ttl_s: int | None) -> datetime | None:
    """Return the moment at which a run that may wait for `ttl_s` seconds from `start` expires, or None without a limit."""
    if ttl_s is None:
        return None
    try:
        return start + timedelta(seconds=ttl_s)
    except OverflowError:
        return _LATEST


def expiry_of(snapshot: Snapshot) -> datetime | None:
    """Return the moment at which the run expires, None without a limit: a delayed run's time to live counts from its due moment."""
    return expiry(snapshot.delayed_until or snapshot.created_at, snapshot.ttl_s)
