"""Procrastinate's schema, and how it follows the installed release.

A fresh database gets the whole schema from a migration of ours. A release of procrastinate that changes it ships numbered SQL
scripts; those newer than the one recorded in `job_schema` are applied after our own migrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from procrastinate.schema import SchemaManager
from sqlalchemy import Connection, text


def scripts_folder() -> Path:
    """Return where the installed release keeps its scripts."""
    return Path(SchemaManager.get_migrations_path())


def scripts() -> Sequence[Path]:
    """Return the installed release's scripts, oldest first."""
    return sorted(scripts_folder().glob("*.sql"))


def newest_script() -> str:
    """Return the name of the newest script of the installed release: what a database with its whole schema is at."""
    return scripts()[-1].name


def pending_scripts(connection: Connection) -> Sequence[Path]:
    """Return the scripts that the database lacks; none when it has no jobs yet, or is ahead of the installed release."""
    if connection.execute(text("SELECT to_regclass('job_schema')")).scalar() is None:
        return []
    applied = connection.execute(text("SELECT applied FROM job_schema")).scalar_one()
    return [script for script in scripts() if script.name > applied]


def apply_script(connection: Connection, script: Path) -> None:
    """Run one script and record it, in the caller's transaction."""
    connection.exec_driver_sql(script.read_text(encoding="utf-8"), execution_options={"no_parameters": True})
    connection.execute(text("UPDATE job_schema SET applied = :name"), {"name": script.name})
