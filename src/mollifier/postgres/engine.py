"""The run engine that records runs in Postgres and has procrastinate's workers execute them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from psycopg import errors as pg
from sqlalchemy import ColumnElement, RowMapping, exc, func, literal_column, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mollifier.engine import CreateOutcome, Creation, Existing
from mollifier.errors import ConflictError, EngineUnavailableError, FieldError, InvalidRequestError
from mollifier.expiry import expiry
from mollifier.metadata import apply, check_growth
from mollifier.model import (
    FINAL_STATUSES,
    MAX_TAGS,
    Batch,
    MetadataOperation,
    Run,
    RunFilter,
    RunPage,
    RunProgress,
    RunStatus,
    Snapshot,
)
from mollifier.patches import Cancel, Patch
from mollifier.postgres import batches
from mollifier.postgres.carrying import carried
from mollifier.postgres.creation import create_rows
from mollifier.postgres.database import STOP_S, Database, translated
from mollifier.postgres.holders import find_holders, standing
from mollifier.postgres.listing import page_of, page_query
from mollifier.postgres.rows import CHILDREN, progress_of, row_of, run_of
from mollifier.postgres.slots import request_slot, task_slot
from mollifier.postgres.tables import runs

LOCKOUTS_MAX = 5
_RUN: Sequence[ColumnElement[Any]] = (literal_column("runs.*"), literal_column(CHILDREN))
_READ = text(f"SELECT runs.*, {CHILDREN} FROM runs WHERE id = :run_id AND environment_id = :env_id")  # noqa: S608 - constants
_READ_MANY = text("SELECT * FROM runs WHERE id = ANY (CAST(:run_ids AS text[])) AND environment_id = :env_id")
_READ_PROGRESS = text(
    """
    SELECT id, status, delayed_until, updated_at FROM runs
    WHERE id = ANY (CAST(:run_ids AS text[])) AND environment_id = :env_id
    """
)
_READ_CHILDREN = text(
    """
    SELECT id FROM runs WHERE parent_run_id = :run_id AND environment_id = :env_id ORDER BY created_at, id LIMIT :number
    """
)
_READ_LOCKED = text(f"{_READ.text} FOR UPDATE")
_RESET = text(
    """
    WITH holder AS (
        SELECT id, idempotency_expires_at FROM runs
        WHERE environment_id = :env_id AND idempotency_slot = :slot AND id = coalesce(:run_id, id) FOR UPDATE
    )
    UPDATE runs
    SET idempotency_slot = NULL, idempotency_expires_at = least(runs.idempotency_expires_at, :at), updated_at = :at
    FROM holder WHERE runs.id = holder.id
    RETURNING holder.id, holder.idempotency_expires_at
    """
)
T = TypeVar("T")


def utc_now() -> datetime:
    """Return this process's clock."""
    return datetime.now(UTC)


