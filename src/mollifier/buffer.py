"""3. The buffer: the durable store of held triggers. Every change of state is one atomic script.

Operations take many at once, one being the special case: a batch travels in one round trip. Reads never change anything, and
an entry that does not parse is reported, never the end of a reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from mollifier import scripts
from mollifier.errors import BufferUnavailableError, MalformedEntryError, SettingsError
from mollifier.keys import PARTITIONS, Keyspace, PartitionKeys, idempotency_digest
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.scripts import Scripts, Settlement
from mollifier.settings import Settings, variable

_ORPHANS_PER_POP = 100


class Accepted(msgspec.Struct, frozen=True):
    """The entry is stored, as the `sequence`-th of its environment."""

    run_id: str
    sequence: int


class DuplicateRun(msgspec.Struct, frozen=True):
    """There already is an entry of this run, in whatever state; nothing changed."""

    run_id: str


class DuplicateKey(msgspec.Struct, frozen=True):
    """The idempotency key is bound to the live entry of another run, `run_id`; nothing changed."""

    run_id: str


AcceptOutcome = Accepted | DuplicateRun | DuplicateKey


class Ready(msgspec.Struct, frozen=True):
    """One environment that has something due."""

    org_id: str
    env_id: str


class Popped(msgspec.Struct, frozen=True):
    """What one pop took: entries under a lease, runs whose entry does not parse (now listed as failed), orphan references dropped."""

    entries: tuple[Entry, ...] = ()
    malformed: tuple[MalformedEntryError, ...] = ()
    orphans: int = 0


class Counts(msgspec.Struct, frozen=True):
    """How much the buffer holds. `oldest_ms` is the age of the longest-held queued entry, None when nothing is queued."""

    queued: int
    waiting: int
    draining: int
    failed: int
    organizations: tuple[str, ...]
    oldest_ms: int | None

    @property
    def left(self) -> int:
        """Everything that is not settled."""
        return self.queued + self.waiting + self.draining + self.failed


class Buffer:
    """One buffer on one server. Every method raises BufferUnavailableError when the server gives no answer.

    The client must return bytes (`decode_responses=False`).
    """

    def __init__(self, redis: Redis, settings: Callable[[], Settings]) -> None:
        self._redis = redis
        self._settings = settings
        self._scripts = Scripts(redis)
        self.keyspace = Keyspace(settings().partitions)

    async def claim_layout(self) -> None:
        """Record the number of partitions at the first boot; raise SettingsError when the buffer was made with another."""
        wanted = len(self.keyspace.partitions)
        recorded = await self._read(self._redis.set(PARTITIONS, str(wanted), nx=True, get=True))
        if recorded is not None and int(recorded) != wanted:
            detail = f"is {wanted}, but this buffer was made with {int(recorded)}; entries would be out of reach. Set it back"
            raise SettingsError(variable("partitions"), detail)

    async def ping(self) -> None:
        """Return when the server answers."""
        await self._read(self._redis.ping())

    # --- storing ---------------------------------------------------------------------------------------------------

    async def accept(
        self,
        run_id: str,
        env_id: str,
        org_id: str,
        payload: bytes,
        *,
        kind: EntryKind = EntryKind.AUDIT,
        idempotency: tuple[str, str] | None = None,
    ) -> AcceptOutcome:
        """Store one entry as QUEUED; `idempotency` is its (task id, key). An audit copy expires after `entry_ttl_s`."""
        keys = self.keyspace.of(org_id)
        digest = idempotency_digest(env_id, *idempotency) if idempotency else ""
        call = scripts.accept(
            entry=keys.entry(run_id),
            queue=keys.queue(env_id),
            envs=keys.envs(org_id),
            orgs=keys.orgs,
            seq=keys.seq,
            idempotency=keys.idempotency(digest) if digest else None,
            run_id=run_id,
            env_id=env_id,
            org_id=org_id,
            kind=kind,
            payload=payload,
            ttl_ms=self._settings().entry_ttl_s * 1000 if kind is EntryKind.AUDIT else 0,
            digest=digest,
        )
        match await self._scripts.run(call):
            case "accepted", stored, sequence:
                return Accepted(stored, sequence)
            case "duplicate_run", stored, _:
                return DuplicateRun(stored)
            case "duplicate_key", winner, _:
                return DuplicateKey(winner)

    # --- taking ----------------------------------------------------------------------------------------------------

    async def ready(self) -> Mapping[str, tuple[str, ...]]:
        """Return the environments that have something due now, by organization. Two round trips, whatever their number."""
        now_ms, per_partition = await self._due_organizations()
        organizations = [
            (keys, org_id.decode()) for keys, due in zip(self.keyspace.partitions, per_partition, strict=True) for org_id in due
        ]
        pipeline = self._redis.pipeline(transaction=False)
        for keys, org_id in organizations:
            pipeline.zrange(keys.envs(org_id), "-inf", now_ms, byscore=True)  # pyright: ignore[reportArgumentType] - a moment
        listed = await self._read(pipeline.execute(raise_on_error=False)) if organizations else []
        return {
            org_id: tuple(env.decode() for env in envs)
            for (_, org_id), envs in zip(organizations, listed, strict=True)
            if envs and not isinstance(envs, Exception)
        }

    async def pop(self, org_id: str, env_id: str) -> Entry | None:
        """Take the oldest entry of one environment under a lease, or None when nothing is due.

        Drops up to 100 references to entries that are gone on the way.
        """
        orphans = 0
        while orphans < _ORPHANS_PER_POP:
            popped = (await self.pop_many([(Ready(org_id, env_id), 1)]))[0]
            if isinstance(popped, BufferUnavailableError):
                raise popped
            if popped.entries:
                return popped.entries[0]
            if not popped.orphans and not popped.malformed:
                return None
            orphans += popped.orphans + len(popped.malformed)
        return None

    async def pop_many(self, shares: Sequence[tuple[Ready, int]]) -> list[Popped | BufferUnavailableError]:
        """Take up to so many entries of each environment, oldest first, under a lease each. Two round trips in all.

        A fault of one environment is its own answer and harms no other. Another drainer at the same queue may leave fewer.
        """
        peeks = [self._peek(ready, limit) for ready, limit in shares]
        heads = await self._scripts.run_many(peeks)
        calls = [
            (index, self._pop(ready, limit, head))
            for index, ((ready, limit), head) in enumerate(zip(shares, heads, strict=True))
            if head and not isinstance(head, BufferUnavailableError)
        ]
        results: list[Popped | BufferUnavailableError] = [
            head if isinstance(head, BufferUnavailableError) else Popped() for head in heads
        ]
        replies = await self._scripts.run_many([call for _, call in calls])
        for (index, _), reply in zip(calls, replies, strict=True):
            results[index] = reply if isinstance(reply, BufferUnavailableError) else _as_popped(reply)
        return results

    async def reclaim_expired(self, limit: int = 100) -> int:
        """Put back entries whose lease ran out (their holder died), up to `limit` per partition; return how many."""
        now_ms = await self._now_ms()
        pipeline = self._redis.pipeline(transaction=False)
        for keys in self.keyspace.partitions:
            pipeline.zrange(keys.draining, "-inf", now_ms, byscore=True, offset=0, num=limit)  # pyright: ignore[reportArgumentType]
        expired = await self._read(pipeline.execute())
        stranded = [
            (keys, run_id.decode()) for keys, runs in zip(self.keyspace.partitions, expired, strict=True) for run_id in runs
        ]
        owners = await self._owners(stranded)
        calls = [
            scripts.reclaim(
                entry=keys.entry(run_id),
                queue=keys.queue(env_id),
                envs=keys.envs(org_id),
                orgs=keys.orgs,
                draining=keys.draining,
                run_id=run_id,
                env_id=env_id,
                org_id=org_id,
            )
            for (keys, run_id), (org_id, env_id) in zip(stranded, owners, strict=True)
        ]
        return sum(reply == "held" for reply in await self._scripts.run_many(calls))

    # --- settling --------------------------------------------------------------------------------------------------

    async def ack_many(self, entries: Sequence[Entry]) -> list[Settlement | BufferUnavailableError]:
        """Settle entries whose runs exist: readable for `ack_grace_ttl_s` more, their idempotency keys freed."""
        grace_ms = self._settings().ack_grace_ttl_s * 1000
        return await self._scripts.run_many(
            [
                scripts.ack(
                    entry=keys.entry(entry.run_id),
                    draining=keys.draining,
                    idempotency=_binding(keys, entry),
                    run_id=entry.run_id,
                    lease=entry.lease,
                    grace_ms=grace_ms,
                )
                for keys, entry in self._with_keys(entries)
            ]
        )

    async def ack(self, entry: Entry) -> Settlement:
        """Settle one entry: `held` when done, `missing` or `stale` when there was nothing of this lease to settle."""
        return _one(await self.ack_many([entry]))

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
        return _one(await self.requeue_many([entry], not_before_ms=not_before_ms, attempts=attempts))

    async def fail(self, entry: Entry, error: str) -> Settlement:
        """Give one leased entry up: it stays, FAILED, with the error, and is counted until somebody removes it."""
        keys = self.keyspace.of(entry.org_id)
        return await self._scripts.run(
            scripts.fail(
                entry=keys.entry(entry.run_id),
                draining=keys.draining,
                failed=keys.failed,
                idempotency=_binding(keys, entry),
                run_id=entry.run_id,
                lease=entry.lease,
                error=error,
            )
        )

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

    # --- reading ---------------------------------------------------------------------------------------------------

    async def get_entry(self, org_id: str, run_id: str) -> Entry | None:
        """Return one entry, None when there is none. Raises MalformedEntryError when what is there does not parse."""
        (found,) = await self.get_entries(org_id, [run_id])
        if isinstance(found, MalformedEntryError):
            raise found
        return found

    async def get_entries(self, org_id: str, run_ids: Sequence[str]) -> list[Entry | MalformedEntryError | None]:
        """Return entries of one organization in the given order: None where there is none, an error where one does not parse."""
        keys = self.keyspace.of(org_id)
        pipeline = self._redis.pipeline(transaction=False)
        for run_id in run_ids:
            pipeline.hgetall(keys.entry(run_id))
        hashes = await self._read(pipeline.execute(raise_on_error=False)) if run_ids else []
        return [_as_entry_or_error(run_id, fields) for run_id, fields in zip(run_ids, hashes, strict=True)]

    async def list_entries(
        self, org_id: str, env_id: str, *, offset: int = 0, limit: int = 100
    ) -> list[Entry | MalformedEntryError]:
        """Return the environment's queued entries, oldest first. References whose entry is gone are passed over."""
        keys = self.keyspace.of(org_id)
        members = await self._read(self._redis.zrange(keys.queue(env_id), offset, offset + limit - 1))
        found = await self.get_entries(org_id, [run_id.decode() for run_id in members])
        return [entry for entry in found if entry is not None]

    async def counts(self) -> Counts:
        """Count everything the buffer holds, over all partitions."""
        now_ms = await self._now_ms()
        pipeline = self._redis.pipeline(transaction=False)
        for keys in self.keyspace.partitions:
            pipeline.zcard(keys.draining)
            pipeline.zcard(keys.failed)
            pipeline.zrange(keys.orgs, 0, -1)
        replies = await self._read(pipeline.execute())
        totals: Counter[str] = Counter()
        organizations: list[tuple[PartitionKeys, str]] = []
        for index, keys in enumerate(self.keyspace.partitions):
            draining, failed, orgs = replies[3 * index : 3 * index + 3]
            totals.update(draining=draining, failed=failed)
            organizations += [(keys, org_id.decode()) for org_id in orgs]
        environments = await self._environments(organizations)
        oldest_ms = await self._count_queues(environments, totals, now_ms)
        return Counts(
            queued=totals["queued"],
            waiting=totals["waiting"],
            draining=totals["draining"],
            failed=totals["failed"],
            organizations=tuple(sorted(org_id for _, org_id in organizations)),
            oldest_ms=oldest_ms,
        )

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _due_organizations(self) -> tuple[int, list[list[bytes]]]:
        # The server's clock is asked first: with a replica's own, a fast one would take entries before their time.
        now_ms = await self._now_ms()
        pipeline = self._redis.pipeline(transaction=False)
        for keys in self.keyspace.partitions:
            pipeline.zrange(keys.orgs, "-inf", now_ms, byscore=True)  # pyright: ignore[reportArgumentType] - a moment
        return now_ms, await self._read(pipeline.execute())

    async def _now_ms(self) -> int:
        seconds, microseconds = await self._read(self._redis.time())
        return seconds * 1000 + microseconds // 1000

    async def _environments(self, organizations: Sequence[tuple[PartitionKeys, str]]) -> list[tuple[PartitionKeys, str]]:
        pipeline = self._redis.pipeline(transaction=False)
        for keys, org_id in organizations:
            pipeline.zrange(keys.envs(org_id), 0, -1)
        listed = await self._read(pipeline.execute()) if organizations else []
        return [(keys, env.decode()) for (keys, _), envs in zip(organizations, listed, strict=True) for env in envs]

    async def _count_queues(
        self, environments: Sequence[tuple[PartitionKeys, str]], totals: Counter[str], now_ms: int
    ) -> int | None:
        pipeline = self._redis.pipeline(transaction=False)
        for keys, env_id in environments:
            pipeline.zcard(keys.queue(env_id))
            pipeline.zcard(keys.waiting(env_id))
            pipeline.zrange(keys.queue(env_id), 0, 0)
        replies = await self._read(pipeline.execute()) if environments else []
        ages = self._redis.pipeline(transaction=False)
        for index, (keys, _) in enumerate(environments):
            queued, waiting, head = replies[3 * index : 3 * index + 3]
            totals.update(queued=queued, waiting=waiting)
            for run_id in head:
                ages.hget(keys.entry(run_id.decode()), "accepted_ms")
        accepted = await self._read(ages.execute(raise_on_error=False)) if len(ages) else []
        moments = [int(moment) for moment in accepted if isinstance(moment, bytes) and moment.isdigit()]
        return now_ms - min(moments) if moments else None

    async def _owners(self, runs: Sequence[tuple[PartitionKeys, str]]) -> list[tuple[str, str]]:
        """Return (organization, environment) of each run; empty names where its entry is gone."""
        pipeline = self._redis.pipeline(transaction=False)
        for keys, run_id in runs:
            pipeline.hmget(keys.entry(run_id), "org", "env")
        found = await self._read(pipeline.execute(raise_on_error=False)) if runs else []
        return [("", "") if isinstance(pair, Exception) or None in pair else (pair[0].decode(), pair[1].decode()) for pair in found]

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
            entry=[keys.entry(run_id) for run_id in run_ids],
            env_id=ready.env_id,
            org_id=ready.org_id,
            lease_ms=self._settings().lease_ms,
            take=limit,
            run_id=run_ids,
        )

    def _with_keys(self, entries: Iterable[Entry]) -> Iterable[tuple[PartitionKeys, Entry]]:
        return ((self.keyspace.of(entry.org_id), entry) for entry in entries)

    @staticmethod
    async def _read(reply: Any) -> Any:
        try:
            return await reply
        except (RedisError, OSError) as error:
            raise BufferUnavailableError(str(error)) from error


