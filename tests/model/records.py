"""The model's records of what is held: the sums are those of the records, added up anew after every change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from tests.model.store import Store

Record = tuple[int | None, bytes, bytes]
"""Bytes (none of one whose entry vanished), environment, organization."""


class Records:
    """The records and the sums of one partition."""

    def __init__(self, store: Store, owners: str, usage: str) -> None:
        self._store = store
        self._owners = owners
        self._usage = usage

    def of(self, run_id: str) -> Record | None:
        """Return what is known of a held run."""
        record = self._store.hashes.get(self._owners, {}).get(run_id)
        if record is None:
            return None
        size, length, ids = record.split(b":", 2)
        return None if size == b"gone" else int(size), ids[: int(length)], ids[int(length) :]

    def counts(self, run_id: str) -> bool:
        """Tell whether the run is in the sums."""
        found = self.of(run_id)
        return found is not None and found[0] is not None

    def put(self, run_id: str, size: int | None, env: bytes, org: bytes) -> None:
        text = b"gone" if size is None else b"%d" % size
        self._store.hashes.setdefault(self._owners, {})[run_id] = b"%b:%d:%b%b" % (text, len(env), env, org)
        self._add_up()

    def grow(self, run_id: str, more: int) -> None:
        """Have a held entry take so many bytes more."""
        found = self.of(run_id)
        if found is not None and found[0] is not None:
            self.put(run_id, found[0] + more, *found[1:])

    def take_away(self, run_id: str) -> bool:
        """Forget a run; tell whether anything was known of it."""
        was_known = self._store.hashes.get(self._owners, {}).pop(run_id, None) is not None
        self._add_up()
        return was_known

    def bury(self, run_id: str, env: str, org: str, *, held: str, children: str, failed: str) -> bool:
        """Make a dead letter of a held run whose entry vanished; False when it is none, or one already."""
        found = self.of(run_id)
        was_listed = run_id in self._store.sets.get(held, {})
        self._store.remove(held, run_id)
        self._store.remove(children, run_id)
        if found is None and not was_listed:
            return False
        if found is not None and found[0] is None and run_id in self._store.sets.get(failed, {}):
            return False
        _, of_env, of_org = found or (None, env.encode(), org.encode())
        self.put(run_id, None, of_env, of_org)
        self._store.add(failed, run_id, self._store.now_ms, None)
        return True

    def over_cap(self, run_id: str, size: int, env: str, org: str, most: Mapping[str, int]) -> str | None:
        """Name the first cap that would be exceeded with this entry put, of those that are given in their order."""
        sums = self._sums({run_id: (size, env.encode(), org.encode())})
        scopes = {"held_env_max": f":env:{env}", "held_org_max": f":org:{org}", "held_max": ""}
        for cap, limit in most.items():
            scope, _, noun = cap.rpartition("_")
            if sums[f"{noun}{scopes[scope]}"] > limit:
                return cap
        return None

    def _sums(self, more: Mapping[str, Record] = MappingProxyType({})) -> Counter[str]:
        """Add up the records, with some more, or others in the place of theirs."""
        known = {run_id: self.of(run_id) for run_id in self._store.hashes.get(self._owners, {})}
        sums: Counter[str] = Counter()
        for size, env, org in filter(None, (known | dict(more)).values()):
            if size is not None:
                for scope in ("", f":org:{org.decode()}", f":env:{env.decode()}"):
                    sums.update({f"entries{scope}": 1, f"bytes{scope}": size})
        return sums

    def _add_up(self) -> None:
        self._store.hashes[self._usage] = {name: b"%d" % number for name, number in (+self._sums()).items()}
        for key in (self._usage, self._owners):
            if not self._store.hashes.get(key):
                self._store.delete(key)
