"""Debouncing: the triggers of one key share the run that the first of them made, for as long as it is delayed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Interval, func, text, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mollifier.postgres.tables import runs

REPLACED = (
    "payload",
    "payload_type",
    "context",
    "metadata",
    "metadata_type",
    "tags",
    "machine",
    "max_attempts",
    "max_duration_s",
)
"""What a trailing trigger puts in the place of the earlier ones'."""


async def push(connection: AsyncConnection, run_id: str, row: Mapping[str, Any], now: datetime) -> bool:
    """Let the trigger that `row` stands for push the delayed run; return False when that run is delayed no longer.

    The new due moment is the trigger's own plus its delay, but no later than the run's `max_delay` after the run's creation, and
    never earlier than it was.
    """
    pushed = row["created_at"] + row["debounce_delay"]
    due_at = func.greatest(runs.c.due_at, func.least(pushed, runs.c.created_at + runs.c.debounce_max_delay))
    values = {name: row[name] for name in REPLACED} if row["debounce_mode"] == "trailing" else {}
    statement = (
        update(runs)
        .where(runs.c.id == run_id, runs.c.due_at > now)
        .values(delayed_until=due_at, due_at=due_at, expires_at=due_at + ttl(), updated_at=now, **values)
        .returning(runs.c.id)
    )
    return (await connection.execute(statement)).one_or_none() is not None


def ttl() -> Any:
    """Return the expression of a run's time to live as an interval; NULL for one that has none."""
    return runs.c.ttl_s * type_coerce(text("interval '1 second'"), Interval)


async def leave(connection: AsyncConnection, run_id: str, now: datetime) -> None:
    """Free the debounce key of a run that is due."""
    await connection.execute(
        update(runs).where(runs.c.id == run_id, runs.c.delayed_until <= now).values(debounce_slot=None)
    )
