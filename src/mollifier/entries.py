"""Reading entries: from the fields of their hash to the struct, or to the reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from mollifier.errors import MalformedEntryError
from mollifier.model import Entry, EntryKind, EntryState


def parse(run_id: str, fields: Any, now_ms: int | None = None) -> Entry | MalformedEntryError | None:
    """Return the entry that the hash's fields say; None when the hash is empty.

    A MalformedEntryError is returned, not raised: one bad entry is a fact about it, not about its neighbours. With `now_ms`, the
    server's clock, the entry carries its dwell.
    """
    if isinstance(fields, Exception):
        return MalformedEntryError(run_id, str(fields))
    if not fields:
        return None
    named = {name.decode("utf-8", "replace"): value for name, value in cast("Mapping[bytes, bytes]", fields).items()}
    try:
        return _entry(run_id, named, now_ms)
    except KeyError as error:
        return MalformedEntryError(run_id, f"field {error} is missing")
    except ValueError as error:
        return MalformedEntryError(run_id, str(error))


class Owner(msgspec.Struct, frozen=True):
    """Whose a held entry is; `held_bytes` is what it takes, None when the entry vanished."""

    org_id: str
    env_id: str
    held_bytes: int | None


def parse_owner(record: Any) -> Owner | None:
    """Return what a record of the hash `owners` says, as `lua/lib/usage.lua` writes it; None when there is none."""
    if not isinstance(record, bytes):
        return None
    size, length, ids = record.split(b":", 2)
    env, org = ids[: int(length)], ids[int(length) :]
    return Owner(org.decode(), env.decode(), int(size) if size != b"gone" else None)


def _entry(run_id: str, fields: Mapping[str, bytes], now_ms: int | None) -> Entry:
    accepted_at_ms = int(fields["accepted_ms"])
    return Entry(
        run_id=run_id,
        env_id=fields["env"].decode(),
        org_id=fields["org"].decode(),
        kind=EntryKind(fields["kind"].decode()),
        state=EntryState(fields["state"].decode()),
        sequence=int(fields["seq"]),
        attempts=int(fields.get("attempts", b"0")),
        reclaims=int(fields.get("reclaims", b"0")),
        taken="taken" in fields,
        accepted_at_ms=accepted_at_ms,
        payload=fields["payload"],
        lease=int(fields.get("lease", b"0")),
        dwell_ms=max(0, now_ms - accepted_at_ms) if now_ms is not None else 0,
        not_before_ms=int(fields["not_before_ms"]) if "not_before_ms" in fields else None,
        patches=tuple(fields[f"patch:{index}"] for index in range(int(fields.get("patches", b"0")))),
        bindings=tuple(fields["bindings"].decode().split(",")) if "bindings" in fields else (),
        error=fields["error"].decode("utf-8", "replace") if "error" in fields else None,
    )
