"""The model's scripts of the drainer's way in: peeking, popping, and taking back from the dead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.model.part import Part, count
from tests.model.records import Records


class Taking(Part):
    """Who gets an entry, and in which order."""

    def peek(self, *, queue: str, waiting: str, limit: int) -> Any:
        """What has waited long enough is back in its place; then the oldest are named."""
        self._bring_back(queue, waiting)
        return [run_id.encode() for run_id in self.store.ordered(queue)[:limit]]

    def pop(
        self,
        *,
        queue: str,
        waiting: str,
        envs: str,
        orgs: str,
        draining: str,
        failed: str,
        seq: str,
        held: str,
        owners: str,
        usage: str,
        children: str,
        entry: Sequence[str],
        env_id: str,
        org_id: str,
        lease_ms: int,
        take: int,
        enough: int,
        run_id: Sequence[str],
    ) -> Any:
        """The oldest go out under one lease, as long as they are among the declared ones."""
        store = self.store
        entry_of = dict(zip(run_id, entry, strict=True))
        taken: list[Any] = []
        malformed: list[bytes] = []
        evicted: list[bytes] = []
        records = Records(store, owners, usage)
        dropped = lease = size = 0
        self._bring_back(queue, waiting)
        for run in store.ordered(queue)[: len(entry_of)]:
            if run not in entry_of or len(taken) == take or size >= enough:
                break
            key = entry_of[run]
            store.remove(queue, run)
            if not store.exists(key):
                if records.bury(run, env_id, org_id, held=held, children=children, failed=failed):
                    evicted.append(run.encode())
                else:
                    dropped += 1
            elif not self.reads_as_entry(key, env_id, org_id):
                store.add(failed, run, store.now_ms, self.end_ms(key))
                malformed.append(run.encode())
            else:
                fields = store.hashes[key]
                size += sum(map(len, fields.values()))
                lease = lease or store.increment(seq)
                fields.update(state=b"DRAINING", lease=b"%d" % lease, taken=b"1")
                fields.pop("not_before_ms", None)
                store.add(draining, run, store.now_ms + lease_ms, self.end_ms(key))
                taken.append([run.encode(), *(part for pair in fields.items() for part in (pair[0].encode(), pair[1]))])
        self.refresh_ready(queue, waiting, envs, orgs, env=env_id, org=org_id)
        following = [run.encode() for run in store.ordered(queue)[:take]]
        return [store.now_ms, taken, malformed, dropped, evicted, following]

    def reclaim(
        self,
        *,
        entry: str,
        queue: str,
        envs: str,
        orgs: str,
        draining: str,
        failed: str,
        held: str,
        owners: str,
        usage: str,
        children: str,
        binding: Sequence[str],
        run_id: str,
        env_id: str,
        org_id: str,
        max_reclaims: int,
    ) -> Any:
        """An entry whose lease ran out is back in its place, once; or is given up after so many times."""
        store = self.store
        deadline_ms = store.sets.get(draining, {}).get(run_id)
        if deadline_ms is None or deadline_ms > store.now_ms:
            return b"stale"
        store.remove(draining, run_id)
        if not store.exists(entry):
            was_held = Records(store, owners, usage).bury(
                run_id, env_id, org_id, held=held, children=children, failed=failed
            )
            return b"evicted" if was_held else b"missing"
        end_ms = self.end_ms(entry)
        if not self.reads_as_entry(entry, env_id, org_id):
            store.add(failed, run_id, store.now_ms, end_ms)
            return b"malformed"
        fields = store.hashes[entry]
        if fields.get("state") != b"DRAINING":
            return b"missing"
        self.queue_again(fields)
        count(fields, "reclaims", 1)
        if (reclaims := int(fields["reclaims"])) > max_reclaims:
            reason = f"ReclaimLimit: its lease ran out {reclaims} times; whoever handled it died or hung each time"
            fields.update(state=b"FAILED", error=reason.encode(), failed_ms=b"%d" % store.now_ms)
            store.add(failed, run_id, store.now_ms, end_ms)
            self.unbind(binding, run_id)
            return b"failed"
        store.add(queue, run_id, int(fields["seq"]), end_ms)
        self.mark_ready(envs, orgs, env_id, org_id, due_ms=store.now_ms, end_ms=end_ms)
        return b"held"

    def _bring_back(self, queue: str, waiting: str) -> None:
        store = self.store
        scores = store.sets.get(waiting, {})
        due = [member for member in store.ordered(waiting) if scores[member] <= store.now_ms][:1000]
        end_ms = self.end_ms(waiting) if due else None
        for member in due:
            number, _, run_id = member.partition(":")
            store.add(queue, run_id, int(number), end_ms)
        store.remove(waiting, *due)
