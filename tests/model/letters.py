"""The model's scripts of an operator's: what becomes of dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.model.part import Part
from tests.model.records import Records


class Letters(Part):
    """Replaying and deleting what died."""

    def revive(
        self,
        *,
        entry: str,
        queue: str,
        waiting: str,
        envs: str,
        orgs: str,
        draining: str,
        failed: str,
        held: str,
        owners: str,
        usage: str,
        children: str,
        run_id: str,
        env_id: str,
        org_id: str,
        created_us: int,
        parent: str,
        wake: str,
    ) -> Any:
        """A dead letter that is whole is queued again, in its place, as if it were new; a held one is counted and listed."""
        store = self.store
        if run_id not in store.sets.get(failed, {}):
            return b"missing"
        if not store.exists(entry):
            return b"gone"
        if not self.reads_as_entry(entry, env_id, org_id):
            return b"malformed"
        if self._is_alive(entry, run_id, queue=queue, waiting=waiting, draining=draining):
            return b"alive"
        fields, end_ms = store.hashes[entry], self.end_ms(entry)
        self.queue_again(fields)
        for name in ("error", "failed_ms", "attempts", "reclaims", "not_before_ms"):
            fields.pop(name, None)
        store.remove(failed, run_id)
        records = Records(store, owners, usage)
        if fields["kind"] == b"held" and not records.counts(run_id):
            size = len(fields["payload"]) + sum(len(fields[name]) for name in self.patch_names(fields))
            records.put(run_id, size, env_id.encode(), org_id.encode())
            if run_id not in store.sets.get(held, {}):
                store.add(held, run_id, created_us, end_ms)
            if parent:
                store.add(children, run_id, int(parent), end_ms)
        if queue not in store.sets:
            store.on_publish(wake)
        store.add(queue, run_id, int(fields["seq"]), end_ms)
        self.mark_ready(envs, orgs, env_id, org_id, due_ms=store.now_ms, end_ms=end_ms)
        return b"revived"

    def discard(
        self,
        *,
        entry: str,
        queue: str,
        waiting: str,
        draining: str,
        failed: str,
        held: str,
        owners: str,
        usage: str,
        children: str,
        binding: Sequence[str],
        run_id: str,
    ) -> Any:
        """Nothing is left of a dead letter; of an entry that lives, only the letter goes."""
        store = self.store
        if run_id not in store.sets.get(failed, {}):
            return b"missing"
        store.remove(failed, run_id)
        if not self._is_alive(entry, run_id, queue=queue, waiting=waiting, draining=draining):
            store.delete(entry)
            store.remove(held, run_id)
            store.remove(children, run_id)
            Records(store, owners, usage).take_away(run_id)
            self.unbind(binding, run_id)
        return b"discarded"

    def _is_alive(self, entry: str, run_id: str, *, queue: str, waiting: str, draining: str) -> bool:
        if not self.store.exists(entry):
            return False
        fields = self.store.hashes.get(entry, {})
        waits_as = f"{fields.get('seq', b'').decode(errors='replace')}:{run_id}"
        is_listed = any(
            member in self.store.sets.get(key, {})
            for key, member in ((queue, run_id), (draining, run_id), (waiting, waits_as))
        )
        state = fields.get("state")
        return state == b"MATERIALISED" or (state != b"FAILED" and is_listed)
