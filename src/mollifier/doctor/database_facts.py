"""Asking Postgres about itself, as whatever role the URL names: nothing here needs privileges, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable

from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text

from mollifier.doctor.facts import Address, DatabaseFacts, Reach, reach
from mollifier.errors import EngineUnavailableError
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import SchemaError, schema_status
from mollifier.postgres.presence import count_workers

_FARTHER: tuple[Reach, ...] = ("local", "private", "public")
_ASKED = text(
    """
    SELECT current_setting('server_version_num')::int AS version,
        current_setting('fsync')::bool AS fsync,
        current_setting('full_page_writes')::bool AS full_page_writes,
        current_setting('synchronous_commit') AS synchronous_commit,
        pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool AS read_only,
        current_setting('max_connections')::int AS max_connections,
        current_setting('superuser_reserved_connections')::int
            + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved_connections,
        (SELECT coalesce(sum(numbackends), 0)::int FROM pg_stat_database) AS connections,
        (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS encrypted,
        extract(epoch FROM clock_timestamp()) * 1000 AS now_ms
    """
)


async def database_facts(database: Database, clock: Callable[[], float]) -> DatabaseFacts:
    """Ask the server. `clock` returns seconds since the epoch. Raises EngineUnavailableError when it does not answer."""
    async with database.statement() as connection:
        # The connection is made by now, so the round trip is the question's alone.
        before_ms = clock() * 1000
        told = (await connection.execute(_ASKED)).one()
        after_ms = clock() * 1000
    pending: tuple[str, ...] = ()
    fault: str | None = None
    try:
        pending = (await schema_status(database)).pending
    except SchemaError as error:
        fault = str(error)
    return DatabaseFacts(
        address=_address(database, encrypted=bool(told.encrypted)),
        version=told.version // 10_000,
        fsync=told.fsync,
        full_page_writes=told.full_page_writes,
        synchronous_commit=told.synchronous_commit,
        read_only=told.read_only,
        max_connections=told.max_connections,
        reserved_connections=told.reserved_connections,
        connections=told.connections,
        ahead_ms=round(float(told.now_ms) - (before_ms + after_ms) / 2),
        margin_ms=round((after_ms - before_ms) / 2) + 1,
        pending=pending,
        schema_fault=fault,
        workers=await _workers(database),
    )


async def _workers(database: Database) -> int | None:
    """Count the workers that are alive; None where the schema does not know of any yet."""
    try:
        return await count_workers(database)
    except EngineUnavailableError:
        return None


def _address(database: Database, *, encrypted: bool) -> Address:
    """Judge by the farthest of the hosts that the URL names."""
    given = conninfo_to_dict(database.conninfo)
    hosts = str(given.get("hostaddr") or given.get("host") or "").split(",")
    farthest = _FARTHER[max(_FARTHER.index(reach(host)) for host in hosts)]
    return Address(reach=farthest, encrypted=encrypted, password=bool(given.get("password")))
