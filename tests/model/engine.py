"""A run engine in memory that does what every run engine must: it passes the conformance suite that the Postgres one passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from mollifier.engine import CreateOutcome, Creation, Existing
from mollifier.model import Batch, MetadataOperation, Run, RunFilter, RunPage, RunProgress, Snapshot
from mollifier.patches import Patch
from tests.model.batch_table import BatchTable
from tests.model.runs import RunTable


class MemoryRunEngine:
    """Implements `RunEngine` on tables in memory, which several of them may share; each answers at once.

    `clock` is that of the process that has this one.
    """

    deadline_ms = 15_000

    def __init__(
        self, clock: Callable[[], datetime], runs: RunTable | None = None, batches: BatchTable | None = None
    ) -> None:
        self.clock = clock
        self.runs = runs or RunTable()
        self.batches = batches or BatchTable()

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[CreateOutcome]:
        return self.runs.create([Creation(snapshot=snapshot) for snapshot in snapshots], self.clock())

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        return self.runs.create(creations, self.clock())

    async def carry_over(self, env_id: str, run_id: str, changes: Sequence[Patch]) -> Run | None:
        return self.runs.carry_over(env_id, run_id, changes, self.clock())

    async def find_by_keys(self, snapshot: Snapshot) -> Existing | None:
        return self.runs.find(snapshot)

    async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
        return [self.runs.find(snapshot) for snapshot in snapshots]

    async def get_run(self, env_id: str, run_id: str) -> Run | None:
        return self.runs.get(env_id, run_id, self.clock())

    async def get_runs(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, Run]:
        return self.runs.get_many(env_id, run_ids, self.clock())

    async def get_children(self, env_id: str, run_id: str, limit: int) -> Sequence[str]:
        return self.runs.children(env_id, run_id)[:limit]

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        return self.runs.progress(env_id, run_ids, self.clock())

    async def list_runs(self, env_id: str, query: RunFilter) -> RunPage:
        return self.runs.page(env_id, query, self.clock())

    async def cancel_run(self, env_id: str, run_id: str, at: datetime) -> Run | None:
        return self.runs.cancel(env_id, run_id, at, self.clock())

    async def add_tags(self, env_id: str, run_id: str, tags: Sequence[str]) -> Run | None:
        return self.runs.add_tags(env_id, run_id, tags, self.clock())

    async def change_metadata(self, env_id: str, run_id: str, operations: Sequence[MetadataOperation]) -> Run | None:
        return self.runs.change_metadata(env_id, run_id, operations, self.clock())

    async def reschedule_run(self, env_id: str, run_id: str, delay: timedelta | datetime, at: datetime) -> Run | None:
        return self.runs.reschedule(env_id, run_id, delay, at, self.clock())

    async def reset_idempotency_key(
        self, env_id: str, task_id: str, key: str, at: datetime, *, run_id: str | None = None
    ) -> str | None:
        return self.runs.reset(env_id, task_id, key, at, run_id)

    async def create_batch(self, batch: Batch) -> CreateOutcome:
        return self.batches.create(batch)

    async def get_batch(self, env_id: str, batch_id: str) -> Batch | None:
        return self.batches.get(env_id, batch_id)

    async def add_batch_runs(self, env_id: str, batch_id: str, runs: Mapping[int, str], at: datetime) -> Batch | None:
        return self.batches.add_runs(env_id, batch_id, runs, at)
