"""What the scripts of the model share: fencing, the ready index, the callers' keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tests.model.store import Fields, Store


class Part:
    """Some of the scripts, over one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def holds(self, entry: str, lease: int) -> bytes:
        """Only the pop that holds an entry may settle it."""
        fields = self.store.hashes.get(entry, {})
        if "state" not in fields:
            return b"missing"
        return b"held" if fields["state"] == b"DRAINING" and fields.get("lease") == b"%d" % lease else b"stale"

    def let_go(self, verdict: bytes, draining: str, run_id: str) -> bool:
        """End the lease of an entry that is held by it, or gone; tell whether it is held."""
        if verdict != b"stale":
            self.store.remove(draining, run_id)
        return verdict == b"held"

    @staticmethod
    def queue_again(fields: Fields) -> None:
        fields["state"] = b"QUEUED"
        fields.pop("lease", None)

    def unbind(self, binding: Sequence[str], run_id: str) -> None:
        for key in binding:
            if self.store.strings.get(key) == b"run:" + run_id.encode():
                self.store.delete(key)

    def end_ms(self, key: str) -> int | None:
        """The end of what the key holds; what ends in this very millisecond is given the next."""
        end_ms = self.store.ends_ms.get(key)
        return None if end_ms is None else max(end_ms, self.store.now_ms + 1)

    def mark_ready(self, envs: str, orgs: str, env: str, org: str, *, due_ms: float, end_ms: int | None) -> None:
        for key, member in ((envs, env), (orgs, org)):
            earlier = self.store.sets.get(key, {}).get(member, due_ms)
            self.store.add(key, member, min(earlier, due_ms), end_ms)

    def refresh_ready(self, queue: str, waiting: str, envs: str, orgs: str, *, env: str, org: str) -> None:
        """Let the index say of an environment, and of its organization, when the earliest is due of what is left."""
        for below, key, member in ((waiting, envs, env), (envs, orgs, org)):
            if queue in self.store.sets:
                return
            rest = self.store.sets.get(below)
            if not rest:
                self.store.remove(key, member)
            elif member in self.store.sets.get(key, {}):
                self.store.sets[key][member] = min(rest.values())

    def reads_as_entry(self, key: str, env_id: str, org_id: str) -> bool:
        fields = self.store.hashes.get(key, {})
        numbers = [
            fields.get("seq"),
            fields.get("accepted_ms"),
            fields.get("attempts", b"0"),
            fields.get("reclaims", b"0"),
        ]
        return (
            fields.get("env") == env_id.encode()
            and fields.get("org") == org_id.encode()
            and fields.get("kind") in (b"audit", b"held")
            and all(number is not None and number.isdigit() and len(number) <= 15 for number in numbers)
            and "payload" in fields
            and re.fullmatch(rb"[0-9a-fA-F,]*", fields.get("bindings", b"")) is not None
            and self.has_patches(fields)
        )

    def has_patches(self, fields: Fields) -> bool:
        number = fields.get("patches", b"0")
        return number.isdigit() and len(number) <= 15 and all(name in fields for name in self.patch_names(fields))

    @staticmethod
    def patch_names(fields: Fields) -> Iterator[str]:
        return (f"patch:{number}" for number in range(int(fields.get("patches", b"0"))))


DOUBT = b"doubt"
"""How a key reads whose claimant is taken for dead."""


def claim_of(token: str) -> bytes:
    """Return how a claimant's claim reads."""
    return b"claim:" + token.encode()


def run_of(holder: bytes | None) -> bytes | None:
    """Return the run that a key is bound to."""
    return holder.removeprefix(b"run:") if holder is not None and holder.startswith(b"run:") else None


def count(fields: Fields, name: str, number: int) -> None:
    """Add to a number of an entry; one that was never counted is not there."""
    if number:
        fields[name] = b"%d" % (int(fields.get(name, b"0")) + number)
