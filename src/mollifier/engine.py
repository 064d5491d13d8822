"""5. The run engine: what records a run and has it executed. This is the protocol; `postgres/` implements it.

Operations that the drain path needs take many at once, one being the special case. Every read and every change is scoped to an
environment: a run of another environment does not exist. An implementation raises EngineUnavailableError when its store cannot
be reached; any other exception speaks of the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, Protocol

import msgspec

from mollifier.model import (
    Batch,
    MetadataOperation,
    Run,
    RunError,
    RunFilter,
    RunPage,
    RunProgress,
    RunStatus,
    Snapshot,
)
from mollifier.patches import Patch

KeyKind = Literal["request_key", "idempotency_key"]
"""The two kinds of keys by which a caller's trigger may be answered with a run that is there."""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """The final status a run is created in, when its end was decided before it could be created.

    It holds all of its keys but those in `frees`. A run that its caller cancelled keeps them; one that failed frees its idempotency
    key, as a created one does; one that lost a key to another run has to go without it.
    """

    status: Literal[RunStatus.CANCELED, RunStatus.SYSTEM_FAILURE]
    at: datetime
    error: RunError | None = None
    frees: tuple[KeyKind, ...] = ()


class Creation(msgspec.Struct, frozen=True, kw_only=True):
    """One run to create. `patch_count` says how many changes made while it was held are in the snapshot already.

    `changed_at` is the moment of the last of them. `key_freed`: one of them freed its idempotency key, by whichever clock.
    """

    snapshot: Snapshot
    ending: Ending | None = None
    key_freed: bool = False
    patch_count: int = 0
    changed_at: datetime | None = None


class Created(msgspec.Struct, frozen=True):
    """The run (or the batch) exists now because of this call."""

    run_id: str


class Existing(msgspec.Struct, frozen=True):
    """Nothing was created: this run (or batch) already stands for what was to be created, for the reason in `by`.

    `run_id`: the id itself exists (the snapshot was handed over twice). `debounce`: its delay was pushed.
    """

    run_id: str
    by: Literal["run_id", "idempotency_key", "request_key", "debounce"]


CreateOutcome = Created | Existing


class RunEngine(Protocol):
    """What Mollifier asks of a run engine. All moments are UTC."""

    @property
    def deadline_ms(self) -> int:
        """How long one call may take, milliseconds: after that its store is one that cannot be reached."""
        ...

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[CreateOutcome]:
        """Create the runs and have them executed, atomically; answer one outcome per snapshot, in order.

        The engine's unique constraints are the last arbiter of races: on run id, on (environment, task, idempotency key), on
        (environment, request key), and on (environment, task, debounce key) while that run is still delayed.
        A key whose lifetime is over at the snapshot's `created_at` is free.
        """
        ...

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        """Create runs that were held, as `create_runs` does. One with an ending is created ended and is never executed."""
        ...

    async def carry_over(self, env_id: str, run_id: str, changes: Sequence[Patch]) -> Run | None:
        """Apply those of a held run's changes that the created run does not have in it yet; exactly once, however often it is called."""
        ...

    async def find_by_keys(self, snapshot: Snapshot) -> Existing | None:
        """Return the run that the snapshot's request key or idempotency key is bound to at its `created_at`, if any."""
        ...

    async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
        """Look the keys of many snapshots up as `find_by_keys` does, in one round trip; one answer each, in order."""
        ...

    async def get_run(self, env_id: str, run_id: str) -> Run | None:
        """Return the run, with its children's ids, or None when this environment has no such run."""
        ...

    async def get_runs(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, Run]:
        """Return those of the runs that this environment has, by id, without their children's ids; one round trip."""
        ...

    async def get_children(self, env_id: str, run_id: str, limit: int) -> Sequence[str]:
        """Return the ids of the runs that this one triggered, oldest first, whether or not it exists here itself; one round trip."""
        ...

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        """Return how far those of the runs are that this environment has, by id; one round trip that carries no payloads."""
        ...

    async def list_runs(self, env_id: str, query: RunFilter) -> RunPage:
        """Return one page of the environment's runs. Raises InvalidRequestError for a cursor it did not make."""
        ...

    async def cancel_run(self, env_id: str, run_id: str, at: datetime) -> Run | None:
        """Cancel the run unless it has ended; return it as it then stands, or None when there is none."""
        ...

    async def add_tags(self, env_id: str, run_id: str, tags: Sequence[str]) -> Run | None:
        """Add tags it does not have yet. Raises InvalidRequestError (field `tags`) beyond ten in all."""
        ...

    async def change_metadata(self, env_id: str, run_id: str, operations: Sequence[MetadataOperation]) -> Run | None:
        """Apply the operations in order, atomically: concurrent changes never lose one."""
        ...

    async def reschedule_run(self, env_id: str, run_id: str, delay: timedelta | datetime, at: datetime) -> Run | None:
        """Move a delayed run to `delay` (from `at` when a duration). Raises ConflictError when it is not delayed."""
        ...

    async def reset_idempotency_key(
        self, env_id: str, task_id: str, key: str, at: datetime, *, run_id: str | None = None
    ) -> str | None:
        """Free the key, with `run_id` only if that run holds it; return the run that held it, None when none did."""
        ...

    async def create_batch(self, batch: Batch) -> CreateOutcome:
        """Record the batch, without its runs; or answer with the one that its id, its request key or its idempotency key belongs to.

        Both keys are the environment's. A key whose lifetime is over at the batch's `created_at` is free.
        """
        ...

    async def get_batch(self, env_id: str, batch_id: str) -> Batch | None:
        """Return the batch with its runs, or None when this environment has no such batch."""
        ...

    async def add_batch_runs(self, env_id: str, batch_id: str, runs: Mapping[int, str], at: datetime) -> Batch | None:
        """Put runs at indexes of the batch; one that is taken keeps its run. Return the batch, or None when there is none."""
        ...


class TaskCatalog(Protocol):
    """Which tasks exist: those that a worker recorded at boot."""

    async def knows(self, task_id: str) -> bool:
        """Return whether the task can be triggered; answers from memory for every task it has seen."""
        ...
