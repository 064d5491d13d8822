"""Dead letters: what is known of an entry that died, from what is left of it. No I/O.

An entry dies in one of four ways, and is then listed in the set `failed` of its partition until somebody replays it or deletes it. What
it died of is not written down anywhere, for it shows in what is left: a FAILED entry was given up, with the error; one that has any
other state never read as an entry when its turn came; and of one that is gone there is at most the record that something was held.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from mollifier import snapshots
from mollifier.entries import Owner, fault_in
from mollifier.errors import NonRetryableError
from mollifier.model import EntryKind, EntryState, Snapshot

_RECLAIM_LIMIT = b"ReclaimLimit"
_EVICTED = "the buffer's server let go of its entry: the payload is lost"
_EXPIRED = "nothing is left of it: an audit copy whose time is up, or an entry that was settled after all"
_MENDED = "its entry reads as one again"
_NUMBER_DIGITS_MAX = 15


class Reason(StrEnum):
    """What an entry died of. Of an `expired` one, an audit copy as a rule, nothing is left to tell by."""

    FAILED = "failed"
    RECLAIM_LIMIT = "reclaim_limit"
    MALFORMED = "malformed"
    EVICTED = "evicted"
    EXPIRED = "expired"


class LetterPlace(NamedTuple):
    """Where a dead letter stands in lists: the moment it died, milliseconds of the server's clock, then the run's id."""

    died_at_ms: int
    run_id: str


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter. What is not known is None: of a damaged entry as much as still reads, of one that is gone hardly anything.

    Moments are milliseconds since the epoch, of the server's clock. `payload` is the entry's, opaque bytes; `task_id` is what it says.
    """

    run_id: str
    reason: Reason
    error: str
    died_at_ms: int
    org_id: str | None = None
    env_id: str | None = None
    kind: EntryKind | None = None
    attempts: int | None = None
    reclaims: int | None = None
    accepted_at_ms: int | None = None
    payload_bytes: int | None = None
    task_id: str | None = None
    payload: bytes | None = None

    @property
    def place(self) -> LetterPlace:
        """Where it stands in lists."""
        return LetterPlace(self.died_at_ms, self.run_id)


class LetterPage(msgspec.Struct, frozen=True):
    """Some dead letters, newest first, and the place beyond which there may be more."""

    letters: tuple[Letter, ...]
    next: LetterPlace | None = None


class Remains(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of an entry that died. `fields` is None when its key is gone, empty when the key holds something else.

    Where not `is_whole`, its payload, of `unread_bytes`, and its changes were too large to be read with others.
    """

    place: LetterPlace
    owner: Owner | None
    fields: Mapping[str, bytes] | None
    is_whole: bool = True
    unread_bytes: int | None = None

    @property
    def fault(self) -> str | None:
        """Why it does not read as an entry, None when it does as far as it was read."""
        if self.fields is None:
            return _EVICTED if self.owner is not None else _EXPIRED
        if not self.fields:
            return "its key holds no hash"
        if self.owner is None:
            return "fields 'org' and 'env' do not say whose it is"
        given = self.fields if self.is_whole else {**self.fields, "payload": b"", "patches": b"0"}
        return fault_in(given, self.owner.org_id, self.owner.env_id)

    @property
    def payload_bytes(self) -> int | None:
        """How large the payload is."""
        payload = (self.fields or {}).get("payload")
        return len(payload) if payload is not None else None if self.is_whole else self.unread_bytes

    @property
    def snapshot(self) -> Snapshot | None:
        """What the payload says, None when it was not read or says nothing."""
        payload = (self.fields or {}).get("payload")
        try:
            return None if payload is None else snapshots.decode(payload)
        except NonRetryableError:
            return None


def letter_of(remains: Remains) -> Letter:
    """Return the dead letter that the remains of an entry make."""
    fields = remains.fields or {}
    reason, error = _death(remains)
    kind = fields.get("kind", b"").decode("utf-8", "replace")
    snapshot = remains.snapshot
    return Letter(
        run_id=remains.place.run_id,
        reason=reason,
        error=error,
        died_at_ms=remains.place.died_at_ms,
        org_id=remains.owner and remains.owner.org_id,
        env_id=remains.owner and remains.owner.env_id,
        kind=EntryKind(kind) if kind in set(EntryKind) else None,
        attempts=_number(fields.get("attempts", b"0")) if fields else None,
        reclaims=_number(fields.get("reclaims", b"0")) if fields else None,
        accepted_at_ms=_number(fields.get("accepted_ms")),
        payload_bytes=remains.payload_bytes,
        task_id=snapshot and snapshot.task_id,
        payload=fields.get("payload"),
    )


def shown_payload(letter: Letter) -> Mapping[str, Any]:
    """Return a letter's payload by how it can be shown: as the trigger's `payload` and `payload_type`, or the entry's in base64.

    Nothing where it is not known.
    """
    if letter.payload is None:
        return {}
    try:
        snapshot = snapshots.decode(letter.payload)
        return {"payload": snapshot.payload.decode(), "payload_type": snapshot.payload_type}
    except (NonRetryableError, UnicodeDecodeError):
        return {"payload_base64": base64.b64encode(letter.payload).decode()}


def _death(remains: Remains) -> tuple[Reason, str]:
    fields = remains.fields
    if fields is None:
        return (Reason.EVICTED, _EVICTED) if remains.owner is not None else (Reason.EXPIRED, _EXPIRED)
    if fields.get("state") != EntryState.FAILED.encode():
        return Reason.MALFORMED, remains.fault or _MENDED
    error = fields.get("error", b"")
    reason = Reason.RECLAIM_LIMIT if error.startswith(_RECLAIM_LIMIT) else Reason.FAILED
    return reason, error.decode("utf-8", "replace")


def _number(text: bytes | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and len(text) <= _NUMBER_DIGITS_MAX else None
