"""The table of batches in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime

from msgspec.structs import replace

from mollifier.engine import Created, CreateOutcome, Existing
from mollifier.model import Batch


class BatchTable:
    """Batches by id. Each method is one transaction, done at once."""

    def __init__(self) -> None:
        self._batches: dict[str, Batch] = {}

    def create(self, batch: Batch) -> CreateOutcome:
        """Record the batch, or tell which one stands for it."""
        existing = next(self._standing(batch), None)
        if existing is not None:
            return existing
        self._batches[batch.id] = batch
        return Created(batch.id)

    def _standing(self, batch: Batch) -> Iterator[Existing]:
        if batch.id in self._batches:
            yield Existing(batch.id, by="run_id")
        # A key that had its time is free; the last batch that took it holds it.
        others = [other for other in reversed(self._batches.values()) if other.env_id == batch.env_id]
        for other in others:
            if _holds(other.request_key, other.request_key_expires_at, batch.request_key, batch.created_at):
                yield Existing(other.id, by="request_key")
        for other in others:
            if _holds(other.idempotency_key, other.idempotency_expires_at, batch.idempotency_key, batch.created_at):
                yield Existing(other.id, by="idempotency_key")

    def get(self, env_id: str, batch_id: str) -> Batch | None:
        """Return the batch, if it is this environment's."""
        batch = self._batches.get(batch_id)
        return batch if batch is not None and batch.env_id == env_id else None

    def add_runs(self, env_id: str, batch_id: str, runs: Mapping[int, str], at: datetime) -> Batch | None:
        """Put runs at indexes that are not taken yet."""
        batch = self.get(env_id, batch_id)
        if batch is None:
            return None
        merged = dict(sorted({**runs, **batch.runs}.items()))
        self._batches[batch_id] = replace(batch, runs=merged, updated_at=max(batch.updated_at, at))
        return self._batches[batch_id]


def _holds(theirs: str | None, until: datetime | None, ours: str | None, at: datetime) -> bool:
    return ours is not None and theirs == ours and (until is None or until > at)
