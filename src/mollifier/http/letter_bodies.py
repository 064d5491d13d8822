"""Dead letters as the admin API shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mollifier.cursors import from_ms, from_us
from mollifier.letters import Letter, Reason
from mollifier.model import EntryKind


class LetterBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """One dead letter, as far as it is known: of one whose entry is gone there is little.

    `reason`: it was given up (`failed`), whoever handled it died too often (`reclaim_limit`), it does not read as an entry (`malformed`), the
    buffer's server let go of it (`evicted`), or it died and nothing is left to tell by (`expired`: an audit copy).
    """

    run_id: str
    reason: Reason
    error: str
    died_at: datetime
    org_id: str | None = None
    env_id: str | None = None
    task_id: str | None = None
    kind: EntryKind | None = None
    attempts: int | None = None
    reclaims: int | None = None
    accepted_at: datetime | None = None
    payload_bytes: Annotated[int | None, Meta(description="Of the entry, which holds the whole trigger")] = None


class LetterDetails(LetterBody, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """One dead letter with its payload: the trigger's, as a text of `payloadType`; or the entry's in base64, where it does not read as one."""

    payload: str | None = None
    payload_type: str | None = None
    payload_base64: str | None = None


class LetterPagination(msgspec.Struct, frozen=True, omit_defaults=True):
    """The cursor of the next page, where there may be one."""

    next: str | None = None


class LetterList(msgspec.Struct, frozen=True):
    """Dead letters, newest first."""

    data: list[LetterBody]
    pagination: LetterPagination


class RefusedBody(msgspec.Struct, frozen=True, rename="camel"):
    """Why nothing was done about one run."""

    run_id: str
    error: str


class Replayed(msgspec.Struct, frozen=True):
    """The runs that are queued again, and those that are not."""

    replayed: list[str]
    refused: list[RefusedBody]


class Deleted(msgspec.Struct, frozen=True):
    """The runs whose letters are gone, and those that had none."""

    deleted: list[str]
    refused: list[RefusedBody]


def known(letter: Letter) -> dict[str, Any]:
    """Return the fields that every mention of a dead letter tells."""
    return {
        "run_id": letter.run_id,
        "reason": letter.reason,
        "error": letter.error,
        "died_at": from_us(letter.died_at_ms * 1000),
        "org_id": letter.org_id,
        "env_id": letter.env_id,
        "task_id": letter.task_id,
        "kind": letter.kind,
        "attempts": letter.attempts,
        "reclaims": letter.reclaims,
        "accepted_at": from_ms(letter.accepted_at_ms),
        "payload_bytes": letter.payload_bytes,
    }
