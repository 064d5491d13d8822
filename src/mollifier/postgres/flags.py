"""Global feature flags: rows of name and JSON value, and the copy in memory that the trigger path reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert

from mollifier.errors import FieldError, InvalidRequestError
from mollifier.model import FeatureFlags
from mollifier.postgres.background import keep
from mollifier.postgres.database import Database
from mollifier.postgres.tables import feature_flags

REFRESH_INTERVAL_S = 2.0
NAME_LENGTH_MAX = 200


class GlobalFlags:
    """The global flags, in the database and as last read.

    `current` never waits. `refresh` reads it anew; `keep_refreshing` does so every two seconds, and keeps the last value through an
    outage of the database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._current: FeatureFlags = {}

    @property
    def current(self) -> FeatureFlags:
        """The flags as last read; empty before the first reading."""
        return self._current

    async def refresh(self) -> FeatureFlags:
        """Read the flags. Raises EngineUnavailableError, `current` left as it was."""
        async with self._database.statement() as connection:
            rows = (await connection.execute(select(feature_flags).order_by(feature_flags.c.name))).all()
        self._current = {row.name: row.value for row in rows}
        return self._current

    async def set(self, values: Mapping[str, Any]) -> FeatureFlags:
        """Set these flags and leave the others; return all. Raises InvalidRequestError for a bad name."""
        rows = [{"name": checked_flag_name(name), "value": value} for name, value in sorted(values.items())]
        if rows:
            # One statement: see `record_tasks`.
            statement = insert(feature_flags).values(rows)
            statement = statement.on_conflict_do_update(
                index_elements=[feature_flags.c.name], set_={"value": statement.excluded.value}
            )
            async with self._database.transaction() as connection:
                await connection.execute(statement)
        return await self.refresh()

    async def unset(self, name: str) -> FeatureFlags:
        """Take away one flag, if it is there; return the rest."""
        async with self._database.statement() as connection:
            await connection.execute(delete(feature_flags).where(feature_flags.c.name == name))
        return await self.refresh()

    async def keep_refreshing(self, every_s: float = REFRESH_INTERVAL_S) -> None:
        """Refresh until cancelled; run it beside whatever reads `current`."""
        await keep(self.refresh, what="read feature flags", every_s=every_s)


def checked_flag_name(name: str) -> str:
    """Return the name. Raises InvalidRequestError for one that is empty, overlong or not printable."""
    if not 0 < len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise InvalidRequestError(FieldError(name[:NAME_LENGTH_MAX], "a flag's name is 1 to 200 printable characters"))
    return name
