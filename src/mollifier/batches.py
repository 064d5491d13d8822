"""1. Batches: many triggers under one name, all at once or as they come in.

A batch is recorded first, then its items are triggered, then the runs that stand for them are put into the record. The items' runs
have ids that follow from the batch's (see `ids.py`), so wherever this breaks off, doing it again completes it: what exists is met, in
either store, and nothing is made twice. An item passes the gate by itself, like any trigger, unless a run waits for the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec
from msgspec.structs import replace

from mollifier import ids
from mollifier.engine import Created, Existing, RunEngine
from mollifier.errors import EngineUnavailableError, FieldError, InvalidRequestError
from mollifier.model import (
    FINAL_STATUSES,
    IDEMPOTENCY_KEY_LIFETIME,
    REQUEST_KEY_LIFETIME,
    Batch,
    BatchItem,
    BatchRequest,
    BatchStatus,
    Environment,
    TriggerRequest,
)
from mollifier.runs import Runs
from mollifier.telemetry import Emit
from mollifier.trigger import Checked, Place, TriggerService, item_place

_HELD_AT_ONCE = 100


class BatchCreated(msgspec.Struct, frozen=True):
    """A batch to put items into. `is_cached`: an idempotency key answered with one that was there."""

    batch: Batch
    is_cached: bool


class BatchAdded(msgspec.Struct, frozen=True):
    """What became of items: the batch with them, how many are new and how many it had, and what is left to do after the answer."""

    batch: Batch
    accepted: int = 0
    deduplicated: int = 0
    after_answer: tuple[Emit, ...] = ()


class BatchView(msgspec.Struct, frozen=True):
    """A batch as a reader sees it. `updated_at` is the last change to it or, once it is sealed, to one of its runs that the engine has."""

    batch: Batch
    status: BatchStatus
    updated_at: datetime


class Batches:
    """Makes and reads batches. `clock` returns the current moment in UTC.

    Every method raises EngineUnavailableError when the engine cannot be reached: it alone keeps the record.
    """

    def __init__(
        self, *, engine: RunEngine, triggers: TriggerService, runs: Runs, clock: Callable[[], datetime]
    ) -> None:
        self._engine = engine
        self._triggers = triggers
        self._runs = runs
        self._clock = clock

    async def trigger(
        self, environment: Environment, request: BatchRequest, items: Sequence[TriggerRequest]
    ) -> BatchAdded:
        """Make a batch of exactly these items; sent again with its request key, complete the one that was made.

        Raises NotFoundError for an unknown task, InvalidRequestError for an unknown parent, before anything has happened.
        """
        numbered = [BatchItem(index, item) for index, item in enumerate(items)]
        checked = await self._check(environment, numbered, request.parent_run_id)
        created = await self._record(environment, request)
        return await self._add(created.batch, numbered, checked)

    async def create(self, environment: Environment, request: BatchRequest) -> BatchCreated:
        """Make a batch without items yet. Raises InvalidRequestError for an unknown parent."""
        parent = request.parent_run_id
        if parent is not None and await self._runs.get(environment, parent) is None:
            detail = f"no run {parent!r} in this environment; give the id of the run that triggers this batch"
            raise InvalidRequestError(FieldError("parentRunId", detail))
        return await self._record(environment, request)

    async def add(self, environment: Environment, batch: Batch, items: Sequence[BatchItem]) -> BatchAdded:
        """Trigger items of the batch, but for those it has. Raises as `trigger` does; then nothing has happened to any of them."""
        return await self._add(batch, items, await self._check(environment, items, batch.parent_run_id))

    async def find(self, environment: Environment, batch_id: str) -> Batch | None:
        """Return the batch, None when this environment has no such batch."""
        return await self._engine.get_batch(environment.id, batch_id)

    async def view(self, environment: Environment, batch: Batch) -> BatchView:
        """Return how far the batch is, counting runs that are still held."""
        if not batch.sealed:
            return BatchView(batch, BatchStatus.PENDING, batch.updated_at)
        run_ids = list(dict.fromkeys(batch.runs.values()))
        progress = await self._engine.get_progress(environment.id, run_ids)
        updated_at = max([batch.updated_at, *(run.updated_at for run in progress.values())])
        has_ended = all(run.status in FINAL_STATUSES for run in progress.values())
        missing = [run_id for run_id in run_ids if run_id not in progress]
        if has_ended and await self._have_ended(environment, missing):
            return BatchView(batch, BatchStatus.COMPLETED, updated_at)
        return BatchView(batch, BatchStatus.PENDING, updated_at)

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _record(self, environment: Environment, request: BatchRequest) -> BatchCreated:
        now = self._clock()
        batch = Batch(
            id=ids.batch_id(now),
            env_id=environment.id,
            run_count=request.run_count,
            created_at=now,
            updated_at=now,
            idempotency_key=request.idempotency_key,
            idempotency_expires_at=now + IDEMPOTENCY_KEY_LIFETIME if request.idempotency_key is not None else None,
            request_key=request.request_key,
            request_key_expires_at=now + REQUEST_KEY_LIFETIME if request.request_key is not None else None,
            parent_run_id=request.parent_run_id,
            resume_parent_on_completion=request.resume_parent_on_completion,
        )
        match await self._engine.create_batch(batch):
            case Created():
                return BatchCreated(batch, is_cached=False)
            case Existing(batch_id, by):
                existing = _there(await self._engine.get_batch(environment.id, batch_id), batch_id)
                return BatchCreated(existing, is_cached=by == "idempotency_key")

    async def _check(self, environment: Environment, items: Sequence[BatchItem], parent: str | None) -> Checked:
        requests = [replace(item.request, parent_run_id=item.request.parent_run_id or parent) for item in items]
        return await self._triggers.check(environment, requests, [_place(item, parent) for item in items])

    async def _add(self, batch: Batch, items: Sequence[BatchItem], checked: Checked) -> BatchAdded:
        new = {
            item.index: _as_item(request, batch, item.index)
            for item, request in zip(reversed(items), reversed(checked.requests), strict=True)
            if item.index not in batch.runs and item.index < batch.run_count
        }
        deduplicated = len(items) - len(new)
        if not new:
            return BatchAdded(batch, deduplicated=deduplicated)
        indexes = sorted(new)
        triggered = await self._triggers.trigger_checked(
            replace(checked, requests=tuple(new[index] for index in indexes))
        )
        runs = {index: one.result.run_id for index, one in zip(indexes, triggered, strict=True)}
        emits = tuple(emit for one in triggered for emit in one.after_answer)
        try:
            stored = await self._engine.add_batch_runs(batch.env_id, batch.id, runs, self._clock())
        except Exception:
            # Entries are in the buffer whatever became of the record: an audit that misses their events would miss them.
            for emit in emits:
                emit()
            raise
        return BatchAdded(_there(stored, batch.id), len(new), deduplicated, emits)

    async def _have_ended(self, environment: Environment, run_ids: Sequence[str]) -> bool:
        """Tell whether all of these runs, which the engine did not have, have ended: as a rule they are held."""
        for start in range(0, len(run_ids), _HELD_AT_ONCE):
            some = run_ids[start : start + _HELD_AT_ONCE]
            found = await self._runs.get_many(environment, some)
            if any(run_id not in found or found[run_id].status not in FINAL_STATUSES for run_id in some):
                return False
        return True


def _place(item: BatchItem, parent: str | None) -> Place:
    """Return what errors call the item; its parent is the batch's unless it names one of its own."""
    place = item_place(item.index)
    return replace(place, parent="parentRunId") if item.request.parent_run_id in (None, parent) else place


def _as_item(request: TriggerRequest, batch: Batch, index: int) -> TriggerRequest:
    waits = batch.resume_parent_on_completion
    return replace(
        request,
        run_id=ids.item_run_id(batch.id, index),
        parent_batch=batch.id,
        resume_parent_on_completion=request.resume_parent_on_completion or waits,
        trigger_function="batchTriggerAndWait" if waits else "batchTrigger",
    )


def _there(batch: Batch | None, batch_id: str) -> Batch:
    if batch is None:
        raise EngineUnavailableError(f"the batch {batch_id} is gone from the engine; try again")
    return batch
