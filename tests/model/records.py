"""The model's records of what is held: the sums are those of the records, added up anew after every change."""

from __future__ import annotations

from collections import Counter

from tests.model.store import Store


class Records:
    """The records and the sums of one partition."""

    def __init__(self, store: Store, owners: str, usage: str) -> None:
        self._store = store
        self._owners = owners
        self._usage = usage

    def of(self, run_id: str) -> tuple[int | None, bytes, bytes] | None:
        """Return (bytes, environment, organization) of a held run; no bytes of one whose entry vanished."""
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

    def _add_up(self) -> None:
        sums: Counter[str] = Counter()
        for run_id in self._store.hashes.get(self._owners, {}):
            size, env, org = self.of(run_id) or (None, b"", b"")
            if size is not None:
                for scope in ("", f":org:{org.decode()}", f":env:{env.decode()}"):
                    sums.update({f"entries{scope}": 1, f"bytes{scope}": size})
        self._store.hashes[self._usage] = {name: b"%d" % number for name, number in (+sums).items()}
        for key in (self._usage, self._owners):
            if not self._store.hashes.get(key):
                self._store.delete(key)
