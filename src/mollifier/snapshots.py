"""Snapshots: taken of a request at its moment, and as bytes.

The bytes are MessagePack with field names and without defaults, so that they are few and fields can be added later.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeVar

import msgspec

from mollifier.errors import NonRetryableError
from mollifier.model import (
    IDEMPOTENCY_KEY_LIFETIME,
    REQUEST_KEY_LIFETIME,
    Environment,
    Run,
    Snapshot,
    TriggerRequest,
)

_Read = TypeVar("_Read")

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Snapshot)


class _Trace(msgspec.Struct):
    traceparent: str | None = None
    tracestate: str | None = None


_trace_decoder = msgspec.msgpack.Decoder(_Trace)


def take_snapshot(
    environment: Environment, request: TriggerRequest, parent: Run | None, run_id: str, now: datetime
) -> Snapshot:
    """Fix the request at this moment: relative times become absolute, the parent's place in its tree is noted."""
    delay = request.debounce.delay if request.debounce else request.delay
    idempotent = request.idempotency_key is not None
    return Snapshot(
        run_id=run_id,
        org_id=environment.org_id,
        env_id=environment.id,
        task_id=request.task_id,
        created_at=now,
        payload=request.payload,
        payload_type=request.payload_type,
        context=request.context,
        metadata=request.metadata,
        metadata_type=request.metadata_type,
        tags=request.tags,
        idempotency_key=request.idempotency_key,
        idempotency_key_shown=request.idempotency_key_shown,
        idempotency_expires_at=now + (request.idempotency_lifetime or IDEMPOTENCY_KEY_LIFETIME) if idempotent else None,
        request_key=request.request_key,
        request_key_expires_at=now + REQUEST_KEY_LIFETIME if request.request_key is not None else None,
        delayed_until=now + delay if isinstance(delay, timedelta) else delay,
        ttl_s=int(request.ttl.total_seconds()) if request.ttl else None,
        debounce=request.debounce,
        queue=request.queue,
        concurrency_key=request.concurrency_key,
        priority=request.priority,
        machine=request.machine,
        region=request.region,
        max_attempts=request.max_attempts,
        max_duration_s=request.max_duration_s,
        test=request.test,
        lock_to_version=request.lock_to_version,
        external_deployment_id=request.external_deployment_id,
        bulk_action_id=request.bulk_action_id,
        parent_run_id=request.parent_run_id,
        root_run_id=(parent.snapshot.root_run_id or parent.id) if parent else None,
        depth=parent.snapshot.depth + 1 if parent else 0,
        resume_parent_on_completion=request.resume_parent_on_completion,
        batch_id=request.parent_batch,
        trigger_function=request.trigger_function,
        trigger_source=request.trigger_source,
        replayed_from=request.replayed_from,
        traceparent=request.traceparent,
        tracestate=request.tracestate,
    )


def encode(snapshot: Snapshot) -> bytes:
    """Return the payload of the snapshot's entry."""
    return _encoder.encode(snapshot)


def decode(payload: bytes) -> Snapshot:
    """Return the snapshot. Raises NonRetryableError when the bytes are not one: no retry can change that."""
    return _decoded(_decoder, payload)


def trace_of(payload: bytes) -> tuple[str | None, str | None]:
    """Return the snapshot's (traceparent, tracestate) and read nothing else of it. Raises NonRetryableError as `decode` does."""
    trace = _decoded(_trace_decoder, payload)
    return trace.traceparent, trace.tracestate


def _decoded(decoder: msgspec.msgpack.Decoder[_Read], payload: bytes) -> _Read:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NonRetryableError(f"the payload is not a snapshot: {error}") from error
