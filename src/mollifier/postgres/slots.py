"""Slots: the fixed-size names under which Postgres keeps a run's keys unique.

A key may be 2,048 characters long, more than an index row holds, and a key that was freed must stay readable on its run. So a
digest of it stands in a column of its own: the column is unique within the environment, and empty once the key is freed.
"""

from __future__ import annotations

import hashlib


def slot(*parts: str) -> bytes:
    """Return the SHA-256 of the parts, each prefixed by its length in bytes, so that no two sequences of parts are alike."""
    digest = hashlib.sha256()
    for part in parts:
        # Half of a surrogate pair is refused where it is stored, with a message that says so; here it may pass.
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.digest()


def task_slot(task_id: str, key: str | None) -> bytes | None:
    """Return the slot of a key that belongs to a task: an idempotency or a debounce key."""
    return None if key is None else slot(task_id, key)


def request_slot(key: str | None) -> bytes | None:
    """Return the slot of a request key, which belongs to the environment alone."""
    return None if key is None else slot(key)
