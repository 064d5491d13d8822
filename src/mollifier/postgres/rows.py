"""Snapshots and runs as rows of `runs`, and back. Nothing else knows which column holds which field."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import RowMapping

from mollifier.engine import Creation
from mollifier.expiry import EXPIRED_ERROR, expiry_of
from mollifier.model import Debounce, Run, RunError, RunProgress, RunStatus, Snapshot
from mollifier.postgres.holders import SLOTS
from mollifier.postgres.slots import request_slot, task_slot
from mollifier.postgres.tables import runs

_RENAMED = {"run_id": "id", "org_id": "organization_id", "env_id": "environment_id"}
_PLAIN = [field for field in Snapshot.__struct_fields__ if field not in {"debounce", "tags"}]
_COLUMN_OF = {field: _RENAMED.get(field, field) for field in _PLAIN}
_EMPTY: dict[str, Any] = dict.fromkeys(runs.c.keys())
_EXPIRED = msgspec.json.encode(EXPIRED_ERROR)

CHILDREN = """ARRAY(
    SELECT child.id FROM runs AS child
    WHERE child.parent_run_id = runs.id AND child.environment_id = runs.environment_id
    ORDER BY child.created_at, child.id
) AS children"""
"""The expression for the ids of a run's children; `run_of` reads them where a query selects them."""


def row_of(creation: Creation, now: datetime) -> dict[str, Any]:
    """Return the row that records the run at `now`: delayed, queued, expired when its time to live is over already, or ended."""
    row = _row_of(creation.snapshot, now)
    changed_at = creation.changed_at or creation.snapshot.created_at
    row["patch_count"] = creation.patch_count
    if creation.key_freed:
        row["idempotency_slot"] = None
    row["updated_at"] = max(changed_at, row["updated_at"])
    if (ending := creation.ending) is not None:
        row.update(
            status=ending.status.value,
            updated_at=max(changed_at, ending.at),
            finished_at=ending.at,
            error=None if ending.error is None else msgspec.json.encode(ending.error),
            due_at=None,
            expires_at=None,
            expired_at=None,
            debounce_slot=None,
        )
        row.update((SLOTS[kind], None) for kind in ending.frees)
    return row


def _row_of(snapshot: Snapshot, now: datetime) -> dict[str, Any]:
    is_delayed = snapshot.delayed_until is not None and snapshot.delayed_until > now
    expires_at = expiry_of(snapshot)
    is_expired = expires_at is not None and expires_at <= now
    status = RunStatus.EXPIRED if is_expired else RunStatus.DELAYED if is_delayed else RunStatus.QUEUED
    debounce = snapshot.debounce
    row: dict[str, Any] = _EMPTY | msgspec.structs.asdict(snapshot)
    del row["debounce"]
    for field, column in _RENAMED.items():
        row[column] = row.pop(field)
    row.update(
        status=status.value,
        # When it came about, not when it was written down: a run that was held reads as it did then.
        updated_at=expires_at if is_expired else snapshot.created_at,
        due_at=snapshot.delayed_until if is_delayed else None,
        expires_at=None if is_expired else expires_at,
        expired_at=expires_at if is_expired else None,
        finished_at=expires_at if is_expired else None,
        error=_EXPIRED if is_expired else None,
        tags=list(snapshot.tags),
        # A key whose lifetime is over before its run is created may be another run's by now.
        idempotency_slot=None
        if is_expired or _is_over(snapshot.idempotency_expires_at, now)
        else task_slot(snapshot.task_id, snapshot.idempotency_key),
        request_slot=None if _is_over(snapshot.request_key_expires_at, now) else request_slot(snapshot.request_key),
    )
    if debounce is not None:
        row.update(
            debounce_key=debounce.key,
            debounce_delay=debounce.delay,
            debounce_mode=debounce.mode,
            debounce_max_delay=debounce.max_delay,
            debounce_slot=task_slot(snapshot.task_id, debounce.key) if is_delayed else None,
        )
    return row


def _is_over(moment: datetime | None, now: datetime) -> bool:
    return moment is not None and moment <= now


def run_of(columns: RowMapping, now: datetime) -> Run:
    """Return the run of a row; a delayed one reads as queued from its due moment on, whether or not upkeep has seen it."""
    progress = progress_of(columns, now)
    return Run(
        snapshot=_snapshot_of(columns),
        status=progress.status,
        updated_at=progress.updated_at,
        started_at=utc(columns["started_at"]),
        finished_at=utc(columns["finished_at"]),
        expired_at=utc(columns["expired_at"]),
        attempt_count=columns["attempt_count"],
        output=columns["output"],
        output_type=columns["output_type"],
        error=None if columns["error"] is None else msgspec.json.decode(columns["error"], type=RunError),
        version=columns["version"],
        children=tuple(columns.get("children") or ()),
    )


def progress_of(columns: RowMapping, now: datetime) -> RunProgress:
    """Return how far the run of a row is, as `run_of` has it."""
    status = RunStatus(columns["status"])
    if status is RunStatus.DELAYED and columns["delayed_until"] <= now:
        status = RunStatus.QUEUED
    return RunProgress(status, utc(columns["updated_at"]))


def _snapshot_of(columns: RowMapping) -> Snapshot:
    fields = {field: utc(columns[column]) for field, column in _COLUMN_OF.items()}
    debounce = None
    if columns["debounce_key"] is not None:
        debounce = Debounce(
            key=columns["debounce_key"],
            delay=columns["debounce_delay"],
            mode=columns["debounce_mode"],
            max_delay=columns["debounce_max_delay"],
        )
    return Snapshot(**fields, tags=tuple(columns["tags"]), debounce=debounce)


def utc(value: Any) -> Any:
    """Give moments the standard library's UTC; leave everything else as it is."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value
