"""Carrying over what was changed while a run was held: as columns of the row that stands for it now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mollifier import metadata
from mollifier.errors import InvalidRequestError
from mollifier.expiry import expiry
from mollifier.patches import AddTags, Cancel, ChangeMetadata, Patch, Reschedule, ResetKey, with_tags


def carried(row: Mapping[str, Any], changes: Sequence[Patch], now: datetime) -> dict[str, Any]:
    """Return the columns to write, for changes that were accepted while the run was held.

    One that the run has outgrown since (a delay that is over, an eleventh tag) is dropped: its caller was answered for the run as
    it was then. A cancellation changes more than this row, and its status is left to `cancel_run`; whatever came before or after it, the
    columns have the run wait neither to be due nor to expire.
    """
    values: dict[str, Any] = {}
    for change in changes:
        current = {**row, **values}
        match change:
            case AddTags(tags):
                values.update(_tags(current, tags))
            case ChangeMetadata(operations):
                values.update(_metadata(current, operations))
            case Reschedule(until) if current["due_at"] is not None and current["due_at"] > now:
                values.update(delayed_until=until, due_at=until, expires_at=expiry(until, current["ttl_s"]))
            case ResetKey(at):
                expires_at = min(filter(None, (at, current["idempotency_expires_at"])))
                values.update(idempotency_slot=None, idempotency_expires_at=expires_at)
            case Cancel():
                # One that had ended before waits for neither in any case.
                values.update(due_at=None, expires_at=None)
            case Reschedule():
                pass
        values["updated_at"] = max(filter(None, (change.at, current["updated_at"])))
    return values


def _tags(row: Mapping[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    try:
        return {"tags": list(with_tags(row["tags"], tags))}
    except InvalidRequestError:
        return {}


def _metadata(row: Mapping[str, Any], operations: Any) -> dict[str, Any]:
    try:
        return {"metadata": metadata.apply(row["metadata"], operations)}
    except InvalidRequestError:
        return {}
