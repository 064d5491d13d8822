"""Changes to a held run: a list of patches beside its snapshot, which no script and no other patch has to parse.

A patch is applied wherever the held run is looked at: when it is read, and when it is created. What is absolute is fixed when the
patch is made (a moment, never a delay), so that applying it later changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec
from msgspec.structs import replace

from mollifier import metadata
from mollifier.errors import ConflictError, FieldError, InvalidRequestError, NonRetryableError
from mollifier.model import MAX_TAGS, MetadataOperation, RunStatus, Snapshot


class AddTags(msgspec.Struct, frozen=True, tag="tags"):
    """Add the tags that the run does not have yet."""

    tags: tuple[str, ...]


class ChangeMetadata(msgspec.Struct, frozen=True, tag="metadata"):
    """Apply the operations, in order."""

    operations: tuple[MetadataOperation, ...]


class Reschedule(msgspec.Struct, frozen=True, tag="reschedule"):
    """Run at another moment; `at` is when this was asked for."""

    until: datetime
    at: datetime


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Never run."""

    at: datetime


class ResetKey(msgspec.Struct, frozen=True, tag="reset"):
    """Free the run's idempotency key."""

    at: datetime


Patch = AddTags | ChangeMetadata | Reschedule | Cancel | ResetKey

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Patch)


class Patched(msgspec.Struct, frozen=True):
    """A held run as its patches leave it; `cancelled_at` is the moment of its cancellation."""

    snapshot: Snapshot
    cancelled_at: datetime | None = None


def encode(patch: Patch) -> bytes:
    """Return the patch as the buffer keeps it."""
    return _encoder.encode(patch)


def decode(patches: Sequence[bytes]) -> tuple[Patch, ...]:
    """Return the patches. Raises NonRetryableError when one is not a patch."""
    try:
        return tuple(_decoder.decode(patch) for patch in patches)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NonRetryableError(f"a change of the held run cannot be read: {error}") from error


def apply_all(snapshot: Snapshot, patches: Sequence[Patch]) -> Patched:
    """Return the held run as the patches leave it."""
    patched = Patched(snapshot)
    for patch in patches:
        patched = apply(patched, patch)
    return patched


def apply(patched: Patched, patch: Patch) -> Patched:
    """Return the held run as one more patch leaves it.

    Raises InvalidRequestError or ConflictError, as the run engine does for a created run, when it cannot be applied.
    """
    snapshot = patched.snapshot
    match patch:
        case AddTags(tags):
            return replace(patched, snapshot=replace(snapshot, tags=with_tags(snapshot.tags, tags)))
        case ChangeMetadata(operations):
            document = metadata.apply(snapshot.metadata, operations)
            return replace(patched, snapshot=replace(snapshot, metadata=document))
        case Reschedule(until, at):
            if patched.cancelled_at is not None or snapshot.delayed_until is None or snapshot.delayed_until <= at:
                status = RunStatus.CANCELED if patched.cancelled_at is not None else RunStatus.QUEUED
                raise ConflictError(f"Only a delayed run can be rescheduled; this one is {status}.", "delay")
            return replace(patched, snapshot=replace(snapshot, delayed_until=until))
        case Cancel(at):
            return patched if patched.cancelled_at is not None else replace(patched, cancelled_at=at)
        case ResetKey(at):
            expires_at = min(at, snapshot.idempotency_expires_at or at)
            return replace(patched, snapshot=replace(snapshot, idempotency_expires_at=expires_at))


def with_tags(tags: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """Return the tags with what is new of `more`. Raises InvalidRequestError beyond ten in all."""
    merged = tuple(dict.fromkeys((*tags, *more)))
    if len(merged) > MAX_TAGS:
        detail = f"a run has at most {MAX_TAGS} tags; these would make it {len(merged)}"
        raise InvalidRequestError(FieldError("tags", detail))
    return merged
