"""Who is at work: the workers that have sent a heartbeat of late."""

from __future__ import annotations

from sqlalchemy import text

from mollifier.postgres.database import Database

SILENT_S = 20.0
"""A worker that has been silent for longer, some heartbeats, counts as gone."""

_COUNT = text(
    "SELECT count(*) FROM procrastinate_workers WHERE last_heartbeat > now() - make_interval(secs => :silent_s)"
)


async def count_workers(database: Database) -> int:
    """Return how many worker processes are alive. Raises EngineUnavailableError when the database cannot be reached."""
    async with database.statement() as connection:
        return (await connection.execute(_COUNT, {"silent_s": SILENT_S})).scalar_one()
