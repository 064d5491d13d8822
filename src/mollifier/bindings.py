"""1. Bindings: which keys of its caller's a trigger binds to its run, and what a binding to a held run is worth.

It is worth what its run is worth: nothing where the entry is gone, or does not parse, or its run has ended in a way that frees its
idempotency key. The entry tells of a held run that its time to live is over. Where somebody has set out to create the run (see `handover.py`), it may
be in the engine, and have ended there, while its entry is left: then the engine is asked, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from mollifier import held
from mollifier.buffer import Binding, Buffer
from mollifier.engine import KeyKind
from mollifier.errors import NonRetryableError
from mollifier.keys import idempotency_digest, is_request_digest, request_digest
from mollifier.model import KEY_FREEING_STATUSES, Entry, Snapshot
from mollifier.refuge import Refuge


def bindings(snapshot: Snapshot) -> list[tuple[KeyKind, Binding]]:
    """Return the snapshot's keys in the order in which they answer: the request key, then the idempotency key."""
    found: list[tuple[KeyKind, Binding]] = []
    if snapshot.request_key is not None:
        digest = request_digest(snapshot.env_id, snapshot.request_key)
        found.append(("request_key", Binding(digest, _ms(snapshot.request_key_expires_at))))
    if snapshot.idempotency_key is not None:
        digest = idempotency_digest(snapshot.env_id, snapshot.task_id, snapshot.idempotency_key)
        found.append(("idempotency_key", Binding(digest, _ms(snapshot.idempotency_expires_at))))
    return found


def _ms(moment: datetime | None) -> int:
    return int(moment.timestamp() * 1000) if moment is not None else 0


class Worth:
    """Finds out which bindings are worth nothing at the moment of a trigger: `void` has the run of each, by digest."""

    def __init__(self, buffer: Buffer, refuge: Refuge, snapshot: Snapshot) -> None:
        self._buffer = buffer
        self._refuge = refuge
        self._org_id = snapshot.org_id
        self._env_id = snapshot.env_id
        self._now = snapshot.created_at
        self._seen: set[tuple[str, str]] = set()
        self._begun: dict[str, str] = {}
        self.void: dict[str, str] = {}

    async def look_into(self, bound: Mapping[str, str]) -> bool:
        """Look at the entries of runs that keys are bound to; return whether one more of the bindings is worth nothing."""
        new = {digest: run_id for digest, run_id in bound.items() if (digest, run_id) not in self._seen}
        if not new:
            return False
        self._seen.update(new.items())
        run_ids = sorted(set(new.values()))
        entries = dict(zip(run_ids, await self._buffer.get_entries(self._org_id, run_ids), strict=True))
        void: dict[str, str] = {}
        for digest, run_id in new.items():
            entry = entries[run_id]
            if not isinstance(entry, Entry) or self._frees(digest, entry):
                void[digest] = run_id
            elif entry.taken and not is_request_digest(digest):
                self._begun[digest] = run_id
        self.void.update(void)
        return bool(void)

    async def ask_engine(self) -> bool:
        """Look in the engine at the runs that somebody has set out to create, each once; return whether there were any to look at.

        Raises EngineUnavailableError: then their bindings are worth what the entries say.
        """
        begun, self._begun = self._begun, {}
        if not begun:
            return False
        progress = await self._refuge.get_progress(self._env_id, sorted(set(begun.values())))
        ended = {run_id for run_id, run in progress.items() if run.status in KEY_FREEING_STATUSES}
        self.void.update((digest, run_id) for digest, run_id in begun.items() if run_id in ended)
        return True

    def _frees(self, digest: str, entry: Entry) -> bool:
        try:
            run = held.run_of(entry, self._now)
        except NonRetryableError:
            return True
        return run.status in KEY_FREEING_STATUSES and not is_request_digest(digest)
