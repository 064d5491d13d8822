"""What benchmarks have in common: a server of their own, an engine that does nothing, and a look at the server's counters."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

from redis.asyncio import Redis

from mollifier.engine import Created, CreateOutcome, RunEngine
from mollifier.facade import Mollifier
from mollifier.model import Environment, Snapshot, TriggerRequest
from mollifier.settings import Settings

PAYLOAD = (b'{"order":{"id":"ord_0123456789","items":["' + b"x" * 1024)[:1020] + b'"]}}'
REQUEST = TriggerRequest(task_id="send-invoice", payload=PAYLOAD, tags=("customer:42", "eu"))


def environment(number: int = 0) -> Environment:
    """Return an environment of an enrolled organization."""
    return Environment(
        id=f"env_{number:020}",
        name="prod",
        project_id=f"proj_{number:020}",
        org_id=f"org_{number:020}",
        org_flags={"mollifierEnabled": True},
    )


class NoEngine:
    """A run engine that says yes and does nothing, so that only what stands before it is measured."""

    deadline_ms = 15_000

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[CreateOutcome]:
        """Answer that every run was created."""
        return [Created(snapshot.run_id) for snapshot in snapshots]


class EveryTask:
    """A catalog that knows every task."""

    async def knows(self, task_id: str) -> bool:
        """Return True."""
        return bool(task_id)


def mollifier_of(settings: Settings, redis: Redis | None = None) -> Mollifier:
    """Return a Mollifier before an engine that does nothing."""
    return Mollifier(
        settings,
        engine=cast("RunEngine", NoEngine()),
        tasks=EveryTask(),
        redis=redis,
        clock=lambda: datetime.now(UTC),
    )


class Counters:
    """The server's own counters. Asking for them is itself a command and a read."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    async def info(self, section: str) -> dict[str, Any]:
        """Return a section of INFO."""
        return await self._redis.info(section)

    async def used_memory_bytes(self) -> int:
        """Return what the server's data takes, without what the allocator keeps in reserve."""
        await self._redis.execute_command("MEMORY", "PURGE")
        return (await self.info("memory"))["used_memory"]

    async def reads(self) -> int:
        """Return how many times the server has read something from any client: once per round trip, with one client at a time."""
        return (await self.info("stats"))["total_reads_processed"]

    async def keys(self) -> int:
        """Return how many keys there are."""
        return await self._redis.dbsize()


async def flush(redis: Redis) -> None:
    """Empty the server, and wait until its memory is free."""
    untyped: Any = redis
    await untyped.execute_command("FLUSHALL", "SYNC")
