"""Changes to a held run: a list of patches beside its snapshot, which no script and no other patch has to parse.

A patch is applied wherever the held run is looked at: when it is read, and when it is created. What is absolute is fixed when the
patch is made (a moment, never a delay), so that applying it later changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from mollifier import metadata
from mollifier.errors import ConflictError, FieldError, InvalidRequestError, NonRetryableError
from mollifier.expiry import expiry_of
from mollifier.model import FINAL_STATUSES, MAX_TAGS, MetadataOperation, RunStatus, Snapshot


class AddTags(msgspec.Struct, frozen=True, tag="tags"):
    """Add the tags that the run does not have yet; `at` is when this was asked for."""

    tags: tuple[str, ...]
    at: datetime | None = None


class ChangeMetadata(msgspec.Struct, frozen=True, tag="metadata"):
    """Apply the operations, in order; `at` is when this was asked for."""

    operations: tuple[MetadataOperation, ...]
    at: datetime | None = None


class Reschedule(msgspec.Struct, frozen=True, tag="reschedule"):
    """Run at another moment; `at` is when this was asked for."""

    until: datetime
    at: datetime


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Never run, unless the run has ended by `at`."""

    at: datetime


class ResetKey(msgspec.Struct, frozen=True, tag="reset"):
    """Free the run's idempotency key."""

    at: datetime


Patch = AddTags | ChangeMetadata | Reschedule | Cancel | ResetKey

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Patch)


class Patched(msgspec.Struct, frozen=True):
    """A held run as its patches leave it; `cancelled_at` is the moment of its cancellation, `changed_at` of its last change.

    `key_freed`: its idempotency key was freed. That the key's life ended then shows too, but clocks differ: to that of another process
    the moment may not have come yet.
    `has_failed`: it was given up, and will not be created.
    """

    snapshot: Snapshot
    key_freed: bool = False
    cancelled_at: datetime | None = None
    changed_at: datetime | None = None
    has_failed: bool = False


def commutes(patch: Patch) -> bool:
    """Return whether it comes to the same whenever the patch is applied, before or after others, and however often."""
    return isinstance(patch, AddTags | ResetKey)


def encode(patch: Patch) -> bytes:
    """Return the patch as the buffer keeps it."""
    return _encoder.encode(patch)


def decode(patches: Sequence[bytes]) -> tuple[Patch, ...]:
    """Return the patches. Raises NonRetryableError when one is not a patch."""
    try:
        return tuple(_decoder.decode(patch) for patch in patches)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NonRetryableError(f"a change of the held run cannot be read: {error}") from error


def readable(patches: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return those that are patches: what can still be told of a run that cannot be read further."""
    return tuple(patch for patch in patches if _is_readable(patch))


def _is_readable(patch: bytes) -> bool:
    try:
        decode([patch])
    except NonRetryableError:
        return False
    return True


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
        case AddTags(tags, at):
            return _changed(patched, at, tags=with_tags(snapshot.tags, tags))
        case ChangeMetadata(operations, at):
            return _changed(patched, at, metadata=metadata.apply(snapshot.metadata, operations))
        case Reschedule(until, at):
            status = status_at(patched, at)
            if status is not RunStatus.DELAYED:
                raise ConflictError(f"Only a delayed run can be rescheduled; this one is {status}.", "delay")
            return _changed(patched, at, delayed_until=until)
        case Cancel(at):
            if status_at(patched, at) in FINAL_STATUSES:
                return patched
            return replace(_changed(patched, at), cancelled_at=at)
        case ResetKey(at):
            freed = replace(patched, key_freed=True)
            return _changed(freed, at, idempotency_expires_at=min(at, snapshot.idempotency_expires_at or at))


def status_at(patched: Patched, at: datetime) -> RunStatus:
    """Return the status that the held run has at this moment, as it would have if it had been created."""
    snapshot = patched.snapshot
    if patched.cancelled_at is not None:
        return RunStatus.CANCELED
    if patched.has_failed:
        return RunStatus.SYSTEM_FAILURE
    expires_at = expiry_of(snapshot)
    if expires_at is not None and expires_at <= at:
        return RunStatus.EXPIRED
    is_delayed = snapshot.delayed_until is not None and snapshot.delayed_until > at
    return RunStatus.DELAYED if is_delayed else RunStatus.QUEUED


def _changed(patched: Patched, at: datetime | None, **fields: Any) -> Patched:
    """Return the run with these fields of its snapshot; clocks differ, so that its last change is the latest, not the last made."""
    changed_at = max(filter(None, (at, patched.changed_at)), default=None)
    return replace(patched, snapshot=replace(patched.snapshot, **fields), changed_at=changed_at)


def with_tags(tags: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """Return the tags with what is new of `more`. Raises InvalidRequestError beyond ten in all."""
    merged = tuple(dict.fromkeys((*tags, *more)))
    if len(merged) > MAX_TAGS:
        detail = f"a run has at most {MAX_TAGS} tags; these would make it {len(merged)}"
        raise InvalidRequestError(FieldError("tags", detail))
    return merged