def _binding(keys: PartitionKeys, entry: Entry) -> str | None:
    return keys.idempotency(entry.idempotency) if entry.idempotency else None


def _one(results: list[Settlement | BufferUnavailableError]) -> Settlement:
    (result,) = results
    if isinstance(result, BufferUnavailableError):
        raise result
    return result


def _as_popped(reply: scripts.PoppedFields) -> Popped:
    entries: list[Entry] = []
    malformed = [MalformedEntryError(run_id, "fields are missing or of another environment") for run_id in reply.malformed]
    for run_id, fields in reply.taken:
        found = _as_entry_or_error(run_id, fields, reply.now_ms)
        match found:
            case Entry():
                entries.append(found)
            case MalformedEntryError():
                malformed.append(found)
            case None:
                pass
    return Popped(tuple(entries), tuple(malformed), reply.dropped)


def _as_entry_or_error(run_id: str, fields: Any, now_ms: int | None = None) -> Entry | MalformedEntryError | None:
    if isinstance(fields, Exception):
        return MalformedEntryError(run_id, str(fields))
    if not fields:
        return None
    named = {(name.decode("utf-8", "replace") if isinstance(name, bytes) else name): value for name, value in fields.items()}
    try:
        return _as_entry(run_id, named, now_ms)
    except (KeyError, ValueError) as error:
        return MalformedEntryError(run_id, f"field {error}" if isinstance(error, KeyError) else str(error))


def _as_entry(run_id: str, fields: Mapping[str, bytes], now_ms: int | None) -> Entry:
    accepted_at_ms = int(fields["accepted_ms"])
    return Entry(
        run_id=run_id,
        env_id=fields["env"].decode(),
        org_id=fields["org"].decode(),
        kind=EntryKind(fields["kind"].decode()),
        state=EntryState(fields["state"].decode()),
        sequence=int(fields["seq"]),
        attempts=int(fields.get("attempts", b"0")),
        reclaims=int(fields.get("reclaims", b"0")),
        accepted_at_ms=accepted_at_ms,
        payload=fields["payload"],
        lease=int(fields.get("lease", b"0")),
        dwell_ms=max(0, now_ms - accepted_at_ms) if now_ms is not None else 0,
        not_before_ms=int(fields["not_before_ms"]) if "not_before_ms" in fields else None,
        idempotency=fields["idempotency"].decode() if "idempotency" in fields else None,
        error=fields["error"].decode("utf-8", "replace") if "error" in fields else None,
    )
