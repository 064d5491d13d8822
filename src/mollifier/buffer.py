"""3. The buffer: the durable store of held triggers. Every change of state is one atomic script.

Operations take many at once, one being the special case: a batch travels in one round trip. Reads never change anything, and
an entry that does not parse is reported, never the end of a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from redis.exceptions import RedisError

from mollifier import entries, inspection, scripts
from mollifier.errors import BufferUnavailableError, MalformedEntryError, SettingsError
from mollifier.inspection import Counts, listed
from mollifier.keys import PARTITIONS, WAKE, Keyspace, PartitionKeys
from mollifier.model import Entry, EntryKind
from mollifier.scripts import Scripts, Settlement
from mollifier.server import Server
from mollifier.settings import Settings, variable

T = TypeVar("T")

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


class KeyClaimed(msgspec.Struct, frozen=True):
    """Another trigger has claimed one of the keys and has not bound it yet; nothing changed."""


AcceptOutcome = Accepted | DuplicateRun | DuplicateKey | KeyClaimed


class Binding(msgspec.Struct, frozen=True):
    """One of the caller's keys, by its digest, and the moment (ms since the epoch) up to which it belongs to the run."""

    digest: str
    expires_ms: int


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """One entry to store as QUEUED, and the caller's keys to bind to it, which must be free or claimed by `token`.

    `created_ms` is the trigger's moment, by which lists order held runs. An audit copy expires after `entry_ttl_s`.
    """

    run_id: str
    env_id: str
    org_id: str
    payload: bytes
    kind: EntryKind = EntryKind.AUDIT
    created_ms: int = 0
    bindings: Sequence[Binding] = ()
    token: str = ""


class Claimed(msgspec.Struct, frozen=True):
    """The key is the claimant's until it binds it, releases it, or takes too long."""


class Bound(msgspec.Struct, frozen=True):
    """The key belongs to the held run `run_id`."""

    run_id: str


ClaimOutcome = Claimed | Bound | KeyClaimed


class Ready(msgspec.Struct, frozen=True):
    """One environment that has something due."""

    org_id: str
    env_id: str


class Popped(msgspec.Struct, frozen=True):
    """What one pop took: entries under a lease, runs whose entry does not parse (now listed as failed), orphan references dropped."""

    entries: tuple[Entry, ...] = ()
    malformed: tuple[MalformedEntryError, ...] = ()
    orphans: int = 0


