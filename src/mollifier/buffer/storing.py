"""Putting entries in, changing them, and who the callers' keys belong to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from msgspec.structs import replace
from redis.exceptions import RedisError

from mollifier import scripts
from mollifier.buffer.outcomes import (
    Acceptance,
    Accepted,
    AcceptOutcome,
    Binding,
    Bound,
    Claimed,
    ClaimOutcome,
    Doubted,
    DuplicateKey,
    DuplicateRun,
    KeyClaimed,
    OverCap,
    Unconfirmed,
)
from mollifier.buffer.part import Part, one
from mollifier.buffer.room import Room
from mollifier.caps import Amount, Cap, exceeded, sum_names
from mollifier.confirmation import Written
from mollifier.errors import BufferUnavailableError
from mollifier.keys import WAKE, parent_number
from mollifier.model import Entry, EntryKind
from mollifier.scripts import Settlement
from mollifier.server import Command, Server
from mollifier.settings import Settings


def _loop_s() -> float:
    return asyncio.get_running_loop().time()


class Storing(Part):
    """The part of the buffer that the trigger path writes to. `monotonic` returns seconds; by default it is the running loop's clock."""

    def __init__(
        self, server: Server, settings: Callable[[], Settings], *, monotonic: Callable[[], float] = _loop_s
    ) -> None:
        super().__init__(server, settings)
        self._room = Room(server, self.keyspace, settings, monotonic)

    async def accept(
        self,
        run_id: str,
        env_id: str,
        org_id: str,
        payload: bytes,
        *,
        kind: EntryKind = EntryKind.AUDIT,
        created_us: int = 0,
        bindings: Sequence[Binding] = (),
        token: str = "",
    ) -> AcceptOutcome:
        """Store one entry; see `Acceptance`."""
        return one(
            await self.accept_many(
                [
                    Acceptance(
                        run_id=run_id,
                        env_id=env_id,
                        org_id=org_id,
                        payload=payload,
                        kind=kind,
                        created_us=created_us,
                        bindings=bindings,
                        token=token,
                    )
                ]
            )
        )

    async def accept_many(self, entries: Sequence[Acceptance]) -> list[AcceptOutcome | BufferUnavailableError]:
        """Store entries in one round trip, each by itself: one that cannot be stored harms no other. One outcome each, in order.

        Held entries are confirmed where `accept_confirm` asks for it, and stay within the caps (see `caps.py`); audit copies, which
        are not the only ones, are neither confirmed nor capped.
        """
        holding = any(entry.kind is EntryKind.HELD for entry in entries)
        if holding:
            await self._room.look()
        calls = [self._accept(entry) for entry in entries]
        try:
            outcomes = await self._store(entries, calls, confirmed=holding and self._settings().confirmation.is_asked)
        except BaseException:
            self._room.arrive(entries)
            raise
        self._room.arrive(entries, outcomes)
        return outcomes

    async def confirm(self, org_id: str, run_ids: Sequence[str]) -> bool:
        """Tell whether there are entries of all these runs, and confirmed in time as `accept_confirm` asks; one round trip."""
        keys = self.keyspace.of(org_id)
        # Asked for once more: whatever has told of them may have been a server that has lost them since.
        found = await self._confirmed.read(("EXISTS", *map(keys.entry, run_ids)))
        return found.confirmed and found.result == len(run_ids)

    async def find_over_cap(self, entries: Sequence[Acceptance]) -> Cap | None:
        """Return the first cap that held entries of one environment would exceed if all were stored now; None where they fit.

        One round trip, and nothing changes. What is held already takes no more room.
        """
        await self._room.look()
        env_id, org_id = entries[0].env_id, entries[0].org_id
        keys = self.keyspace.of(org_id)
        asked: list[Command] = [("HGET", keys.entry(entry.run_id), "kind") for entry in entries]
        sums, *kinds = await self._server.run_many([("HMGET", keys.usage, *sum_names(env_id, org_id)), *asked])
        if isinstance(sums, RedisError):
            raise BufferUnavailableError(f"HMGET: {sums}")
        new = [len(entry.payload) for entry, kind in zip(entries, kinds, strict=True) if kind != b"held"]
        return exceeded([int(each or 0) for each in sums], self._room.limits_of(org_id), Amount(len(new), sum(new)))

    async def claim(self, org_id: str, digest: str, token: str, lifetime_ms: int) -> ClaimOutcome:
        """Claim one of the caller's keys; see `claim_many`."""
        (outcome,) = await self.claim_many(org_id, [digest], token, lifetime_ms)
        return outcome

    async def claim_many(
        self,
        org_id: str,
        digests: Sequence[str],
        token: str,
        lifetime_ms: int,
        void: Sequence[str] = (),
        *,
        lease_ms: int | None = None,
    ) -> Sequence[ClaimOutcome]:
        """Claim keys of one organization in their order, in one round trip; claiming with the same token again prolongs the claim.

        Another's claim is waited for until it has not been prolonged for `lease_ms`, by default as long as it lives. It is in doubt from then on.
        `void` has for each key the run whose binding is worth nothing, or "": that key is claimed as if it were free.
        The first that is somebody else's claim is the last of the answers: none after it has been claimed.
        """
        keys = self.keyspace.of(org_id)
        binding = [keys.idempotency(digest) for digest in digests]
        replies = await self._scripts.run(
            scripts.claim(
                binding=binding,
                token=token,
                lifetime_ms=lifetime_ms,
                lease_ms=lifetime_ms if lease_ms is None else lease_ms,
                void=void,
            )
        )
        return [_claimed(reply) for reply in replies]

    async def prolong(self, org_id: str, digests: Sequence[str], token: str, lifetime_ms: int) -> int:
        """Begin the life of claims anew, in one round trip; what is not the claimant's any more stays. Return how many were."""
        keys = self.keyspace.of(org_id)
        binding = [keys.idempotency(digest) for digest in digests]
        return await self._scripts.run(scripts.prolong(binding=binding, token=token, lifetime_ms=lifetime_ms))

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

        Answers `changed` when it is no longer as it was read (others changed it, or it was popped for the first time), `stale` when
        its run exists by now, `missing` when it is gone.
        """
        keys = self.keyspace.of(entry.org_id)
        return await self._scripts.run(
            scripts.patch(
                entry=keys.entry(entry.run_id),
                owners=keys.owners,
                usage=keys.usage,
                binding=[keys.idempotency(digest) for digest in unbind],
                run_id=entry.run_id,
                patches=len(entry.patches),
                patch=patch,
                taken=int(entry.taken),
            )
        )

    async def _store(
        self, entries: Sequence[Acceptance], calls: Sequence[scripts.Call[scripts.AcceptReply]], *, confirmed: bool
    ) -> list[AcceptOutcome | BufferUnavailableError]:
        if confirmed:
            written = await self._confirmed.run_many(calls)
            return [_confirmed(entry, reply) for entry, reply in zip(entries, written, strict=True)]
        replies = await self._scripts.run_many(calls)
        return [
            reply if isinstance(reply, BufferUnavailableError) else _accepted(entry, reply)
            for entry, reply in zip(entries, replies, strict=True)
        ]

    async def mark(self, entry: Entry) -> Settlement:
        """Mark a held entry as taken: whoever reads it from here on has read every change that it will take.

        Answers `stale` when its run exists by now, or will not, `missing` when it is gone.
        """
        key = self.keyspace.of(entry.org_id).entry(entry.run_id)
        return await self._scripts.run(scripts.mark(entry=key))

    def _accept(self, entry: Acceptance) -> scripts.Call[scripts.AcceptReply]:
        keys = self.keyspace.of(entry.org_id)
        most = self._room.leave(entry)
        return scripts.accept(
            entry=keys.entry(entry.run_id),
            queue=keys.queue(entry.env_id),
            envs=keys.envs(entry.org_id),
            orgs=keys.orgs,
            seq=keys.seq,
            held=keys.held(entry.env_id),
            failed=keys.failed,
            owners=keys.owners,
            usage=keys.usage,
            waiting=keys.waiting(entry.env_id),
            draining=keys.draining,
            children=keys.children(entry.env_id),
            binding=[keys.idempotency(binding.digest) for binding in entry.bindings],
            run_id=entry.run_id,
            env_id=entry.env_id,
            org_id=entry.org_id,
            kind=entry.kind,
            payload=entry.payload,
            ttl_ms=self._settings().entry_ttl_s * 1000 if entry.kind is EntryKind.AUDIT else 0,
            created_us=entry.created_us,
            token=entry.token,
            digests=",".join(binding.digest for binding in entry.bindings),
            wake=WAKE,
            parent="" if entry.parent_run_id is None else str(parent_number(entry.parent_run_id)),
            taken=int(entry.taken),
            **most._asdict(),
            expires_ms=[binding.expires_ms for binding in entry.bindings],
        )


def _accepted(entry: Acceptance, reply: scripts.AcceptReply) -> AcceptOutcome:
    match reply:
        case "accepted", stored, sequence:
            return Accepted(stored, sequence)
        case "duplicate_run", stored, _:
            return DuplicateRun(stored)
        case "duplicate_key", "", _:
            return KeyClaimed()
        case "duplicate_key", winner, place:
            return DuplicateKey(winner, entry.bindings[place].digest)
        case "over_cap", cap, _:
            return OverCap(cast("Cap", cap))


def _confirmed(
    entry: Acceptance,
    reply: Written[scripts.AcceptReply] | BufferUnavailableError,
) -> AcceptOutcome | BufferUnavailableError:
    if isinstance(reply, BufferUnavailableError):
        return reply
    match _accepted(entry, reply.result):
        case Accepted(run_id) if not reply.confirmed:
            return Unconfirmed(run_id)
        case DuplicateRun() | DuplicateKey() as held if not reply.confirmed:
            return replace(held, is_confirmed=False)
        case outcome:
            return outcome


def _claimed(reply: scripts.ClaimReply) -> ClaimOutcome:
    match reply:
        case "claimed", _:
            return Claimed()
        case "bound", run_id:
            return Bound(run_id)
        case "doubted", _:
            return Doubted()
        case "pending", _:
            return KeyClaimed()
