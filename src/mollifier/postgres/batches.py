"""Batches and the runs that stand for their items.

A batch is one row, however many items it has: which of them are there is a set of ranges, and the runs they made have ids that
follow from the batch's. Only a run that a key answered with has a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from mollifier.engine import Created, CreateOutcome, Existing
from mollifier.errors import EngineUnavailableError
from mollifier.ids import item_run_id
from mollifier.model import Batch
from mollifier.postgres.rows import utc
from mollifier.postgres.slots import request_slot
from mollifier.postgres.tables import batches

ROUNDS_MAX = 10

_PLAIN = [name for name in Batch.__struct_fields__ if name not in {"env_id", "runs"}]
_WRITTEN = [name for name in batches.c.keys() if name != "received"]  # noqa: SIM118 - columns iterate as columns

_INSERT = text(
    f"""
    INSERT INTO batches ({", ".join(_WRITTEN)}) VALUES ({", ".join(f":{name}" for name in _WRITTEN)})
    ON CONFLICT DO NOTHING RETURNING id
    """  # noqa: S608 - made of the table's own column names
)
_HOLDERS = text(
    """
    SELECT id, idempotency_slot, idempotency_expires_at, request_slot, request_key_expires_at FROM batches
    WHERE id = :id OR environment_id = :environment_id AND (
        idempotency_slot = CAST(:idempotency_slot AS bytea) OR request_slot = CAST(:request_slot AS bytea)
    )
    """
)
_FREE = text(
    """
    UPDATE batches SET
        idempotency_slot = CASE WHEN idempotency_expires_at > :created_at THEN idempotency_slot END,
        request_slot = CASE WHEN request_key_expires_at > :created_at THEN request_slot END
    WHERE environment_id = :environment_id AND (
        idempotency_slot = CAST(:idempotency_slot AS bytea) AND idempotency_expires_at <= :created_at
        OR request_slot = CAST(:request_slot AS bytea) AND request_key_expires_at <= :created_at
    )
    """
)
_OTHERS = """(
    SELECT json_object_agg(index, run_id) FROM batch_runs WHERE batch_id = batches.id
) AS others"""
_READ = text(f"SELECT batches.*, {_OTHERS} FROM batches WHERE id = :id AND environment_id = :environment_id")  # noqa: S608 - constants
# The lock makes calls for one batch follow each other; each then sees what those before it put in.
_ADD = text(
    f"""
    WITH locked AS (
        SELECT received FROM batches WHERE id = :id AND environment_id = :environment_id FOR UPDATE
    ), new AS (
        SELECT index, run_id FROM locked, unnest(CAST(:indexes AS integer[]), CAST(:run_ids AS text[])) AS given (index, run_id)
        WHERE NOT received @> index
    ), other AS (
        INSERT INTO batch_runs (batch_id, index, run_id)
        SELECT :id, index, run_id FROM new WHERE index = ANY (CAST(:others AS integer[]))
        RETURNING index, run_id
    )
    UPDATE batches SET
        received = received + coalesce((SELECT range_agg(int4range(index, index + 1)) FROM new), '{{}}'),
        updated_at = greatest(updated_at, :at)
    WHERE id = :id AND environment_id = :environment_id
    RETURNING batches.*, {_OTHERS}, (SELECT json_object_agg(index, run_id) FROM other) AS new_others
    """  # noqa: S608 - made of constants
)


async def create_batch(connection: AsyncConnection, batch: Batch) -> CreateOutcome:
    """Insert the batch, or tell which one stands for it; one round trip where nothing is in the way.

    Each statement may commit by itself. Raises EngineUnavailableError when keys keep changing hands under the eyes of this call.
    """
    row = {name: getattr(batch, name) for name in _PLAIN} | {
        "environment_id": batch.env_id,
        "idempotency_slot": request_slot(batch.idempotency_key),
        "request_slot": request_slot(batch.request_key),
    }
    for _ in range(ROUNDS_MAX):
        if (await connection.execute(_INSERT, row)).scalar() is not None:
            return Created(batch.id)
        holders = (await connection.execute(_HOLDERS, row)).mappings().all()
        existing = next(_standing(row, holders), None)
        if existing is not None:
            return existing
        await connection.execute(_FREE, row)
    raise EngineUnavailableError(f"the keys of this batch changed hands {ROUNDS_MAX} times; try again")


async def read_batch(connection: AsyncConnection, env_id: str, batch_id: str) -> Batch | None:
    """Read the batch, in one round trip."""
    found = await connection.execute(_READ, {"id": batch_id, "environment_id": env_id})
    row = found.mappings().one_or_none()
    return None if row is None else _batch_of(row)


async def add_runs(
    connection: AsyncConnection, env_id: str, batch_id: str, runs: Mapping[int, str], at: datetime
) -> Batch | None:
    """Put the runs in, in one round trip."""
    parameters = {
        "id": batch_id,
        "environment_id": env_id,
        "indexes": list(runs),
        "run_ids": list(runs.values()),
        "others": [index for index, run_id in runs.items() if run_id != item_run_id(batch_id, index)],
        "at": at,
    }
    row = (await connection.execute(_ADD, parameters)).mappings().one_or_none()
    return None if row is None else _batch_of(row)


def _standing(row: Mapping[str, Any], holders: Any) -> Iterator[Existing]:
    """Yield the batches that answer for the row, by its id, its request key and its idempotency key, in that order."""
    at = row["created_at"]
    for holder in holders:
        if holder["id"] == row["id"]:
            yield Existing(holder["id"], by="run_id")
    for holder in holders:
        if _holds(holder, "request_slot", row) and holder["request_key_expires_at"] > at:
            yield Existing(holder["id"], by="request_key")
    for holder in holders:
        if _holds(holder, "idempotency_slot", row) and holder["idempotency_expires_at"] > at:
            yield Existing(holder["id"], by="idempotency_key")


def _holds(holder: RowMapping, slot: str, row: Mapping[str, Any]) -> bool:
    return row[slot] is not None and holder[slot] == row[slot]


def _batch_of(row: RowMapping) -> Batch:
    indexes = [index for span in row["received"] for index in range(span.lower, span.upper)]
    others: dict[str, str] = {**(row["others"] or {}), **(row.get("new_others") or {})}
    runs = {index: others.get(str(index)) or item_run_id(row["id"], index) for index in indexes}
    return Batch(**{name: utc(row[name]) for name in _PLAIN}, env_id=row["environment_id"], runs=runs)
