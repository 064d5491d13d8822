"""Bringing the database's schema up to date, and telling how far it is.

The scripts are in `migrations/`, part of the package. Any number of processes may migrate at once: an advisory lock lets one work
and the others find nothing left to do. Schemas move forwards only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, text

from mollifier.errors import MollifierError
from mollifier.postgres.database import Database, conninfo, translated
from mollifier.postgres.job_schema import apply_script, pending_scripts

VERSION_TABLE = "mollifier_schema"
_LOCK = 0x6D6F_6C6C  # "moll"; any number that all replicas share


class SchemaError(MollifierError):
    """The database's schema is not one that this release can work with."""


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """One step that was just applied: the `number`-th of `total`."""

    name: str
    description: str
    number: int
    total: int


class SchemaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a database is: its revision (None when empty), the newest one, and what lies between, oldest first."""

    current: str | None
    head: str
    pending: tuple[str, ...]

    @property
    def is_current(self) -> bool:
        """True when nothing is left to apply."""
        return not self.pending


def migrate(database_url: str, on_progress: Callable[[Migration], None] | None = None) -> Sequence[str]:
    """Apply what is pending, each step in a transaction of its own, and return the names of the steps.

    Blocks; call `migrate_async` where an event loop runs. Raises SchemaError for a database that a newer release has migrated,
    EngineUnavailableError when the server cannot be reached.
    """
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo(database_url)), poolclass=NullPool
    )
    with translated(), engine.connect() as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
        # The lock is the session's: it outlives this transaction and goes with the connection.
        connection.commit()
        return _apply(connection, on_progress or (lambda _: None))


async def migrate_async(database_url: str, on_progress: Callable[[Migration], None] | None = None) -> Sequence[str]:
    """Do as `migrate`, in a thread; so `on_progress` is called from that thread."""
    return await asyncio.to_thread(migrate, database_url, on_progress)


async def schema_status(database: Database) -> SchemaStatus:
    """Return how far the database is. Raises SchemaError and EngineUnavailableError as `migrate` does."""
    async with database.statement() as connection:
        return await connection.run_sync(_status)


def _apply(connection: Connection, on_progress: Callable[[Migration], None]) -> Sequence[str]:
    total = len(_status(connection).pending)
    connection.commit()
    done: list[str] = []

    def report(name: str, description: str) -> None:
        done.append(name)
        on_progress(Migration(name=name, description=description, number=len(done), total=max(total, len(done))))

    def on_version_apply(*, step: Any, **_: Any) -> None:
        report(step.up_revision_id, step.up_revision.doc)

    config = alembic_config()
    config.attributes.update(connection=connection, on_version_apply=on_version_apply)
    command.upgrade(config, "head")
    for script in pending_scripts(connection):
        apply_script(connection, script)
        connection.commit()
        report(f"procrastinate {script.name}", "the jobs' schema, for the installed release of procrastinate")
    return done


def _status(connection: Connection) -> SchemaStatus:
    revisions = _revisions()
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    current = context.get_current_revision()
    if current is not None and current not in revisions:
        raise SchemaError(
            f"The database's schema is at revision {current!r}, which this release does not know: a newer Mollifier has migrated it. "
            f"Upgrade this installation; its own newest revision is {revisions[-1]!r}."
        )
    pending = revisions if current is None else revisions[revisions.index(current) + 1 :]
    jobs = [f"procrastinate {script.name}" for script in pending_scripts(connection)]
    return SchemaStatus(current=current, head=revisions[-1], pending=(*pending, *jobs))


@cache
def _revisions() -> Sequence[str]:
    """Return the revisions that this release knows, oldest first."""
    return [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]


def alembic_config() -> Config:
    """Return Alembic's view of the scripts; whoever runs them puts the connection into its attributes."""
    config = Config()
    # Alembic interpolates its options, so a percent sign in the path stands doubled.
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config
