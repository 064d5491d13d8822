"""Who holds an id or a key: the question that a row which cannot be inserted asks, and that idempotency asks before the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Literal, NamedTuple

from sqlalchemy import TextClause, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mollifier.engine import Existing
from mollifier.postgres.tables import runs

Kind = Literal["run_id", "request_key", "idempotency_key", "debounce"]

SLOTS: Mapping[Kind, str] = {
    "request_key": "request_slot",
    "idempotency_key": "idempotency_slot",
    "debounce": "debounce_slot",
}
"""The column of each kind of key, in the order in which they answer."""
_FREE_AT: Mapping[Kind, str] = {"request_key": "request_key_expires_at", "idempotency_key": "idempotency_expires_at"}


class Holder(NamedTuple):
    """The run that holds an id or a key, and from when on that key is free for others (None: while the run holds it)."""

    run_id: str
    free_at: datetime | None


@cache
def _question(kinds: tuple[Kind, ...], *, many: bool) -> TextClause:
    """Write the question after holders of these kinds. Its parameters are one value each, or, for many, one array each.

    One row's question compares with plain values: Postgres plans it once, while it plans a join with arrays at each execution.
    """
    branches = [
        "SELECT 'run_id' AS kind, id, NULL AS environment_id, NULL AS slot, NULL AS free_at FROM runs WHERE id = :id"
    ]
    if many:
        branches = [branches[0].replace(":id", "ANY (:id)")]
    for kind in kinds:
        name = SLOTS[kind]
        found = f"SELECT '{kind}', id, environment_id, {name}, {_FREE_AT.get(kind, 'NULL')}"
        wanted = f"unnest(CAST(:environment AS text[]), CAST(:{name} AS bytea[])) AS wanted (environment, slot)"
        if many:
            condition = f"environment_id = environment AND {name} = slot AND {name} IS NOT NULL"
            branches.append(f"{found} FROM {wanted} JOIN runs ON {condition}")
        else:
            branches.append(f"{found} FROM runs WHERE environment_id = :environment AND {name} = :{name}")
    return text(" UNION ALL ".join(branches))


async def find_holders(
    connection: AsyncConnection, rows: Sequence[Mapping[str, Any]]
) -> Mapping[tuple[Kind, Any], Holder]:
    """Return who holds the rows' ids, by ("run_id", id), and their keys, by (kind, (environment id, slot)).

    Of each row the id, the environment and the slots are read.
    """
    kinds: tuple[Kind, ...] = tuple(kind for kind, name in SLOTS.items() if any(row[name] is not None for row in rows))
    many = len(rows) > 1
    columns = {"id": "id", "environment": "environment_id"} if kinds else {"id": "id"}
    for kind in kinds:
        columns[SLOTS[kind]] = SLOTS[kind]
    parameters = {name: [row[column] for row in rows] if many else rows[0][column] for name, column in columns.items()}
    found = (await connection.execute(_question(kinds, many=many), parameters)).mappings()
    return {
        (row["kind"], row["id"] if row["kind"] == "run_id" else (row["environment_id"], row["slot"])): Holder(
            row["id"], row["free_at"]
        )
        for row in found
    }


def standing(row: Mapping[str, Any], holders: Mapping[tuple[Kind, Any], Holder]) -> Existing | None:
    """Return the run that answers for the row by its id, its request key or its idempotency key, in that order."""
    if ("run_id", row["id"]) in holders:
        return Existing(row["id"], by="run_id")
    by: Literal["request_key", "idempotency_key"]
    for by in ("request_key", "idempotency_key"):
        holder = holders.get((by, (row["environment_id"], row[SLOTS[by]])))
        if holder is not None and (holder.free_at is None or holder.free_at > row["created_at"]):
            return Existing(holder.run_id, by=by)
    return None


async def free(connection: AsyncConnection, run_id: str, kind: Kind, at: datetime) -> None:
    """Free a run's key if its lifetime is over at that moment."""
    statement = update(runs).where(runs.c.id == run_id, runs.c[_FREE_AT[kind]] <= at)
    await connection.execute(statement.values({SLOTS[kind]: None}))
