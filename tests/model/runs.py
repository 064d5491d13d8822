"""The tables of the run engine in memory: what Postgres does for `mollifier.postgres`, with its unique constraints, in plain Python.

How a snapshot becomes a row, and a row a run, is the production code's own; what its SQL does is said here. Each method is one
transaction, done at once; `now` is the clock of the process that asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec.structs import replace

from mollifier.cursors import position
from mollifier.engine import Created, CreateOutcome, Creation, Existing
from mollifier.errors import ConflictError, FieldError, InvalidRequestError
from mollifier.expiry import EXPIRED_ERROR, expiry
from mollifier.listing import matches
from mollifier.metadata import apply, check_growth
from mollifier.model import (
    FINAL_STATUSES,
    KEY_FREEING_STATUSES,
    MAX_TAGS,
    MetadataOperation,
    Run,
    RunFilter,
    RunPage,
    RunProgress,
    RunStatus,
    Snapshot,
)
from mollifier.patches import Cancel, Patch
from mollifier.postgres.carrying import carried
from mollifier.postgres.debounce import REPLACED
from mollifier.postgres.holders import SLOTS, Kind
from mollifier.postgres.listing import page_of
from mollifier.postgres.rows import row_of, run_of
from mollifier.postgres.slots import request_slot, task_slot

Row = dict[str, Any]

_FREE_AT: Mapping[str, str] = {"request_key": "request_key_expires_at", "idempotency_key": "idempotency_expires_at"}
_DEFAULTS = {"attempt_count": 0, "output_type": "application/json"}
"""What the table gives a new row by itself."""
_EXPIRED = msgspec.json.encode(EXPIRED_ERROR)


class RunTable:
    """Rows by run id, and which of them holds which key: the primary key and the three unique indexes."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self._slots: dict[tuple[str, str, bytes], str] = {}

    # --- creating --------------------------------------------------------------------------------------------------

    def create(self, creations: Sequence[Creation], now: datetime) -> list[CreateOutcome]:
        """Insert what conflicts with nothing; tell of the rest which run stands for it."""
        rows = [row_of(creation, now) for creation in creations]
        outcomes: dict[int, CreateOutcome] = {}
        for index in sorted(range(len(rows)), key=lambda index: (_order(rows[index]), index)):
            outcomes[index] = self._insert(rows[index], now)
        return [outcomes[index] for index in range(len(rows))]

    def _insert(self, row: Row, now: datetime) -> CreateOutcome:
        run_id: str = row["id"]
        if run_id in self.rows:
            return Existing(run_id, by="run_id")
        existing = self._standing(row)
        if existing is not None:
            return existing
        for kind, name in SLOTS.items():
            holder = self._holder(kind, row)
            if holder is None:
                continue
            if kind == "debounce" and _is_delayed(holder, now):
                _push(holder, row, now)
                return Existing(holder["id"], by="debounce")
            self._free(holder, name)
        self.rows[run_id] = {**row, **_DEFAULTS}
        for name in SLOTS.values():
            if row[name] is not None:
                self._slots[name, row["environment_id"], row[name]] = run_id
        return Created(run_id)

    def find(self, snapshot: Snapshot) -> Existing | None:
        """Return the run that one of the snapshot's keys belongs to at its moment."""
        return self._standing(
            {
                "environment_id": snapshot.env_id,
                "created_at": snapshot.created_at,
                "request_slot": request_slot(snapshot.request_key),
                "idempotency_slot": task_slot(snapshot.task_id, snapshot.idempotency_key),
            }
        )

    def _standing(self, row: Mapping[str, Any]) -> Existing | None:
        for by in ("request_key", "idempotency_key"):
            holder = self._holder(by, row)
            if holder is not None:
                free_at = holder[_FREE_AT[by]]
                if free_at is None or free_at > row["created_at"]:
                    return Existing(holder["id"], by=by)
        return None

    def _holder(self, kind: Kind, row: Mapping[str, Any]) -> Row | None:
        name = SLOTS[kind]
        held = row[name]
        holder = None if held is None else self._slots.get((name, row["environment_id"], held))
        return None if holder is None else self.rows[holder]

    def _free(self, row: Row, *names: str) -> None:
        for name in names:
            if row[name] is not None:
                del self._slots[name, row["environment_id"], row[name]]
                row[name] = None

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, env_id: str, run_id: str, now: datetime) -> Run | None:
        """Return the run with its children."""
        row = self._row(env_id, run_id)
        return None if row is None else replace(_run(row, now), children=tuple(self.children(env_id, run_id)))

    def get_many(self, env_id: str, run_ids: Sequence[str], now: datetime) -> dict[str, Run]:
        """Return the runs that are there, without their children."""
        found = {run_id: self._row(env_id, run_id) for run_id in run_ids}
        return {run_id: _run(row, now) for run_id, row in found.items() if row is not None}

    def children(self, env_id: str, run_id: str) -> list[str]:
        """Return the ids of the run's children, oldest first."""
        rows = [row for row in self.of(env_id) if row["parent_run_id"] == run_id]
        return [row["id"] for row in sorted(rows, key=lambda row: (row["created_at"], row["id"]))]

    def progress(self, env_id: str, run_ids: Sequence[str], now: datetime) -> dict[str, RunProgress]:
        """Return how far the runs are that are there."""
        found = self.get_many(env_id, run_ids, now)
        return {run_id: RunProgress(run.status, run.updated_at) for run_id, run in found.items()}

    def page(self, env_id: str, query: RunFilter, now: datetime) -> RunPage:
        """Return one page, as the real query and its reader do."""
        place = position(query)
        backwards = query.before is not None
        runs = [run for run in (_run(row, now) for row in self.of(env_id)) if matches(run, query)]
        runs.sort(key=lambda run: (run.snapshot.created_at, run.id), reverse=not backwards)
        if place is not None:
            keys = [(run.snapshot.created_at, run.id) for run in runs]
            runs = [run for run, key in zip(runs, keys, strict=True) if (key > place if backwards else key < place)]
        shown = runs[: query.page_size + 1]
        return page_of(
            [replace(run, snapshot=replace(run.snapshot, payload=b"", context=None), output=None) for run in shown],
            query,
        )

    def of(self, env_id: str) -> Iterator[Row]:
        """Return the environment's rows."""
        return (row for row in self.rows.values() if row["environment_id"] == env_id)

    def _row(self, env_id: str, run_id: str) -> Row | None:
        row = self.rows.get(run_id)
        return row if row is not None and row["environment_id"] == env_id else None

    # --- changing --------------------------------------------------------------------------------------------------

    def carry_over(self, env_id: str, run_id: str, changes: Sequence[Patch], now: datetime) -> Run | None:
        """Apply those of a held run's changes that the row does not count yet."""
        row = self._row(env_id, run_id)
        if row is None:
            return None
        missing = changes[row["patch_count"] :]
        if missing:
            values = carried(dict(row), missing, now)
            for change in missing:
                if isinstance(change, Cancel):
                    self._cancel(row, change.at)
            if "idempotency_slot" in values:
                self._free(row, "idempotency_slot")
            row.update(values, patch_count=len(changes))
        return self.get(env_id, run_id, now)

    def cancel(self, env_id: str, run_id: str, at: datetime, now: datetime) -> Run | None:
        """Cancel the run unless it has ended."""
        row = self._row(env_id, run_id)
        if row is not None:
            self._cancel(row, at)
        return self.get(env_id, run_id, now)

    def _cancel(self, row: Row, at: datetime) -> None:
        if RunStatus(row["status"]) not in FINAL_STATUSES:
            self._free(row, "debounce_slot")
            row.update(status=RunStatus.CANCELED.value, finished_at=at, updated_at=at, due_at=None, expires_at=None)

    def add_tags(self, env_id: str, run_id: str, tags: Sequence[str], now: datetime) -> Run | None:
        """Add the tags that are new."""
        row = self._row(env_id, run_id)
        if row is not None:
            merged = list(dict.fromkeys((*row["tags"], *tags)))
            if len(merged) > MAX_TAGS:
                raise InvalidRequestError(FieldError("tags", f"a run has at most {MAX_TAGS} tags"))
            row.update(tags=merged, updated_at=now)
        return self.get(env_id, run_id, now)

    def change_metadata(
        self, env_id: str, run_id: str, operations: Sequence[MetadataOperation], now: datetime
    ) -> Run | None:
        """Apply the operations."""
        row = self._row(env_id, run_id)
        if row is not None:
            metadata = apply(row["metadata"], operations)
            check_growth(row["metadata"], metadata)
            row.update(metadata=metadata, updated_at=now)
        return self.get(env_id, run_id, now)

    def reschedule(
        self, env_id: str, run_id: str, delay: timedelta | datetime, at: datetime, now: datetime
    ) -> Run | None:
        """Move the due moment of a delayed run."""
        try:
            due_at = delay if isinstance(delay, datetime) else at + delay
        except OverflowError as error:
            raise InvalidRequestError(FieldError("delay", "lies beyond the calendar")) from error
        row = self._row(env_id, run_id)
        if row is not None:
            if row["due_at"] is None or row["due_at"] <= at:
                status = _run(row, now).status
                raise ConflictError(f"Only a delayed run can be rescheduled; this one is {status}.", "delay")
            row.update(delayed_until=due_at, due_at=due_at, expires_at=expiry(due_at, row["ttl_s"]), updated_at=now)
        return self.get(env_id, run_id, now)

    def reset(self, env_id: str, task_id: str, key: str, at: datetime, run_id: str | None) -> str | None:
        """Free an idempotency key, given a run only if that holds it; return what held it."""
        holder = self._slots.get(("idempotency_slot", env_id, task_slot(task_id, key) or b""))
        if holder is None or holder != (run_id or holder):
            return None
        row = self.rows[holder]
        expires_at: datetime | None = row["idempotency_expires_at"]
        self._free(row, "idempotency_slot")
        row.update(idempotency_expires_at=min(filter(None, (expires_at, at)), default=None), updated_at=at)
        return holder if expires_at is None or expires_at > at else None

    # --- what workers do -------------------------------------------------------------------------------------------

    def advance(self, now: datetime) -> None:
        """Expire what has waited too long, then queue what is due."""
        for row in self.rows.values():
            is_delayed = row["status"] == RunStatus.DELAYED.value
            is_waiting = is_delayed or row["status"] == RunStatus.QUEUED.value
            if is_waiting and row["expires_at"] is not None and row["expires_at"] <= now:
                self._free(row, "debounce_slot", "idempotency_slot")
                over = {"expired_at": now, "finished_at": now, "updated_at": now, "due_at": None, "expires_at": None}
                row.update(over, status=RunStatus.EXPIRED.value, error=_EXPIRED)
            elif is_delayed and row["due_at"] is not None and row["due_at"] <= now:
                self._free(row, "debounce_slot")
                row.update(status=RunStatus.QUEUED.value, due_at=None, updated_at=now)

    def start(self, run_id: str, now: datetime) -> bool:
        """Have a worker claim the run; False when it is not to be executed."""
        row = self.rows[run_id]
        is_over = row["expires_at"] is not None and row["expires_at"] <= now
        if row["status"] != RunStatus.QUEUED.value or is_over:
            return False
        row.update(status=RunStatus.EXECUTING.value, attempt_count=1, started_at=now, updated_at=now, expires_at=None)
        return True

    def finish(self, run_id: str, status: RunStatus, now: datetime) -> bool:
        """Write the outcome of an execution; False when the run has ended otherwise meanwhile."""
        row = self.rows[run_id]
        if row["status"] != RunStatus.EXECUTING.value:
            return False
        if status in KEY_FREEING_STATUSES:
            self._free(row, "idempotency_slot")
        row.update(status=status.value, finished_at=now, updated_at=now)
        return True


def _run(row: Any, now: datetime) -> Run:
    return run_of(row, now)


def _order(row: Row) -> tuple[bytes, ...]:
    """Rows go in by their keys, as into Postgres."""
    return tuple(row[name] or b"" for name in SLOTS.values())


def _is_delayed(row: Row, now: datetime) -> bool:
    return row["due_at"] is not None and row["due_at"] > now


def _push(holder: Row, row: Row, now: datetime) -> None:
    """Let a debounced trigger push the delayed run that stands for it."""
    pushed = row["created_at"] + row["debounce_delay"]
    due_at = max(holder["due_at"], min(pushed, holder["created_at"] + holder["debounce_max_delay"]))
    holder.update(delayed_until=due_at, due_at=due_at, expires_at=expiry(due_at, holder["ttl_s"]), updated_at=now)
    if row["debounce_mode"] == "trailing":
        holder.update({name: row[name] for name in REPLACED})
