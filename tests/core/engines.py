"""A run engine in memory, for tests of what stands before it: it keeps what it was given, and fails when told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mollifier.engine import Created, CreateOutcome, Existing
from mollifier.model import Run, RunStatus, Snapshot


class MemoryEngine:
    """Only what the trigger path and a drain handler call; anything else is an AttributeError."""

    deadline_ms = 15_000

    def __init__(self) -> None:
        self.runs: dict[str, Snapshot] = {}
        self.fault: Exception | None = None
        self.calls = 0

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[CreateOutcome]:
        self.calls += 1
        if self.fault is not None:
            raise self.fault
        return [self._create(snapshot) for snapshot in snapshots]

    def _create(self, snapshot: Snapshot) -> CreateOutcome:
        if snapshot.run_id in self.runs:
            return Existing(snapshot.run_id, "run_id")
        if (existing := self._find(snapshot)) is not None:
            return existing
        self.runs[snapshot.run_id] = snapshot
        return Created(snapshot.run_id)

    async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
        return [self._find(snapshot) for snapshot in snapshots]

    def _find(self, snapshot: Snapshot) -> Existing | None:
        for run in self.runs.values():
            if run.env_id == snapshot.env_id:
                if snapshot.request_key is not None and run.request_key == snapshot.request_key:
                    return Existing(run.run_id, "request_key")
                key = (snapshot.task_id, snapshot.idempotency_key)
                if snapshot.idempotency_key is not None and (run.task_id, run.idempotency_key) == key:
                    return Existing(run.run_id, "idempotency_key")
        return None

    async def get_run(self, env_id: str, run_id: str) -> Run | None:
        snapshot = self.runs.get(run_id)
        if snapshot is None or snapshot.env_id != env_id:
            return None
        return Run(snapshot=snapshot, status=RunStatus.QUEUED, updated_at=snapshot.created_at)

    async def get_runs(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, Run]:
        found = {run_id: await self.get_run(env_id, run_id) for run_id in run_ids}
        return {run_id: run for run_id, run in found.items() if run is not None}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the trigger path does not call {name}")


class AnyTask:
    """A catalog that knows every task but those named `unknown...`."""

    async def knows(self, task_id: str) -> bool:
        return not task_id.startswith("unknown")
