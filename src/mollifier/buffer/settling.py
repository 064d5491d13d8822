"""Settling entries that were taken: each by the holder of its lease, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mollifier import scripts
from mollifier.buffer.part import Part, freed_by_failure, one
from mollifier.errors import BufferUnavailableError
from mollifier.keys import PartitionKeys
from mollifier.model import Entry
from mollifier.scripts import Settlement

_AT_ONCE = 100
"""How many entries one script settles: it keeps the server from everybody else for so long."""


class Settling(Part):
    """The part of the buffer that the holder of a lease reports to."""

    async def ack_many(self, entries: Sequence[Entry]) -> list[Settlement | BufferUnavailableError]:
        """Settle entries whose runs exist: readable for `ack_grace_ttl_s` more, their keys freed.

        Answers `changed`, and settles nothing, for an entry that has been patched since it was read.
        """
        grace_ms = self._settings().ack_grace_ttl_s * 1000
        by_environment: dict[tuple[str, str], list[int]] = {}
        for index, entry in enumerate(entries):
            by_environment.setdefault((entry.org_id, entry.env_id), []).append(index)
        groups = [
            indexes[i : i + _AT_ONCE] for indexes in by_environment.values() for i in range(0, len(indexes), _AT_ONCE)
        ]
        replies = await self._scripts.run_many(
            [self._ack([entries[index] for index in indexes], grace_ms) for indexes in groups]
        )
        settled: dict[int, Settlement | BufferUnavailableError] = {}
        for indexes, reply in zip(groups, replies, strict=True):
            verdicts = [reply] * len(indexes) if isinstance(reply, BufferUnavailableError) else reply
            settled.update(zip(indexes, verdicts, strict=True))
        return [settled[index] for index in range(len(entries))]

    def _ack(
        self, entries: Sequence[Entry], grace_ms: int
    ) -> scripts.Call[tuple[Settlement | BufferUnavailableError, ...]]:
        keys, environment = self.keyspace.of(entries[0].org_id), entries[0].env_id
        names: list[str] = []
        runs: list[str] = []
        for entry in entries:
            names += (keys.entry(entry.run_id), *_bindings(keys, entry))
            runs += (entry.run_id, str(entry.lease), str(len(entry.patches)), str(len(entry.bindings)))
        return scripts.ack(
            draining=keys.draining,
            held=keys.held(environment),
            owners=keys.owners,
            usage=keys.usage,
            children=keys.children(environment),
            entries=names,
            grace_ms=grace_ms,
            runs=runs,
        )

    async def ack(self, entry: Entry) -> Settlement:
        """Settle one entry: `held` when done, `missing` or `stale` when there was nothing of this lease to settle."""
        return one(await self.ack_many([entry]))

    async def requeue_many(
        self, entries: Sequence[Entry], *, not_before_ms: int | None = None, attempts: int = 1
    ) -> list[Settlement | BufferUnavailableError]:
        """Put leased entries back to their places, or to wait until a moment of the server's clock.

        `attempts` is what this handling counts for: 0 when the entries are not to blame.
        """
        return await self._scripts.run_many(
            [
                scripts.requeue(
                    entry=keys.entry(entry.run_id),
                    queue=keys.queue(entry.env_id),
                    waiting=keys.waiting(entry.env_id),
                    envs=keys.envs(entry.org_id),
                    orgs=keys.orgs,
                    draining=keys.draining,
                    failed=keys.failed,
                    held=keys.held(entry.env_id),
                    owners=keys.owners,
                    usage=keys.usage,
                    children=keys.children(entry.env_id),
                    run_id=entry.run_id,
                    env_id=entry.env_id,
                    org_id=entry.org_id,
                    lease=entry.lease,
                    not_before_ms=not_before_ms or 0,
                    attempts=attempts,
                )
                for keys, entry in self._with_keys(entries)
            ]
        )

    async def requeue(self, entry: Entry, *, not_before_ms: int | None = None, attempts: int = 1) -> Settlement:
        """Put one leased entry back; see `requeue_many`."""
        return one(await self.requeue_many([entry], not_before_ms=not_before_ms, attempts=attempts))

    async def fail_many(self, entries: Sequence[Entry], error: str) -> list[Settlement | BufferUnavailableError]:
        """Give leased entries up: they stay, FAILED, with the error, and are counted until somebody removes them.

        Their idempotency keys are free then, as a failed run's are; request keys go on answering with them.
        """
        return await self._scripts.run_many(
            [
                scripts.fail(
                    entry=keys.entry(entry.run_id),
                    draining=keys.draining,
                    failed=keys.failed,
                    held=keys.held(entry.env_id),
                    owners=keys.owners,
                    usage=keys.usage,
                    children=keys.children(entry.env_id),
                    binding=[keys.idempotency(digest) for digest in freed_by_failure(entry.bindings)],
                    run_id=entry.run_id,
                    lease=entry.lease,
                    error=error,
                    env_id=entry.env_id,
                    org_id=entry.org_id,
                )
                for keys, entry in self._with_keys(entries)
            ]
        )

    async def fail(self, entry: Entry, error: str) -> Settlement:
        """Give one leased entry up; see `fail_many`."""
        return one(await self.fail_many([entry], error))

    async def extend_many(self, entries: Sequence[Entry]) -> list[Settlement | BufferUnavailableError]:
        """Push the leases of entries that are still being handled, to `lease_ms` from now."""
        lease_ms = self._settings().lease_ms
        return await self._scripts.run_many(
            [
                scripts.extend(
                    entry=keys.entry(entry.run_id),
                    draining=keys.draining,
                    run_id=entry.run_id,
                    lease=entry.lease,
                    lease_ms=lease_ms,
                )
                for keys, entry in self._with_keys(entries)
            ]
        )

    def _with_keys(self, entries: Iterable[Entry]) -> Iterable[tuple[PartitionKeys, Entry]]:
        return ((self.keyspace.of(entry.org_id), entry) for entry in entries)


def _bindings(keys: PartitionKeys, entry: Entry) -> list[str]:
    return [keys.idempotency(digest) for digest in entry.bindings]
