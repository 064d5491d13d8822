"""Creating runs: rows and their jobs in one statement, then whatever stands in the way of those that were not inserted.

The statement inserts what conflicts with nothing and enqueues only what it inserted. For a trigger without a race that is all: one
round trip, done or not done as a whole. A row that was not inserted has met another run with its id or one of its keys. That run
is the answer; or the key has had its time and is freed, and the insert is tried again.

Rows go in by order of their slots, so that two batches with the same keys wait for each other instead of locking each other out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import TextClause, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from mollifier.engine import Created, CreateOutcome, Existing
from mollifier.errors import EngineUnavailableError
from mollifier.postgres.bytea import ByteaArray
from mollifier.postgres.debounce import leave, push
from mollifier.postgres.holders import SLOTS, Holder, Kind, find_holders, free, standing
from mollifier.postgres.jobs import defer_sql
from mollifier.postgres.tables import runs

Values = Mapping[str, Any]
ROUNDS_MAX = 10

_EXECUTIONS_OWN = {"started_at", "attempt_count", "job_id", "output", "output_type", "version"}
_COLUMNS = {name: column.type for name, column in runs.c.items() if name not in _EXECUTIONS_OWN}
_BYTES = ("payload", "context", "metadata", "error")
_PLAIN = [name for name in _COLUMNS if name not in _BYTES]
_SLOTS = frozenset(SLOTS.values())


def _insert_statement() -> TextClause:
    """Write the statement; its text is the same for any number of rows, so that the server plans it once.

    The rows travel as one JSON array, which is quickly written and read; what callers sent as bytes travels beside it, as bytes.
    """
    dialect = postgresql.dialect()
    definitions = ", ".join(f"{name} {_COLUMNS[name].compile(dialect)}" for name in _PLAIN)
    arrays = ", ".join(f"unnest(CAST(:{name} AS bytea[]))" for name in _BYTES)
    names = ", ".join((*_PLAIN, *_BYTES))
    return text(
        f"""
        WITH inserted AS (
            INSERT INTO runs ({names})
            SELECT * FROM ROWS FROM (json_to_recordset(CAST(:rows AS json)) AS ({definitions}), {arrays})
            ON CONFLICT DO NOTHING
            RETURNING id, status, queue, priority, created_at
        )
        SELECT array_agg(id) AS ids, {defer_sql("WHERE status = 'QUEUED'")} AS job_ids FROM inserted
        """  # noqa: S608 - made of the table's own column names
    )


_INSERT = _insert_statement()


async def insert_rows(connection: AsyncConnection, rows: Sequence[Values]) -> frozenset[str]:
    """Insert the rows that conflict with nothing, with the jobs of those that are queued; return the ids of the inserted."""
    parameters: dict[str, Any] = {name: ByteaArray(row[name] for row in rows) for name in _BYTES}
    parameters["rows"] = msgspec.json.encode([_plain_values(row) for row in rows]).decode()
    ids = (await connection.execute(_INSERT, parameters)).one().ids
    return frozenset(ids or ())


def _plain_values(row: Values) -> Values:
    values = {name: row[name] for name in _PLAIN if row[name] is not None}
    values.update({name: "\\x" + values[name].hex() for name in _SLOTS & values.keys()})
    return values


async def insert_free(connection: AsyncConnection, rows: Sequence[Values]) -> Mapping[int, Created]:
    """Create, in one statement, the runs of those rows that nothing stands in the way of; return their outcomes by the rows' indexes."""
    order = sorted(range(len(rows)), key=lambda index: (_order(rows[index]), index))
    inserted = set(await insert_rows(connection, [rows[index] for index in order]))
    outcomes: dict[int, Created] = {}
    for index in order:
        run_id = rows[index]["id"]
        # Of two rows with one id the first was inserted.
        if run_id in inserted:
            inserted.remove(run_id)
            outcomes[index] = Created(run_id)
    return outcomes


async def create_rows(connection: AsyncConnection, rows: Sequence[Values], now: datetime) -> Sequence[CreateOutcome]:
    """Create the runs of these rows; return one outcome per row, in order.

    One row may be created on a connection that commits each statement: none of the statements leaves anything half done. Several
    need a transaction. Raises EngineUnavailableError when keys keep changing hands under the eyes of this call.
    """
    outcomes: dict[int, CreateOutcome] = {}
    pending: list[int] = list(range(len(rows)))
    for _ in range(ROUNDS_MAX):
        created = await insert_free(connection, [rows[index] for index in pending])
        outcomes.update((pending[position], outcome) for position, outcome in created.items())
        pending = [index for index in pending if index not in outcomes]
        if pending:
            holders = await find_holders(connection, [rows[index] for index in pending])
            for index in pending:
                existing = await _settle(connection, rows[index], holders, now)
                if existing is not None:
                    outcomes[index] = existing
            pending = [index for index in pending if index not in outcomes]
        if not pending:
            return [outcomes[index] for index in range(len(rows))]
    raise EngineUnavailableError(f"the keys of these runs changed hands {ROUNDS_MAX} times; try again")


async def _settle(
    connection: AsyncConnection, row: Values, holders: Mapping[tuple[Kind, Any], Holder], now: datetime
) -> Existing | None:
    """Return the run that stands for this row; or None, the keys that had their time freed, when it may be inserted."""
    existing = standing(row, holders)
    if existing is not None:
        return existing
    for kind, name in SLOTS.items():
        holder = holders.get((kind, (row["environment_id"], row[name])))
        if holder is None:
            continue
        if kind == "debounce":
            if await push(connection, holder.run_id, row, now):
                return Existing(holder.run_id, by="debounce")
            await leave(connection, holder.run_id, now)
        else:
            await free(connection, holder.run_id, kind, row["created_at"])
    return None


def _order(row: Values) -> tuple[bytes, ...]:
    return tuple(row[name] or b"" for name in SLOTS.values())
