"""The model's scripts of the sweeper: what stands in the wrong place, or nowhere, is put right, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.model.part import Part, claim_of
from tests.model.records import Records
from tests.model.store import Fields


class Mending(Part):
    """What a sweep puts right."""

    def repair(self, *, queue: str, waiting: str, envs: str, orgs: str, env_id: str, org_id: str) -> Any:
        """The index names who has something, no later than it is due, and nobody else."""
        sets = self.store.sets
        moments = [*sets.get(waiting, {}).values()]
        due_ms = self.store.now_ms if queue in sets else min(moments, default=None)
        environment = self._stand(envs, env_id, due_ms, self._last_end_ms(queue, waiting))
        earliest_ms = min(sets.get(envs, {}).values(), default=None)
        return [environment, self._stand(orgs, org_id, earliest_ms, self._last_end_ms(envs))]

    def _stand(self, index: str, member: str, due_ms: float | None, end_ms: int | None) -> bytes:
        stands_at_ms = self.store.sets.get(index, {}).get(member)
        if due_ms is None:
            self.store.remove(index, member)
            return b"" if stands_at_ms is None else b"empty"
        if stands_at_ms is not None and stands_at_ms <= due_ms:
            return b""
        self.store.remove(index, member)
        self.store.add(index, member, due_ms, end_ms)
        return b"missing" if stands_at_ms is None else b"late"

    def _last_end_ms(self, *keys: str) -> int | None:
        ends = [self.end_ms(key) for key in keys if key in self.store.sets]
        return None if None in ends else max((end for end in ends if end is not None), default=None)

    def restore(
        self,
        *,
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
        seq: str,
        entry: Sequence[str],
        env_id: str,
        org_id: str,
        lease_ms: int,
        stalled_ms: int,
        runs: Sequence[str],
    ) -> Any:
        """Each run stands where the state of its entry says; what names none is gone, and a held one is missed."""
        store, records = self.store, Records(self.store, owners, usage)
        now_ms = store.now_ms
        # What does not read as an entry is a dead letter in whatever state.
        places = {
            b"QUEUED": (queue, waiting, failed),
            b"DRAINING": (draining, failed),
            b"FAILED": (failed,),
            b"MATERIALISED": (),
        }
        stale = held_bytes = 0
        accepted_ms: list[int] = []
        verdicts: list[list[bytes]] = []

        def members(run_id: str, number: str) -> dict[str, str]:
            return {queue: run_id, waiting: f"{number}:{run_id}", draining: run_id, failed: run_id}

        def stands(run_id: str, number: str, among: Sequence[str]) -> bool:
            return any(members(run_id, number)[key] in store.sets.get(key, {}) for key in among)

        def let_go(run_id: str, waits_as: str) -> list[bytes] | None:
            if store.sets.get(draining, {}).get(run_id, 0) > now_ms:
                return None
            named = [
                (noun, key, member)
                for noun, key, member in ((b"queue", queue, run_id), (b"waiting", waiting, waits_as))
                if member in store.sets.get(key, {})
            ]
            for _, key, member in named:
                store.remove(key, member)
            if named:
                self.refresh_ready(queue, waiting, envs, orgs, env=env_id, org=org_id)
            nouns = [noun for noun, _, _ in named]
            nouns += [
                noun for noun, key in ((b"draining", draining), (b"held", held)) if run_id in store.sets.get(key, {})
            ]
            store.remove(draining, run_id)
            record = records.of(run_id)
            nouns += [b"owners"] if record is not None and record[0] is not None else []
            if records.bury(run_id, env_id, org_id, held=held, children=children, failed=failed):
                return [run_id.encode(), b"evicted", *nouns]
            if record is None and run_id in store.sets.get(failed, {}):
                store.remove(failed, run_id)
                nouns.append(b"failed")
            return [run_id.encode(), b"dropped", *nouns] if nouns else None

        def put_back(run_id: str, key: str, fields: Fields) -> bytes:
            end_ms, number = self.end_ms(key), fields["seq"].decode()
            not_before_ms = int(fields.get("not_before_ms", b"0"))
            match fields["state"]:
                case b"QUEUED":
                    store.remove(draining, run_id)
                    is_due = not_before_ms <= now_ms
                    due_ms = now_ms if is_due else not_before_ms
                    if is_due:
                        store.add(queue, run_id, int(number), end_ms)
                    else:
                        store.add(waiting, f"{number}:{run_id}", not_before_ms, end_ms)
                    self.mark_ready(envs, orgs, env_id, org_id, due_ms=due_ms, end_ms=end_ms)
                    return b"returned"
                case b"DRAINING":
                    store.remove(queue, run_id)
                    store.add(draining, run_id, now_ms + lease_ms, end_ms)
                    return b"leased"
                case _:
                    store.remove(queue, run_id)
                    store.add(failed, run_id, int(fields.get("failed_ms", b"%d" % now_ms)), end_ms)
                    return b"listed"

        for run_id, waits_as, key in zip(runs[::2], runs[1::2], entry, strict=True):
            fields = store.hashes.get(key)
            number = (fields or {}).get("seq", b"").decode()
            if fields is None:
                verdict = let_go(run_id, waits_as)
                verdicts += [verdict] if verdict else []
            elif not self._is_of(fields, env_id, org_id) or fields.get("state") not in places:
                names = members(run_id, number) | ({waiting: waits_as} if waits_as else {})
                if not any(member in store.sets.get(place, {}) for place, member in names.items()):
                    verdicts.append([run_id.encode(), b"malformed"])
            else:
                among = places[fields["state"]]
                if among and not stands(run_id, number, among):
                    verdicts.append([run_id.encode(), put_back(run_id, key, fields)])
                due_ms = max(int(fields["accepted_ms"]), int(fields.get("not_before_ms", b"0")))
                if fields["state"] == b"QUEUED" and due_ms <= now_ms:
                    accepted_ms.append(int(fields["accepted_ms"]))
                    stale += now_ms - due_ms > stalled_ms
            if run_id in store.sets.get(held, {}):
                held_bytes += (records.of(run_id) or (None,))[0] or 0
        sums = store.hashes.get(usage, {})
        books = [
            store.strings.get(seq, b"0"),
            len(store.sets.get(held, {})),
            sums.get(f"entries:env:{env_id}", b"0"),
            sums.get(f"bytes:env:{env_id}", b"0"),
        ]
        return [stale, min(accepted_ms, default=-1), b"%d" % held_bytes, books, verdicts]

    @staticmethod
    def _is_of(fields: Fields, env_id: str, org_id: str) -> bool:
        number = fields.get("seq", b"")
        return (fields.get("env"), fields.get("org")) == (env_id.encode(), org_id.encode()) and number.isdigit()

    def report(self, *, claim: str, report: str, token: str, lifetime_ms: int, fields: Sequence[str]) -> Any:
        """The last report is that of the last who had the claim when it came."""
        store = self.store
        if store.strings.get(claim) != claim_of(token):
            return 0
        store.delete(report)
        store.hashes[report] = {name: value.encode() for name, value in zip(fields[::2], fields[1::2], strict=True)}
        store.live(report, store.now_ms + lifetime_ms)
        return 1
