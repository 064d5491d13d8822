"""The model's scripts of the trigger path: accepting, changing, claiming."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from tests.model.part import DOUBT, Part, claim_of, run_of
from tests.model.records import Records


class Storing(Part):
    """What callers of the buffer ask for."""

    def accept(
        self,
        *,
        entry: str,
        queue: str,
        envs: str,
        orgs: str,
        seq: str,
        held: str,
        failed: str,
        owners: str,
        usage: str,
        waiting: str,
        draining: str,
        children: str,
        binding: Sequence[str],
        run_id: str,
        env_id: str,
        org_id: str,
        kind: str,
        payload: bytes,
        ttl_ms: int,
        created_us: int,
        token: str,
        digests: str,
        wake: str,
        parent: str,
        taken: int,
        env_max_entries: int,
        env_max_bytes: int,
        org_max_entries: int,
        org_max_bytes: int,
        max_entries: int,
        max_bytes: int,
        expires_ms: Sequence[int],
    ) -> Any:
        """An entry is stored once, whole, under the next number, with all of its keys or none; a held one over an audit copy, too.

        A held one is stored where the caps leave room for it.
        """
        store = self.store
        found = store.hashes.get(entry)
        is_copied = found is not None and (found.get("kind"), kind) == (b"audit", "held")
        if found is not None and not is_copied:
            return [b"duplicate_run", run_id.encode(), 0]
        for place, key in enumerate(binding):
            holder = store.strings.get(key)
            if holder != claim_of(token) and (holder is not None or token):
                return [b"duplicate_key", run_of(holder) or b"", place]
        most = {
            "held_env_max_entries": env_max_entries,
            "held_env_max_bytes": env_max_bytes,
            "held_org_max_entries": org_max_entries,
            "held_org_max_bytes": org_max_bytes,
            "held_max_entries": max_entries,
            "held_max_bytes": max_bytes,
        }
        records = Records(store, owners, usage)
        cap = records.over_cap(run_id, len(payload), env_id, org_id, most) if kind == "held" else None
        if cap is not None:
            return [b"over_cap", cap.encode(), 0]
        number = store.increment(seq)
        if found is not None:
            store.remove(waiting, f"{found.get('seq', b'').decode()}:{run_id}")
            for names in (queue, draining, failed):
                store.remove(names, run_id)
            store.delete(entry)
        end_ms = store.now_ms + ttl_ms if ttl_ms else None
        store.hashes[entry] = {
            "state": b"QUEUED",
            "kind": kind.encode(),
            "env": env_id.encode(),
            "org": org_id.encode(),
            "seq": b"%d" % number,
            "accepted_ms": b"%d" % store.now_ms,
            "payload": payload,
        }
        store.live(entry, end_ms)
        if digests:
            store.hashes[entry]["bindings"] = digests.encode()
        if taken:
            store.hashes[entry]["taken"] = b"1"
        for key, expiry_ms in zip(binding, expires_ms, strict=True):
            store.put(key, b"run:" + run_id.encode(), expiry_ms)
        if kind == "held":
            if records.take_away(run_id):
                store.remove(failed, run_id)
            records.put(run_id, len(payload), env_id.encode(), org_id.encode())
            store.add(held, run_id, created_us, end_ms)
            if parent:
                store.add(children, run_id, int(parent), end_ms)
        if queue not in store.sets:
            store.on_publish(wake)
        store.add(queue, run_id, number, end_ms)
        self.mark_ready(envs, orgs, env_id, org_id, due_ms=store.now_ms, end_ms=end_ms)
        return [b"accepted", run_id.encode(), number]

    def patch(
        self,
        *,
        entry: str,
        owners: str,
        usage: str,
        binding: Sequence[str],
        run_id: str,
        patches: int,
        patch: bytes,
        taken: int,
    ) -> Any:
        """A change is appended to what the caller has seen, or not at all."""
        fields = self.store.hashes.get(entry)
        if fields is None or "state" not in fields:
            return b"missing"
        if fields["state"] == b"MATERIALISED":
            return b"stale"
        if (int(fields.get("patches", b"0")), "taken" in fields) != (patches, bool(taken)):
            return b"changed"
        fields[f"patch:{patches}"] = patch
        fields["patches"] = b"%d" % (patches + 1)
        Records(self.store, owners, usage).grow(run_id, len(patch))
        self.unbind(binding, run_id)
        return b"held"

    def mark(self, *, entry: str) -> Any:
        """What is held is taken from here on, whoever has it in hand."""
        fields = self.store.hashes.get(entry, {})
        if "state" not in fields:
            return b"missing"
        if fields["state"] not in (b"QUEUED", b"DRAINING"):
            return b"stale"
        fields["taken"] = b"1"
        return b"held"

    # --- the callers' keys -----------------------------------------------------------------------------------------

    def claim(self, *, binding: Sequence[str], token: str, lifetime_ms: int, lease_ms: int, void: Sequence[str]) -> Any:
        """Keys are claimed in order up to the first that another claims; one that is bound, and not in vain, answers with its run.

        Of one that its claimant has left alone for a lease nobody is the owner, until its life is over.
        """
        outcomes: list[list[bytes]] = []
        for key, void_run in zip_longest(binding, void, fillvalue=""):
            holder = self.store.strings.get(key)
            run_id = run_of(holder)
            if run_id is not None and run_id != void_run.encode():
                outcomes.append([b"bound", run_id])
            elif run_id is not None or holder in (None, claim_of(token)):
                self.store.put(key, claim_of(token), self.store.now_ms + lifetime_ms)
                outcomes.append([b"claimed", b""])
            elif holder != DOUBT and self.store.ends_ms[key] - self.store.now_ms >= lifetime_ms - lease_ms:
                return [*outcomes, [b"pending", b""]]
            else:
                # With what is left of its life, be it this one millisecond.
                self.store.strings[key] = DOUBT
                outcomes.append([b"doubted", b""])
        return outcomes

    def prolong(self, *, binding: Sequence[str], token: str, lifetime_ms: int) -> Any:
        """Only its owner begins the life of a claim anew."""
        prolonged = [key for key in binding if self.store.strings.get(key) == claim_of(token)]
        for key in prolonged:
            self.store.put(key, claim_of(token), self.store.now_ms + lifetime_ms)
        return len(prolonged)

    def release(self, *, binding: Sequence[str], token: str) -> Any:
        """Only its owner gives a claim back."""
        released = [key for key in binding if self.store.strings.get(key) == claim_of(token)]
        for key in released:
            self.store.delete(key)
        return len(set(released))
