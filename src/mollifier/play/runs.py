"""What the database says of a play: the runs that its calls made, and how far they got."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import func, select, tuple_

from mollifier.model import FINAL_STATUSES
from mollifier.play.client import Marker
from mollifier.postgres.database import Database
from mollifier.postgres.tables import runs

_PAGE_RUNS = 10_000


async def find_runs(
    database: Database, env_ids: Collection[str], marker: Marker, since: datetime
) -> AsyncIterator[tuple[str, int]]:
    """Yield every run of this play in these environments with the call that asked for it."""
    after: tuple[datetime, str] = (since, "")
    query = (
        select(runs.c.created_at, runs.c.id, runs.c.tags)
        .where(runs.c.environment_id.in_(env_ids))
        .order_by(runs.c.created_at, runs.c.id)
        .limit(_PAGE_RUNS)
    )
    while True:
        async with database.statement() as connection:
            page = (await connection.execute(query.where(tuple_(runs.c.created_at, runs.c.id) > after))).all()
        for row in page:
            if (call := marker.call_of(row.tags)) is not None:
                yield row.id, call
        if len(page) < _PAGE_RUNS:
            return
        after = (page[-1].created_at, page[-1].id)


async def count_statuses(database: Database, env_ids: Collection[str], since: datetime) -> Counter[str]:
    """Return how many runs of these environments created since then are in each status."""
    query = (
        select(runs.c.status, func.count())
        .where(runs.c.environment_id.in_(env_ids), runs.c.created_at > since)
        .group_by(runs.c.status)
    )
    async with database.statement() as connection:
        return Counter(dict((await connection.execute(query)).tuples().all()))


class RunRow(NamedTuple):
    """As much of a run in the database as tells what was done with it."""

    status: str
    tags: Sequence[str]
    attempt_count: int
    started_at: datetime | None

    def started_by(self, moment: datetime) -> bool:
        """Return whether its execution had started then."""
        return self.started_at is not None and self.started_at <= moment


async def read_runs(database: Database, run_ids: Collection[str]) -> Mapping[str, RunRow]:
    """Return those of the runs that exist, by id."""
    if not run_ids:
        return {}
    query = select(runs.c.id, runs.c.status, runs.c.tags, runs.c.attempt_count, runs.c.started_at)
    async with database.statement() as connection:
        found = (await connection.execute(query.where(runs.c.id.in_(run_ids)))).all()
    return {row.id: RunRow(row.status, row.tags, row.attempt_count, row.started_at) for row in found}


def unfinished(statuses: Mapping[str, int]) -> int:
    """Return how many of these runs have not ended."""
    return sum(count for status, count in statuses.items() if status not in FINAL_STATUSES)
