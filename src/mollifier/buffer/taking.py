"""Taking entries out: what is due, a pop under a lease, and what to do about leases that ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from mollifier import entries, scripts
from mollifier.buffer.outcomes import Popped, Ready, Reclaimed
from mollifier.buffer.part import Part, freed_by_failure
from mollifier.errors import BufferUnavailableError, MalformedEntryError
from mollifier.inspection import listed
from mollifier.keys import WAKE, PartitionKeys
from mollifier.model import Entry
from mollifier.server import Server
from mollifier.settings import Settings

ENOUGH_BYTES = 1024 * 1024
"""After so many bytes a pop takes no more entries of one environment: their reply keeps everybody else's waiting."""
_ORPHANS_PER_POP = 100
_ENVIRONMENTS_REMEMBERED = 1_000


class _Following(NamedTuple):
    """The oldest runs that a pop left, `limit` of them if there were so many."""

    run_ids: tuple[str, ...]
    limit: int


class Taking(Part):
    """The part of the buffer that a drainer takes from.

    It remembers of each pop what follows and what time it was: what turns out to be out of date costs a round trip, never an entry.
    """

    def __init__(self, server: Server, settings: Callable[[], Settings]) -> None:
        super().__init__(server, settings)
        self._following: dict[Ready, _Following] = {}
        self._popped_at_ms: int | None = None

    async def listen(self, on_work: Callable[[], None]) -> None:
        """Call `on_work` whenever an environment that had nothing queued has something, until cancelled.

        A message may be missed while the connection is away: whoever listens polls too. Raises BufferUnavailableError then.
        """
        await self._server.listen(WAKE, on_work)

    async def ready(self, among: Iterable[str] | None = None) -> Mapping[str, tuple[str, ...]]:
        """Return the environments that have something due now, by organization. Three round trips, whatever their number.

        Given organizations, it is one: only they are looked at, and what is due is what was at the last pop. That is all there is to
        see where a pop has left something; what has come up since is announced, or seen by the next look at all of them.
        """
        # The server's clock decides what is due: a replica's own, running fast, would take entries before their time.
        if among is not None and self._popped_at_ms is not None:
            return await self._due([(self.keyspace.of(org_id), org_id) for org_id in among], self._popped_at_ms)
        now_ms = await self._server.now_ms()
        partitions = self.keyspace.partitions
        due = await self._server.run_many([("ZRANGE", keys.orgs, "-inf", now_ms, "BYSCORE") for keys in partitions])
        organizations = [
            (keys, org.decode()) for keys, orgs in zip(partitions, due, strict=True) for org in listed(orgs)
        ]
        return await self._due(organizations, now_ms)

    async def _due(
        self, organizations: Sequence[tuple[PartitionKeys, str]], now_ms: int
    ) -> Mapping[str, tuple[str, ...]]:
        envs = await self._server.run_many(
            [("ZRANGE", keys.envs(org), "-inf", now_ms, "BYSCORE") for keys, org in organizations]
        )
        by_org = {
            org: tuple(env.decode() for env in listed(found))
            for (_, org), found in zip(organizations, envs, strict=True)
        }
        return {org: found for org, found in by_org.items() if found}

    async def pop(self, org_id: str, env_id: str) -> Entry | None:
        """Take the oldest entry of one environment under a lease, or None when nothing is due.

        Passes over up to 100 references to entries that are gone, or do not parse, on the way.
        """
        orphans = 0
        while orphans < _ORPHANS_PER_POP:
            popped = (await self.pop_many([(Ready(org_id, env_id), 1)]))[0]
            if isinstance(popped, BufferUnavailableError):
                raise popped
            if popped.entries:
                return popped.entries[0]
            passed_over = popped.orphans + len(popped.malformed) + len(popped.evicted)
            if not passed_over:
                return None
            orphans += passed_over
        return None

    async def pop_many(self, shares: Sequence[tuple[Ready, int]]) -> list[Popped | BufferUnavailableError]:
        """Take up to so many entries of each environment, oldest first, under a lease each, and fewer of large ones. Two round trips in all.

        It is one where the last pop of each has told what follows, and nobody else has taken that since. A fault of one environment is
        its own answer and harms no other. Another drainer at the same queue may leave fewer.
        """
        told = [self._told(ready, limit) for ready, limit in shares]
        results: list[Popped | BufferUnavailableError] = [Popped()] * len(shares)
        first: list[scripts.Call[Any]] = [
            self._peek(ready, limit) if heads is None else self._pop(ready, limit, heads)
            for heads, (ready, limit) in zip(told, shares, strict=True)
        ]
        again: dict[int, scripts.Call[scripts.PoppedFields]] = {}
        for index, reply in enumerate(await self._scripts.run_many(first)):
            ready, limit = shares[index]
            match reply:
                case BufferUnavailableError():
                    results[index] = reply
                case scripts.PoppedFields():
                    results[index] = self._popped(ready, limit, reply)
                    if reply.following and not _met_anything(reply):
                        # Somebody else took what was told, or something older has come back since.
                        again[index] = self._pop(ready, limit, reply.following)
                case heads:
                    again[index] = self._pop(ready, limit, heads)
        replies = await self._scripts.run_many(list(again.values()))
        for index, reply in zip(again, replies, strict=True):
            results[index] = reply if isinstance(reply, BufferUnavailableError) else self._popped(*shares[index], reply)
        return results

    def _told(self, ready: Ready, limit: int) -> tuple[str, ...] | None:
        """Return the oldest queued runs of the environment as its last pop told them; None where that is unknown, or not enough of them."""
        following = self._following.pop(ready, None)
        return None if following is None or limit > following.limit else following.run_ids

    def _popped(self, ready: Ready, limit: int, reply: scripts.PoppedFields) -> Popped:
        self._popped_at_ms = reply.now_ms
        if reply.following:
            if len(self._following) >= _ENVIRONMENTS_REMEMBERED:
                self._following.clear()
            self._following[ready] = _Following(reply.following, limit)
        return _as_popped(reply)

    async def reclaim_expired(self, limit: int = 100) -> Reclaimed:
        """Put back entries whose lease ran out (their holder died), up to `limit` per partition.

        One that has come back `max_returns` times before is a dead letter: it stays, FAILED, and its idempotency key is free.
        """
        now_ms = await self._server.now_ms()
        partitions = self.keyspace.partitions
        expired = await self._server.run_many(
            [("ZRANGE", keys.draining, "-inf", now_ms, "BYSCORE", "LIMIT", 0, limit) for keys in partitions]
        )
        stranded = [
            (keys, run.decode()) for keys, runs in zip(partitions, expired, strict=True) for run in listed(runs)
        ]
        questions = [
            [("HMGET", keys.entry(run), "org", "env", "bindings"), ("HGET", keys.owners, run)] for keys, run in stranded
        ]
        answers = await self._server.run_many([question for pair in questions for question in pair])
        calls = [
            self._reclaim(keys, run, *_owner(fields, record), _digests(fields))
            for (keys, run), fields, record in zip(stranded, answers[::2], answers[1::2], strict=True)
        ]
        replies = await self._scripts.run_many(calls)
        became: dict[str, list[str]] = {}
        faults: list[BufferUnavailableError] = []
        for (_, run), reply in zip(stranded, replies, strict=True):
            if isinstance(reply, BufferUnavailableError):
                faults.append(reply)
            else:
                became.setdefault(reply, []).append(run)
        runs = [tuple(became.get(reply, ())) for reply in ("held", "failed", "evicted", "malformed", "missing")]
        return Reclaimed(*runs, faults=tuple(faults))

    def _peek(self, ready: Ready, limit: int) -> scripts.Call[tuple[str, ...]]:
        keys = self.keyspace.of(ready.org_id)
        return scripts.peek(queue=keys.queue(ready.env_id), waiting=keys.waiting(ready.env_id), limit=limit)

    def _pop(self, ready: Ready, limit: int, run_ids: Sequence[str]) -> scripts.Call[scripts.PoppedFields]:
        keys = self.keyspace.of(ready.org_id)
        return scripts.pop(
            queue=keys.queue(ready.env_id),
            waiting=keys.waiting(ready.env_id),
            envs=keys.envs(ready.org_id),
            orgs=keys.orgs,
            draining=keys.draining,
            failed=keys.failed,
            seq=keys.seq,
            held=keys.held(ready.env_id),
            owners=keys.owners,
            usage=keys.usage,
            children=keys.children(ready.env_id),
            entry=[keys.entry(run_id) for run_id in run_ids],
            env_id=ready.env_id,
            org_id=ready.org_id,
            lease_ms=self._settings().lease_ms,
            take=limit,
            enough=ENOUGH_BYTES,
            run_id=run_ids,
        )

    def _reclaim(
        self, keys: PartitionKeys, run_id: str, org_id: str, env_id: str, digests: Sequence[str]
    ) -> scripts.Call[scripts.ReclaimReply]:
        return scripts.reclaim(
            entry=keys.entry(run_id),
            queue=keys.queue(env_id),
            envs=keys.envs(org_id),
            orgs=keys.orgs,
            draining=keys.draining,
            failed=keys.failed,
            held=keys.held(env_id),
            owners=keys.owners,
            usage=keys.usage,
            children=keys.children(env_id),
            binding=[keys.idempotency(digest) for digest in freed_by_failure(digests)],
            run_id=run_id,
            env_id=env_id,
            org_id=org_id,
            max_reclaims=self._settings().max_returns,
        )


def _owner(fields: Any, record: Any) -> tuple[str, str]:
    """Return (organization, environment) of an entry, empty where they are not known."""
    org, env = (None, None) if isinstance(fields, RedisError) else fields[:2]
    owner = entries.owner_of(record, org, env)
    return (owner.org_id, owner.env_id) if owner is not None else ("", "")


def _digests(fields: Any) -> Sequence[str]:
    return () if isinstance(fields, RedisError) else entries.digests_of(fields[2])


def _met_anything(reply: scripts.PoppedFields) -> bool:
    return bool(reply.taken or reply.malformed or reply.dropped or reply.evicted)


def _as_popped(reply: scripts.PoppedFields) -> Popped:
    taken: list[Entry] = []
    malformed = [
        MalformedEntryError(run_id, "fields are missing or of another environment") for run_id in reply.malformed
    ]
    for run_id, fields in reply.taken:
        match entries.parse(run_id, fields, reply.now_ms):
            case Entry() as entry:
                taken.append(entry)
            case MalformedEntryError() as error:
                malformed.append(error)
            case None:
                pass
    return Popped(tuple(taken), tuple(malformed), reply.dropped, reply.evicted)