class PostgresRunEngine:
    """Implements `RunEngine`; see there for what each operation promises.

    `clock` says what is due and what has expired, and stamps changes that carry no moment of their own.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    @property
    def deadline_ms(self) -> int:
        """The database's deadline, and what giving up takes: each call uses it once, or repeats within it."""
        return int((self._database.deadline_s + STOP_S) * 1000)

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[CreateOutcome]:
        """Create the runs; a single one without a race costs one round trip.

        Raises InvalidRequestError, nothing created, when any of the snapshots holds what the database cannot store.
        """
        lend = self._database.statement if len(snapshots) == 1 else self._database.transaction
        return await self._create([Creation(snapshot=snapshot) for snapshot in snapshots], lend)

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        """Create the runs in one transaction, as they stand after being held.

        A single one, too: a statement that commits by itself is carried out even when whoever sent it has long given it up. What
        became of the run meanwhile, cancelled or changed where it is held, would then be read from a row that does not know of it.
        """
        return await self._create(creations, self._database.transaction)

    async def _create(
        self, creations: Sequence[Creation], lend: Callable[[], AbstractAsyncContextManager[AsyncConnection]]
    ) -> Sequence[CreateOutcome]:
        now = self._clock()
        rows = [row_of(creation, now) for creation in creations]
        if not rows:
            return []

        async def attempt() -> Sequence[CreateOutcome]:
            async with lend() as connection:
                return await create_rows(connection, rows, now)

        with translated():
            # Each attempt has the deadline, and all of them together no more: the last may have less time to be given up.
            async with asyncio.timeout(self._database.deadline_s + STOP_S):
                return await _outlasting_lockouts(attempt)

    async def carry_over(self, env_id: str, run_id: str, changes: Sequence[Patch]) -> Run | None:
        """Apply what is missing under the run's lock, and count it in the same transaction."""
        async with self._database.transaction() as connection:
            row = await self._read(connection, env_id, run_id, lock=True)
            if row is None or row["patch_count"] >= len(changes):
                return self._run(row)
            missing = changes[row["patch_count"] :]
            values = carried(dict(row), missing, self._clock())
            for change in missing:
                if isinstance(change, Cancel):
                    await self._cancel(connection, env_id, run_id, change.at)
            return await self._write(connection, env_id, run_id, patch_count=len(changes), **values)

    async def find_by_keys(self, snapshot: Snapshot) -> Existing | None:
        """Look the snapshot's keys up, in one round trip; in none when it has no keys."""
        (existing,) = await self.find_by_keys_many([snapshot])
        return existing

    async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
        """Look the keys up, in one round trip; in none when there are no keys."""
        asking = [_asking(snapshot) for snapshot in snapshots]
        keyed = [row for row in asking if row["request_slot"] is not None or row["idempotency_slot"] is not None]
        if not keyed:
            return [None] * len(snapshots)
        async with self._database.statement() as connection:
            holders = await find_holders(connection, keyed)
        return [standing(row, holders) for row in asking]

    async def get_run(self, env_id: str, run_id: str) -> Run | None:
        """Read the run, in one round trip."""
        async with self._database.statement() as connection:
            return self._run(await self._read(connection, env_id, run_id))

    async def get_runs(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, Run]:
        """Read the runs, in one round trip."""
        parameters = {"run_ids": list(run_ids), "env_id": env_id}
        async with self._database.statement() as connection:
            found = (await connection.execute(_READ_MANY, parameters)).mappings().all()
        return {row["id"]: run_of(row, self._clock()) for row in found}

    async def get_children(self, env_id: str, run_id: str, limit: int) -> Sequence[str]:
        """Read the ids, in one round trip."""
        async with self._database.statement() as connection:
            found = await connection.execute(_READ_CHILDREN, {"run_id": run_id, "env_id": env_id, "number": limit})
        return found.scalars().all()

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        """Read how far the runs are, in one round trip."""
        now, parameters = self._clock(), {"run_ids": list(run_ids), "env_id": env_id}
        async with self._database.statement() as connection:
            found = (await connection.execute(_READ_PROGRESS, parameters)).mappings().all()
        return {row["id"]: progress_of(row, now) for row in found}

    async def list_runs(self, env_id: str, query: RunFilter) -> RunPage:
        """Read one page, in one round trip. The runs of a list come without their children."""
        now = self._clock()
        statement = page_query(env_id, query, now)
        async with self._database.statement() as connection:
            found = (await connection.execute(statement)).mappings().all()
        return page_of([run_of(row, now) for row in found], query)

    async def cancel_run(self, env_id: str, run_id: str, at: datetime) -> Run | None:
        """Cancel the run, and ask the worker that executes it to stop."""
        async with self._database.transaction() as connection:
            return self._run(await self._cancel(connection, env_id, run_id, at))

    async def _cancel(self, connection: AsyncConnection, env_id: str, run_id: str, at: datetime) -> RowMapping | None:
        statement = (
            _change(env_id, run_id)
            .where(runs.c.status.not_in(FINAL_STATUSES))
            .values(
                status=RunStatus.CANCELED,
                finished_at=at,
                updated_at=at,
                due_at=None,
                expires_at=None,
                debounce_slot=None,
            )
        )
        row = (await connection.execute(statement.returning(*_RUN))).mappings().one_or_none()
        if row is None:
            row = await self._read(connection, env_id, run_id)
            if row is None or row["status"] in FINAL_STATUSES:
                return row
            # It was created between the two looks, so that the second one sees what the first could not change.
            return await self._cancel(connection, env_id, run_id, at)
        if row["job_id"] is not None:
            await connection.execute(select(func.procrastinate_cancel_job_v1(row["job_id"], True, False)))
        return row

    async def add_tags(self, env_id: str, run_id: str, tags: Sequence[str]) -> Run | None:
        """Add the tags under the run's lock."""
        async with self._database.transaction() as connection:
            row = await self._read(connection, env_id, run_id, lock=True)
            if row is None:
                return None
            merged = list(dict.fromkeys((*row["tags"], *tags)))
            if len(merged) > MAX_TAGS:
                raise InvalidRequestError(
                    FieldError("tags", f"a run has at most {MAX_TAGS} tags; these would make it {len(merged)}")
                )
            return await self._write(connection, env_id, run_id, tags=merged)

    async def change_metadata(self, env_id: str, run_id: str, operations: Sequence[MetadataOperation]) -> Run | None:
        """Apply the operations under the run's lock."""
        async with self._database.transaction() as connection:
            row = await self._read(connection, env_id, run_id, lock=True)
            if row is None:
                return None
            metadata = apply(row["metadata"], operations)
            check_growth(row["metadata"], metadata)
            return await self._write(connection, env_id, run_id, metadata=metadata)

    async def reschedule_run(self, env_id: str, run_id: str, delay: timedelta | datetime, at: datetime) -> Run | None:
        """Move the due moment; upkeep queues the run when it comes."""
        try:
            due_at = delay if isinstance(delay, datetime) else at + delay
        except OverflowError as error:
            raise InvalidRequestError(FieldError("delay", "lies beyond the calendar")) from error
        async with self._database.transaction() as connection:
            row = await self._read(connection, env_id, run_id, lock=True)
            if row is None:
                return None
            if row["due_at"] is None or row["due_at"] <= at:
                status = self._status(row)
                raise ConflictError(f"Only a delayed run can be rescheduled; this one is {status}.", "delay")
            return await self._write(
                connection, env_id, run_id, delayed_until=due_at, due_at=due_at, expires_at=expiry(due_at, row["ttl_s"])
            )

    async def reset_idempotency_key(
        self, env_id: str, task_id: str, key: str, at: datetime, *, run_id: str | None = None
    ) -> str | None:
        """Free the key, in one round trip."""
        parameters = {"env_id": env_id, "slot": task_slot(task_id, key), "at": at, "run_id": run_id}
        async with self._database.statement() as connection:
            row = (await connection.execute(_RESET, parameters)).one_or_none()
        was_held = row is not None and (row.idempotency_expires_at is None or row.idempotency_expires_at > at)
        return row.id if row is not None and was_held else None

    async def create_batch(self, batch: Batch) -> CreateOutcome:
        """Create the batch, in one round trip where nothing is in the way."""
        async with self._database.statement() as connection:
            return await batches.create_batch(connection, batch)

    async def get_batch(self, env_id: str, batch_id: str) -> Batch | None:
        """Read the batch, in one round trip."""
        async with self._database.statement() as connection:
            return await batches.read_batch(connection, env_id, batch_id)

    async def add_batch_runs(self, env_id: str, batch_id: str, runs: Mapping[int, str], at: datetime) -> Batch | None:
        """Put the runs in, in one round trip."""
        async with self._database.statement() as connection:
            return await batches.add_runs(connection, env_id, batch_id, runs, at)

    async def _read(
        self, connection: AsyncConnection, env_id: str, run_id: str, *, lock: bool = False
    ) -> RowMapping | None:
        statement = _READ_LOCKED if lock else _READ
        return (await connection.execute(statement, {"run_id": run_id, "env_id": env_id})).mappings().one_or_none()

    async def _write(self, connection: AsyncConnection, env_id: str, run_id: str, **values: Any) -> Run | None:
        statement = _change(env_id, run_id).values({"updated_at": self._clock(), **values}).returning(*_RUN)
        return self._run((await connection.execute(statement)).mappings().one_or_none())

    def _run(self, row: RowMapping | None) -> Run | None:
        return None if row is None else run_of(row, self._clock())

    def _status(self, row: RowMapping) -> RunStatus:
        return run_of(row, self._clock()).status


def _asking(snapshot: Snapshot) -> dict[str, Any]:
    """Return what a row says of its keys, without being anybody yet."""
    return {
        "id": None,
        "environment_id": snapshot.env_id,
        "created_at": snapshot.created_at,
        "request_slot": request_slot(snapshot.request_key),
        "idempotency_slot": task_slot(snapshot.task_id, snapshot.idempotency_key),
        "debounce_slot": None,
    }


def _change(env_id: str, run_id: str) -> Any:
    return update(runs).where(runs.c.id == run_id, runs.c.environment_id == env_id)


async def _outlasting_lockouts(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat what the server broke off because two transactions waited for each other: nothing of it was done."""
    for _ in range(LOCKOUTS_MAX):
        try:
            return await attempt()
        except EngineUnavailableError as error:
            if not _is_lockout(error.__cause__):
                raise
    return await attempt()


def _is_lockout(error: BaseException | None) -> bool:
    return isinstance(error, exc.DBAPIError) and isinstance(error.orig, (pg.DeadlockDetected, pg.SerializationFailure))
