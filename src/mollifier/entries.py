"""Reading entries: from the fields of their hash to the struct, or to the reason why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec

from mollifier.errors import MalformedEntryError
from mollifier.model import Entry, EntryKind, EntryState

_NUMBER = re.compile(rb"[0-9]{1,15}")
_DIGESTS = re.compile(rb"[0-9A-Fa-f,]*")
_KINDS = {kind.value.encode() for kind in EntryKind}
_READS: Mapping[str, Callable[[bytes], object]] = {
    **dict.fromkeys(
        ("seq", "accepted_ms", "attempts", "reclaims", "lease", "not_before_ms", "patches", "failed_ms"), int
    ),
    **dict.fromkeys(("env", "org", "kind", "state", "bindings"), bytes.decode),
}
"""How the fields read that not every value is one of."""


def parse(run_id: str, fields: Any, now_ms: int | None = None) -> Entry | MalformedEntryError | None:
    """Return the entry that the hash's fields say; None when the hash is empty.

    A MalformedEntryError is returned, not raised: one bad entry is a fact about it, not about its neighbours. With `now_ms`, the
    server's clock, the entry carries its dwell.
    """
    if isinstance(fields, Exception):
        return MalformedEntryError(run_id, str(fields))
    if not fields:
        return None
    entry = named(fields)
    try:
        return _entry(run_id, entry, now_ms)
    except KeyError as error:
        return MalformedEntryError(run_id, f"field {error} is missing")
    except ValueError:
        # The error quotes what does not read, and that may be a customer's.
        return MalformedEntryError(run_id, f"field {_unreadable(entry)!r} does not read as what it should be")


def named(fields: Any) -> Mapping[str, bytes]:
    """Return the fields of a hash by their names as text."""
    return {name.decode("utf-8", "replace"): value for name, value in cast("Mapping[bytes, bytes]", fields).items()}


def _unreadable(fields: Mapping[str, bytes]) -> str:
    """Return the name of the first field that keeps `_entry` from reading them."""
    for name, read in _READS.items():
        try:
            read(fields.get(name, b"0"))
        except ValueError:
            return name
    return "kind" if fields["kind"] not in _KINDS else "state"


def fault_in(fields: Mapping[str, bytes], org_id: str, env_id: str) -> str | None:
    """Return why these are not the fields of an entry of this environment, None when they are: as `lua/lib/entry.lua` judges."""
    if fields.get("org") != org_id.encode() or fields.get("env") != env_id.encode():
        return "fields 'org' and 'env' are not those of its environment"
    if fields.get("kind") not in _KINDS:
        return "field 'kind' is none of " + ", ".join(EntryKind)
    for name in ("seq", "accepted_ms", "attempts", "reclaims", "patches"):
        if not _NUMBER.fullmatch(fields.get(name, b"" if name in ("seq", "accepted_ms") else b"0")):
            return f"field {name!r} is not a number"
    if not _DIGESTS.fullmatch(fields.get("bindings", b"")):
        return "field 'bindings' is not a list of digests"
    needed = ("payload", *(f"patch:{number}" for number in range(int(fields.get("patches", b"0")))))
    return next((f"field {name!r} is missing" for name in needed if name not in fields), None)


def digests_of(bindings: bytes | None) -> Sequence[str]:
    """Return the digests of the keys that are bound to an entry, none where its field does not read as such."""
    return bindings.decode().split(",") if bindings and _DIGESTS.fullmatch(bindings) else ()


class Owner(msgspec.Struct, frozen=True):
    """Whose a held entry is; `held_bytes` is what it takes, None when the entry vanished."""

    org_id: str
    env_id: str
    held_bytes: int | None


def parse_owner(record: Any) -> Owner | None:
    """Return what a record of the hash `owners` says, as `lua/lib/usage.lua` writes it; None when there is none."""
    if not isinstance(record, bytes):
        return None
    try:
        size, length, ids = record.split(b":", 2)
        env, org = ids[: int(length)], ids[int(length) :]
        return Owner(org.decode(), env.decode(), int(size) if size != b"gone" else None)
    except ValueError:
        return None


def owner_of(record: Any, org: bytes | None, env: bytes | None) -> Owner | None:
    """Return whose an entry is: what its record says, or where it has none its own fields; None where neither does."""
    owner = parse_owner(record)
    if owner is not None or org is None or env is None:
        return owner
    try:
        return Owner(org.decode(), env.decode(), None)
    except UnicodeDecodeError:
        return None


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
        failed_at_ms=int(fields["failed_ms"]) if "failed_ms" in fields else None,
    )
