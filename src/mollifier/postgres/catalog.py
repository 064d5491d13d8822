"""The tasks that exist: recorded when a worker boots, remembered by whoever triggers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert

from mollifier.postgres.database import Database
from mollifier.postgres.tables import tasks

RELOAD_INTERVAL_S = 1.0


async def record_tasks(database: Database, modules: Mapping[str, str]) -> None:
    """Record that these tasks (by id, with the module that defines each) can be executed."""
    if not modules:
        return
    # One statement: the driver's `executemany`, cancelled at the wrong moment, leaves a connection that nobody can use.
    statement = insert(tasks).values([{"id": task_id, "module": module} for task_id, module in sorted(modules.items())])
    statement = statement.on_conflict_do_update(
        index_elements=[tasks.c.id], set_={"module": statement.excluded.module, "recorded_at": func.now()}
    )
    async with database.transaction() as connection:
        await connection.execute(statement)


class PostgresTaskCatalog:
    """Implements `TaskCatalog`. A task that it has seen is known for good; for one that it has not, it looks at most once a second.

    `clock` counts seconds, from any start.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._known: frozenset[str] = frozenset()
        self._loaded_at: float | None = None
        self._loading = asyncio.Lock()

    async def knows(self, task_id: str) -> bool:
        """Return whether the task was recorded. Raises EngineUnavailableError when only the database could tell."""
        if task_id not in self._known and self._is_old():
            async with self._loading:
                if task_id not in self._known and self._is_old():
                    await self._load()
        return task_id in self._known

    def _is_old(self) -> bool:
        return self._loaded_at is None or self._clock() >= self._loaded_at + RELOAD_INTERVAL_S

    async def _load(self) -> None:
        # Taken before the question, so that a task recorded while it travels is asked for again in time.
        asked_at = self._clock()
        async with self._database.statement() as connection:
            self._known |= frozenset((await connection.execute(select(tasks.c.id))).scalars())
        self._loaded_at = asked_at
