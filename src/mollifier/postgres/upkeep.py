"""Upkeep: what time brings to runs and jobs. Every worker does it; they share the work without waiting for each other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import msgspec
from sqlalchemy import text
from sqlalchemy.sql.elements import TextClause

from mollifier.expiry import EXPIRED_ERROR
from mollifier.postgres.database import Database
from mollifier.postgres.jobs import defer_sql

BATCH_SIZE = 500

_QUEUE_DUE = text(
    f"""
    WITH due AS (
        SELECT id FROM runs WHERE due_at <= :now AND status = 'DELAYED'
        ORDER BY due_at LIMIT {BATCH_SIZE} FOR UPDATE SKIP LOCKED
    ), queued AS (
        UPDATE runs SET status = 'QUEUED', due_at = NULL, debounce_slot = NULL, updated_at = :now
        FROM due WHERE runs.id = due.id
        RETURNING runs.id, queue, priority, created_at
    )
    SELECT count(*) AS number, {defer_sql()} AS job_ids FROM queued
    """  # noqa: S608 - made of constants
)

_EXPIRE = text(
    f"""
    WITH over AS (
        SELECT id FROM runs WHERE expires_at <= :now AND status IN ('DELAYED', 'QUEUED')
        ORDER BY expires_at LIMIT {BATCH_SIZE} FOR UPDATE SKIP LOCKED
    ), expired AS (
        UPDATE runs
        SET status = 'EXPIRED', expired_at = :now, finished_at = :now, updated_at = :now, error = :error,
            expires_at = NULL, due_at = NULL, debounce_slot = NULL, idempotency_slot = NULL
        FROM over WHERE runs.id = over.id
        RETURNING runs.id
    )
    SELECT count(*) AS number FROM expired
    """  # noqa: S608 - made of constants
)

# A job whose worker is gone, or silent for too long, goes back; the row lock has the condition checked again, so that no two workers
# send it back, nor one that has been fetched anew.
_RESCUE = text(
    """
    WITH stalled AS (
        SELECT job.id FROM procrastinate_jobs AS job
        LEFT JOIN procrastinate_workers AS worker ON worker.id = job.worker_id
        WHERE job.status = 'doing'
        AND (worker.id IS NULL OR worker.last_heartbeat < now() - make_interval(secs => :silent_s))
        FOR UPDATE OF job SKIP LOCKED
    )
    SELECT id, procrastinate_retry_job_v2(id, now(), NULL, NULL, NULL) FROM stalled
    """
)

_SWEEP = text("DELETE FROM procrastinate_jobs WHERE status NOT IN ('todo', 'doing')")


class Upkeep:
    """Queues runs that are due, expires those that waited too long, and sends back the jobs of dead workers."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    async def advance(self) -> None:
        """Do what the clock asks of runs: expire first, so that what is due and over at once does not start."""
        await self.expire()
        await self.queue_due()

    async def queue_due(self) -> int:
        """Queue the delayed runs whose moment has come, each with its job; return how many."""
        return await self._in_batches(_QUEUE_DUE)

    async def expire(self) -> int:
        """Expire the runs that did not start in time, and free their keys; return how many."""
        return await self._in_batches(_EXPIRE, error=msgspec.json.encode(EXPIRED_ERROR))

    async def rescue(self, silent_s: float) -> list[int]:
        """Send back the jobs of workers that have not been heard of for that long; return the jobs' ids."""
        async with self._database.statement() as connection:
            return [row.id for row in await connection.execute(_RESCUE, {"silent_s": silent_s})]

    async def sweep(self) -> None:
        """Delete the jobs that were cancelled, or that failed for good: nothing will ever read them."""
        async with self._database.statement() as connection:
            await connection.execute(_SWEEP)

    async def _in_batches(self, statement: TextClause, **parameters: object) -> int:
        total, number = 0, BATCH_SIZE
        while number == BATCH_SIZE:
            async with self._database.statement() as connection:
                number = (await connection.execute(statement, {"now": self._clock(), **parameters})).one().number
            total += number
        return total