class Buffer:
    """One buffer on one server. Every method raises BufferUnavailableError when the server gives no answer."""

    def __init__(self, server: Server, settings: Callable[[], Settings]) -> None:
        self._server = server
        self._settings = settings
        self._scripts = Scripts(server)
        self.keyspace = Keyspace(settings().partitions)

    async def claim_layout(self) -> None:
        """Record the number of partitions at the first boot; raise SettingsError when the buffer was made with another."""
        wanted = len(self.keyspace.partitions)
        await self._server.run("SET", PARTITIONS, wanted, "NX")
        recorded = await self._server.run("GET", PARTITIONS)
        if int(recorded) != wanted:
            detail = f"is {wanted}, but this buffer was made with {int(recorded)}; entries would be out of reach. Set it back"
            raise SettingsError(variable("partitions"), detail)

    async def ping(self) -> None:
        """Return when the server answers."""
        await self._server.run("PING")

    # --- storing ---------------------------------------------------------------------------------------------------

    async def accept(
        self,
        run_id: str,
        env_id: str,
        org_id: str,
        payload: bytes,
        *,
        kind: EntryKind = EntryKind.AUDIT,
        created_ms: int = 0,
        bindings: Sequence[Binding] = (),
        token: str = "",
    ) -> AcceptOutcome:
        """Store one entry; see `Acceptance`."""
        return _one(
            await self.accept_many(
                [
                    Acceptance(
                        run_id=run_id,
                        env_id=env_id,
                        org_id=org_id,
                        payload=payload,
                        kind=kind,
                        created_ms=created_ms,
                        bindings=bindings,
                        token=token,
                    )
                ]
            )
        )

    async def accept_many(self, entries: Sequence[Acceptance]) -> list[AcceptOutcome | BufferUnavailableError]:
        """Store entries in one round trip, each by itself: one that cannot be stored harms no other. One outcome each, in order."""
        replies = await self._scripts.run_many([self._accept(entry) for entry in entries])
        return [reply if isinstance(reply, BufferUnavailableError) else _accepted(reply) for reply in replies]

    async def claim(self, org_id: str, digest: str, token: str, lifetime_ms: int) -> ClaimOutcome:
        """Claim one of the caller's keys; see `claim_many`."""
        (outcome,) = await self.claim_many(org_id, [digest], token, lifetime_ms)
        return outcome

    async def claim_many(
        self, org_id: str, digests: Sequence[str], token: str, lifetime_ms: int
    ) -> Sequence[ClaimOutcome]:
        """Claim keys of one organization in their order, in one round trip; claiming with the same token again prolongs the claim.

        The first that is somebody else's claim is the last of the answers: none after it has been claimed.
        """
        keys = self.keyspace.of(org_id)
        binding = [keys.idempotency(digest) for digest in digests]
        replies = await self._scripts.run(scripts.claim(binding=binding, token=token, lifetime_ms=lifetime_ms))
        return [_claimed(reply) for reply in replies]

    async def release(self, org_id: str, digests: Sequence[str], token: str) -> int:
        """Give claims back in one round trip; one that is another's by now, or bound, stays. Return how many it were."""
        keys = self.keyspace.of(org_id)
        binding = [keys.idempotency(digest) for digest in digests]
        return await self._scripts.run(scripts.release(binding=binding, token=token))

    async def bound_run(self, org_id: str, digest: str) -> str | None:
        """Return the held run that the key belongs to, None when it belongs to none."""
        holder = await self._server.run("GET", self.keyspace.of(org_id).idempotency(digest))
        return holder.decode().removeprefix("run:") if holder and holder.startswith(b"run:") else None

    async def patch(self, entry: Entry, patch: bytes, *, unbind: Sequence[str] = ()) -> Settlement:
        """Append a change to a held entry as it was read, freeing the keys with the digests in `unbind`.

        Answers `changed` when it is no longer as it was read, `stale` when its run exists by now, `missing` when it is gone.
        """
        keys = self.keyspace.of(entry.org_id)
        return await self._scripts.run(
            scripts.patch(
                entry=keys.entry(entry.run_id),
                binding=[keys.idempotency(digest) for digest in unbind],
                run_id=entry.run_id,
                patches=len(entry.patches),
                patch=patch,
            )
        )

    async def listen(self, on_work: Callable[[], None]) -> None:
        """Call `on_work` whenever an environment that had nothing queued has something, until cancelled.

        A message may be missed while the connection is away: whoever listens polls too. Raises BufferUnavailableError then.
        """
        await self._server.listen(WAKE, on_work)

    # --- taking ----------------------------------------------------------------------------------------------------

    async def ready(self, among: Iterable[str] | None = None) -> Mapping[str, tuple[str, ...]]:
        """Return the environments that have something due now, by organization. Three round trips, whatever their number.

        Given organizations, only their partitions are looked at, which is most of the work where few of many have anything due.
        """
        # The server's clock decides what is due: a replica's own, running fast, would take entries before their time.
        now_ms = await self._server.now_ms()
        partitions = self.keyspace.partitions if among is None else tuple(dict.fromkeys(map(self.keyspace.of, among)))
        due = await self._server.run_many([("ZRANGE", keys.orgs, "-inf", now_ms, "BYSCORE") for keys in partitions])
        organizations = [
            (keys, org.decode()) for keys, orgs in zip(partitions, due, strict=True) for org in listed(orgs)
        ]
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
            if not isinstance(head, BufferUnavailableError)
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
        now_ms = await self._server.now_ms()
        partitions = self.keyspace.partitions
        expired = await self._server.run_many(
            [("ZRANGE", keys.draining, "-inf", now_ms, "BYSCORE", "LIMIT", 0, limit) for keys in partitions]
        )
        stranded = [
            (keys, run.decode()) for keys, runs in zip(partitions, expired, strict=True) for run in listed(runs)
        ]
        owners = await self._server.run_many([("HMGET", keys.entry(run), "org", "env") for keys, run in stranded])
        calls = [self._reclaim(keys, run, *_owner(owner)) for (keys, run), owner in zip(stranded, owners, strict=True)]
        return sum(reply == "held" for reply in await self._scripts.run_many(calls))

    # --- settling --------------------------------------------------------------------------------------------------

    async def ack_many(self, entries: Sequence[Entry]) -> list[Settlement | BufferUnavailableError]:
        """Settle entries whose runs exist: readable for `ack_grace_ttl_s` more, their keys freed.

        Answers `changed`, and settles nothing, for an entry that has been patched since it was read.
        """
        grace_ms = self._settings().ack_grace_ttl_s * 1000
        return await self._scripts.run_many(
            [
                scripts.ack(
                    entry=keys.entry(entry.run_id),
                    draining=keys.draining,
                    held=keys.held(entry.env_id),
                    binding=_bindings(keys, entry),
                    run_id=entry.run_id,
                    lease=entry.lease,
                    grace_ms=grace_ms,
                    patches=len(entry.patches),
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

    async def fail_many(self, entries: Sequence[Entry], error: str) -> list[Settlement | BufferUnavailableError]:
        """Give leased entries up: they stay, FAILED, with the error, and are counted until somebody removes them."""
        return await self._scripts.run_many(
            [
                scripts.fail(
                    entry=keys.entry(entry.run_id),
                    draining=keys.draining,
                    failed=keys.failed,
                    held=keys.held(entry.env_id),
                    binding=_bindings(keys, entry),
                    run_id=entry.run_id,
                    lease=entry.lease,
                    error=error,
                )
                for keys, entry in self._with_keys(entries)
            ]
        )

    async def fail(self, entry: Entry, error: str) -> Settlement:
        """Give one leased entry up; see `fail_many`."""
        return _one(await self.fail_many([entry], error))

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
        found = await inspection.entries(self._server, self.keyspace.of(org_id), run_ids)
        # A partition is shared by organizations: what belongs to a neighbour does not exist here.
        return [None if isinstance(entry, Entry) and entry.org_id != org_id else entry for entry in found]

    async def list_entries(
        self, org_id: str, env_id: str, *, offset: int = 0, limit: int = 100
    ) -> list[Entry | MalformedEntryError]:
        """Return the environment's queued entries, oldest first. References whose entry is gone are passed over."""
        queue = self.keyspace.of(org_id).queue(env_id)
        queued = await self._server.run("ZRANGE", queue, offset, offset + limit - 1)
        found = await self.get_entries(org_id, [run_id.decode() for run_id in queued])
        return [entry for entry in found if entry is not None]

    async def held_run_ids(
        self, org_id: str, env_id: str, *, from_ms: int | None = None, newest_first: bool = True
    ) -> list[str]:
        """Return the environment's held runs in the order of their triggers' moments, from `from_ms` on in that direction."""
        key = self.keyspace.of(org_id).held(env_id)
        if newest_first:
            start = "+inf" if from_ms is None else from_ms
            members = await self._server.run("ZRANGE", key, start, "-inf", "BYSCORE", "REV")
        else:
            start = "-inf" if from_ms is None else from_ms
            members = await self._server.run("ZRANGE", key, start, "+inf", "BYSCORE")
        return [member.decode() for member in members]

    async def counts(self) -> Counts:
        """Count everything the buffer holds, over all partitions."""
        return await inspection.count(self._server, self.keyspace)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _accept(self, entry: Acceptance) -> scripts.Call[scripts.AcceptReply]:
        keys = self.keyspace.of(entry.org_id)
        return scripts.accept(
            entry=keys.entry(entry.run_id),
            queue=keys.queue(entry.env_id),
            envs=keys.envs(entry.org_id),
            orgs=keys.orgs,
            seq=keys.seq,
            held=keys.held(entry.env_id),
            binding=[keys.idempotency(binding.digest) for binding in entry.bindings],
            run_id=entry.run_id,
            env_id=entry.env_id,
            org_id=entry.org_id,
            kind=entry.kind,
            payload=entry.payload,
            ttl_ms=self._settings().entry_ttl_s * 1000 if entry.kind is EntryKind.AUDIT else 0,
            created_ms=entry.created_ms,
            token=entry.token,
            digests=",".join(binding.digest for binding in entry.bindings),
            wake=WAKE,
            expires_ms=[binding.expires_ms for binding in entry.bindings],
        )

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

    @staticmethod
    def _reclaim(keys: PartitionKeys, run_id: str, org_id: str, env_id: str) -> scripts.Call[Settlement]:
        return scripts.reclaim(
            entry=keys.entry(run_id),
            queue=keys.queue(env_id),
            envs=keys.envs(org_id),
            orgs=keys.orgs,
            draining=keys.draining,
            failed=keys.failed,
            run_id=run_id,
            env_id=env_id,
            org_id=org_id,
        )

    def _with_keys(self, entries: Iterable[Entry]) -> Iterable[tuple[PartitionKeys, Entry]]:
        return ((self.keyspace.of(entry.org_id), entry) for entry in entries)


def _bindings(keys: PartitionKeys, entry: Entry) -> list[str]:
    return [keys.idempotency(digest) for digest in entry.bindings]


def _owner(reply: Any) -> tuple[str, str]:
    """Return (organization, environment) of an entry; empty names where it is gone or does not read as one."""
    if isinstance(reply, RedisError) or None in reply:
        return "", ""
    return reply[0].decode(), reply[1].decode()


def _accepted(reply: scripts.AcceptReply) -> AcceptOutcome:
    match reply:
        case "accepted", stored, sequence:
            return Accepted(stored, sequence)
        case "duplicate_run", stored, _:
            return DuplicateRun(stored)
        case "duplicate_key", "", _:
            return KeyClaimed()
        case "duplicate_key", winner, _:
            return DuplicateKey(winner)


def _claimed(reply: scripts.ClaimReply) -> ClaimOutcome:
    match reply:
        case "claimed", _:
            return Claimed()
        case "bound", run_id:
            return Bound(run_id)
        case "pending", _:
            return KeyClaimed()


def _one(results: list[T | BufferUnavailableError]) -> T:
    (result,) = results
    if isinstance(result, BufferUnavailableError):
        raise result
    return result


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
    return Popped(tuple(taken), tuple(malformed), reply.dropped)
