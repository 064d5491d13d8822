"""The model's scripts of the drainer's way out: only the holder of a lease settles its entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.model.part import Part, count
from tests.model.records import Records


class Settling(Part):
    """What becomes of an entry that was taken."""

    def ack(
        self,
        *,
        draining: str,
        held: str,
        owners: str,
        usage: str,
        children: str,
        entries: Sequence[str],
        grace_ms: int,
        runs: Sequence[str],
    ) -> Any:
        """Each run exists: its entry can go, unless it has changed since. A run that is named twice is settled once."""
        keys = iter(entries)
        settled: set[str] = set()
        verdicts: list[bytes] = []
        for run_id, lease, patches, bindings in zip(*[iter(runs)] * 4, strict=True):
            entry, *binding = [next(keys) for _ in range(1 + int(bindings))]
            verdict = self.holds(entry, int(lease)) if run_id not in settled else b"stale"
            fields = self.store.hashes.get(entry, {})
            if verdict == b"held" and fields.get("patches", b"0") != patches.encode():
                verdict = b"changed"
            elif verdict != b"stale":
                settled.add(run_id)
                self.store.remove(held, run_id)
                self.store.remove(children, run_id)
                Records(self.store, owners, usage).take_away(run_id)
                if self.let_go(verdict, draining, run_id):
                    fields["state"] = b"MATERIALISED"
                    self.store.live(entry, self.store.now_ms + int(grace_ms))
                    self.unbind(binding, run_id)
            verdicts.append(verdict)
        return verdicts

    def requeue(
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
        lease: int,
        not_before_ms: int,
        attempts: int,
    ) -> Any:
        """The entry is back in its place, or waits outside the queue for its moment."""
        verdict = self.holds(entry, lease)
        if verdict == b"missing" and Records(self.store, owners, usage).bury(
            run_id, env_id, org_id, held=held, children=children, failed=failed
        ):
            verdict = b"evicted"
        if not self.let_go(verdict, draining, run_id):
            return verdict
        fields, end_ms = self.store.hashes[entry], self.end_ms(entry)
        self.queue_again(fields)
        count(fields, "attempts", attempts)
        number = fields["seq"].decode()
        if not_before_ms:
            fields["not_before_ms"] = b"%d" % not_before_ms
            self.store.add(waiting, f"{number}:{run_id}", not_before_ms, end_ms)
            self.mark_ready(envs, orgs, env_id, org_id, due_ms=not_before_ms, end_ms=end_ms)
        else:
            self.store.add(queue, run_id, int(number), end_ms)
            self.mark_ready(envs, orgs, env_id, org_id, due_ms=self.store.now_ms, end_ms=end_ms)
        return verdict

    def fail(
        self,
        *,
        entry: str,
        draining: str,
        failed: str,
        held: str,
        owners: str,
        usage: str,
        children: str,
        binding: Sequence[str],
        run_id: str,
        lease: int,
        error: str,
        env_id: str,
        org_id: str,
    ) -> Any:
        """The entry is given up: kept, listed, its keys free."""
        verdict = self.holds(entry, lease)
        if verdict == b"missing" and Records(self.store, owners, usage).bury(
            run_id, env_id, org_id, held=held, children=children, failed=failed
        ):
            verdict = b"evicted"
        if self.let_go(verdict, draining, run_id):
            fields = self.store.hashes[entry]
            fields.update(state=b"FAILED", error=error.encode(), failed_ms=b"%d" % self.store.now_ms)
            fields.pop("lease")
            count(fields, "attempts", 1)
            self.store.add(failed, run_id, self.store.now_ms, self.end_ms(entry))
            self.unbind(binding, run_id)
        return verdict

    def extend(self, *, entry: str, draining: str, run_id: str, lease: int, lease_ms: int) -> Any:
        """The holder's lease ends later."""
        verdict = self.holds(entry, lease)
        if verdict == b"held" and run_id in self.store.sets.get(draining, {}):
            self.store.remove(draining, run_id)
            self.store.add(draining, run_id, self.store.now_ms + lease_ms, self.end_ms(entry))
        return verdict
