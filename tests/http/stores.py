"""Both stores as plain values, to see whether anything has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redis.asyncio import Redis
from sqlalchemy import text

from mollifier.postgres.database import Database

Rows = Mapping[str, Any]

_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
# When a key was used last is noted every now and then, whoever asked for what.
_ROWS = "SELECT (to_jsonb(t) - 'last_used_at')::text FROM {table} t ORDER BY 1"


async def dump(database: Database, redis: Redis) -> dict[str, Rows]:
    """Return every row of every table and every key of the buffer's server; lifetimes are left out, as they run by themselves."""
    async with database.statement() as connection:
        tables = (await connection.execute(text(_TABLES))).scalars().all()
        rows = {table: (await connection.execute(text(_ROWS.format(table=table)))).scalars().all() for table in tables}
    client: Any = redis
    keys = sorted(await client.keys("*"))
    return {"postgres": rows, "valkey": {key.decode(): await client.dump(key) for key in keys}}
