"""1. The requests of batches: a whole batch in one body, or a batch announced and its items line by line (NDJSON).

An item is what a trigger is, with its task beside it. All mistakes of a body are told at once, those of an item under its index.
Headers that name keys are the request's, never its items'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mollifier.errors import FieldError, InvalidRequestError, MalformedBodyError
from mollifier.fields import Fields, read_body
from mollifier.model import Batch, BatchItem, BatchRequest, TriggerRequest
from mollifier.request import (
    REQUEST_KEY,
    TASK_ID_LENGTH_MAX,
    TRACEPARENT,
    TRACESTATE,
    TRIGGER_SOURCE,
    read_header,
    read_key,
    read_parent,
    read_trigger,
    task_id_fault,
)

ITEMS_MAX = 1_000
"""Of one body."""
RUN_COUNT_MAX = 10_000
"""Of a batch whose items come line by line."""

_OF_ITEMS = (TRACEPARENT, TRACESTATE, TRIGGER_SOURCE)

T = TypeVar("T")


def parse_batch(body: bytes, headers: Mapping[str, str]) -> tuple[BatchRequest, Sequence[TriggerRequest]]:
    """Return a batch and its items, from `{items, parentRunId?, resumeParentOnCompletion?}`. Header names are in lower case.

    Raises MalformedBodyError for a body that is not JSON, else InvalidRequestError naming every field at fault.
    """

    def read(fields: Fields) -> tuple[BatchRequest, Sequence[TriggerRequest]]:
        parent_run_id, waits = read_parent(fields)
        found = fields.required("items", lambda name: fields.objects(name, ITEMS_MAX, least=1))
        shared = _of_items(headers)
        items = [_read_item(item, shared, parent_run_id) for item in found or ()]
        request = BatchRequest(
            run_count=len(items),
            request_key=read_header(fields, headers, REQUEST_KEY),
            parent_run_id=parent_run_id,
            resume_parent_on_completion=waits,
        )
        return request, items

    return read_body(body, read)


def parse_announcement(body: bytes, headers: Mapping[str, str]) -> BatchRequest:
    """Return a batch whose items come later, from `{runCount, idempotencyKey?, parentRunId?, ...}`. Raises as `parse_batch` does."""

    def read(fields: Fields) -> BatchRequest:
        parent_run_id, waits = read_parent(fields)
        count = fields.required("runCount", lambda name: fields.integer(name, 1, RUN_COUNT_MAX))
        return BatchRequest(
            run_count=count or 0,
            idempotency_key=read_key(fields, None, parent_run_id).bound,
            request_key=read_header(fields, headers, REQUEST_KEY),
            parent_run_id=parent_run_id,
            resume_parent_on_completion=waits,
        )

    return read_body(body, read)


def parse_line(line: bytes, number: int, batch: Batch, headers: Mapping[str, str]) -> BatchItem:
    """Return an item of the batch, from the `number`-th line of a stream: `{index, task, payload?, context?, options?}`.

    Raises as `parse_batch` does; the error names the line, or the item's index once that is known.
    """

    def read(fields: Fields) -> BatchItem:
        of_line = fields.under(f"line {number}: ")
        index = of_line.required("index", lambda name: of_line.integer(name, 0, batch.run_count - 1))
        item = of_line if index is None else fields.under(f"items[{index}].")
        return BatchItem(index or 0, _read_item(item, _of_items(headers), batch.parent_run_id))

    return _read_line(line, number, read)


def _read_line(line: bytes, number: int, read: Callable[[Fields], T]) -> T:
    try:
        return read_body(line, read)
    except MalformedBodyError as error:
        raise MalformedBodyError(f"has a line {number} that {error.detail}") from error
    except InvalidRequestError as error:
        named = [FieldError(f"line {number}" if e.field == "body" else e.field, e.detail) for e in error.errors]
        raise InvalidRequestError(*named) from error


def _read_item(item: Fields, headers: Mapping[str, str], parent_run_id: str | None) -> TriggerRequest:
    task_id = item.required("task", lambda name: item.text(name, TASK_ID_LENGTH_MAX)) or ""
    fault = task_id_fault(task_id) if task_id else None
    if fault is not None:
        item.blame("task", fault)
    return read_trigger(task_id, item, headers, parent_run_id)


def _of_items(headers: Mapping[str, str]) -> Mapping[str, str]:
    return {name: headers[name] for name in _OF_ITEMS if name in headers}
