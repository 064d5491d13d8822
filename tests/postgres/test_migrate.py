"""Migrations: from nothing, from an older schema with data in it, many at once, and not backwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine

from mollifier.errors import EngineUnavailableError, SettingsError
from mollifier.postgres import job_schema
from mollifier.postgres.database import Database, conninfo
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.job_schema import scripts
from mollifier.postgres.migrate import (
    VERSION_TABLE,
    Migration,
    SchemaError,
    alembic_config,
    migrate,
    migrate_async,
    schema_status,
)
from mollifier.postgres.tables import metadata
from tests.postgres.support import ENV, START, execute, jobs, read, rows

OWN = ["0001", "0002", "0003", "0004", "0005"]
NEWEST = OWN[-1]


def migrate_to(database_url: str, revision: str) -> None:
    """Bring the database to an older revision, as an older release has left it."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo(database_url)))
    with engine.connect() as connection:
        config = alembic_config()
        config.attributes.update(connection=connection, on_version_apply=[])
        command.upgrade(config, revision)
    engine.dispose()


def differences(connection: Connection) -> list[object]:
    def is_ours(_object: object, name: str | None, kind: str, *_: object) -> bool:
        return kind != "table" or name in metadata.tables

    options = {"compare_type": True, "compare_server_default": True, "include_object": is_ours}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


def test_an_empty_database_gets_every_step_with_progress(empty_database_url: str) -> None:
    seen: list[Migration] = []

    assert migrate(empty_database_url, seen.append) == OWN

    assert [(step.name, step.number, step.total) for step in seen] == [
        (name, number, len(OWN)) for number, name in enumerate(OWN, start=1)
    ]
    assert all(step.description for step in seen)


def test_a_current_database_gets_nothing(database_url: str) -> None:
    assert migrate(database_url) == []


async def test_migrating_works_beside_a_running_loop(empty_database_url: str) -> None:
    assert await migrate_async(empty_database_url) == OWN


async def test_many_replicas_may_migrate_at_once(empty_database_url: str) -> None:
    done = await asyncio.gather(*(migrate_async(empty_database_url) for _ in range(4)))

    assert sorted(done, key=len) == [[], [], [], OWN]


async def test_the_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    async with database.statement() as connection:
        assert await connection.run_sync(differences) == []


async def test_the_status_tells_what_is_pending(empty_database_url: str) -> None:
    async with Database(empty_database_url) as database:
        before = await schema_status(database)
        migrate_to(empty_database_url, "0001")
        between = await schema_status(database)
        await migrate_async(empty_database_url)
        after = await schema_status(database)

    assert (before.current, before.head, before.pending, before.is_current) == (None, NEWEST, tuple(OWN), False)
    assert (between.current, between.pending) == ("0001", tuple(OWN[1:]))
    assert (after.current, after.pending, after.is_current) == (NEWEST, (), True)


async def test_data_of_an_older_schema_is_kept_and_queued_runs_get_their_jobs(empty_database_url: str) -> None:
    migrate_to(empty_database_url, "0001")
    async with Database(empty_database_url) as database:
        await execute(
            database, "INSERT INTO organizations (id, name, feature_flags) VALUES ('org', 'Acme', '{\"a\": 1}')"
        )
        await execute(
            database,
            """
            INSERT INTO runs (id, organization_id, environment_id, task_id, status, created_at, updated_at, payload, payload_type,
                metadata_type, tags, priority, test, depth, resume_parent_on_completion, trigger_function)
            SELECT id, 'org', :env, 'echo', status, :now, :now, '\\x00ff', 'application/json',
                'application/json', '{a}', 3, false, 0, false, 'trigger'
            FROM (VALUES ('run_1', 'QUEUED'), ('run_2', 'COMPLETED')) AS old (id, status)
            """,
            env=ENV,
            now=START,
        )

        assert await migrate_async(empty_database_url) == OWN[1:]

        run = await read(PostgresRunEngine(database), "run_1")
        assert (run.snapshot.payload, run.snapshot.tags, run.snapshot.created_at) == (b"\x00\xff", ("a",), START)
        assert (await rows(database, "SELECT feature_flags FROM organizations")) == [{"feature_flags": {"a": 1}}]
        assert await jobs(database) == ["run_1"]
        assert await migrate_async(empty_database_url) == []


async def test_a_database_of_a_newer_release_is_refused_and_left_alone(database: Database, database_url: str) -> None:
    await execute(database, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")  # noqa: S608 - a constant

    with pytest.raises(SchemaError, match=r"'9999'.*Upgrade this installation"):
        await migrate_async(database_url)
    with pytest.raises(SchemaError):
        await schema_status(database)

    assert await rows(database, f"SELECT version_num FROM {VERSION_TABLE}") == [{"version_num": "9999"}]  # noqa: S608 - a constant


async def test_a_newer_release_of_procrastinate_brings_its_own_changes_along(
    database: Database, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for script in scripts():
        (tmp_path / script.name).write_text("SELECT 1 / 0")
    (tmp_path / "98.00.00_01_pre_one.sql").write_text("CREATE TABLE brought (percent text DEFAULT '%s'); SELECT 1;")
    (tmp_path / "98.00.00_50_post_two.sql").write_text("INSERT INTO brought DEFAULT VALUES;")
    monkeypatch.setattr(job_schema, "scripts_folder", lambda: tmp_path)
    names = ["procrastinate 98.00.00_01_pre_one.sql", "procrastinate 98.00.00_50_post_two.sql"]

    assert (await schema_status(database)).pending == tuple(names)
    assert await migrate_async(database_url) == names

    assert await rows(database, "SELECT percent FROM brought") == [{"percent": "%s"}]
    assert await migrate_async(database_url) == []


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailableError):
        migrate(f"postgresql://nobody@/nothing?host={tmp_path}")


@pytest.mark.parametrize("url", ["postgresql://host/db?bad=1", "postgresql://[::1/db"])
def test_a_url_that_cannot_be_read_names_the_variable(url: str) -> None:
    with pytest.raises(SettingsError, match="MOLLIFIER_DATABASE_URL"):
        conninfo(url)


def test_the_url_decides_where_it_says_something() -> None:
    assert "connect_timeout=5 " in conninfo("postgresql://user@/db?host=/run/postgresql")
    given = conninfo(
        "postgres://user:pass%20word@[::1]:5433/db?connect_timeout=9&options=-c%20geqo%3Doff&application_name=us"
    )
    assert "connect_timeout=9" in given
    assert "application_name=us" in given
    assert "-c geqo=off" in given
    assert "-c timezone=UTC" in given


def test_the_scripts_ship_with_the_package() -> None:
    folder = Path(job_schema.__file__).parent / "migrations"
    assert {path.name for path in folder.iterdir()} >= {"env.py", "script.py.mako", "versions"}
