"""Putting entries in, changing them, and who the callers' keys belong to."""

from __future__ import annotations

from collections.abc import Sequence

from mollifier import scripts
from mollifier.buffer.outcomes import (
    Acceptance,
    Accepted,
    AcceptOutcome,
    Binding,
    Bound,
    Claimed,
    ClaimOutcome,
    DuplicateKey,
    DuplicateRun,
    KeyClaimed,
    Unconfirmed,
)
from mollifier.buffer.part import Part, one
from mollifier.confirmation import Written
from mollifier.errors import BufferUnavailableError
from mollifier.keys import WAKE, parent_number
from mollifier.model import Entry, EntryKind
from mollifier.scripts import Settlement


class Storing(Part):
    """The part of the buffer that the trigger path writes to."""

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

        Held entries are confirmed where `accept_confirm` asks for it; audit copies, which are not the only ones, never are.
        """
        calls = [self._accept(entry) for entry in entries]
        if self._settings().confirmation.is_asked and any(entry.kind is EntryKind.HELD for entry in entries):
            confirmed = await self._confirmed.run_many(calls)
            return [_confirmed(entry, reply) for entry, reply in zip(entries, confirmed, strict=True)]
        replies = await self._scripts.run_many(calls)
        return [
            reply if isinstance(reply, BufferUnavailableError) else _accepted(entry, reply)
            for entry, reply in zip(entries, replies, strict=True)
        ]

    async def claim(self, org_id: str, digest: str, token: str, lifetime_ms: int) -> ClaimOutcome:
        """Claim one of the caller's keys; see `claim_many`."""
        (outcome,) = await self.claim_many(org_id, [digest], token, lifetime_ms)
        return outcome

    async def claim_many(
        self, org_id: str, digests: Sequence[str], token: str, lifetime_ms: int, void: Sequence[str] = ()
    ) -> Sequence[ClaimOutcome]:
        """Claim keys of one organization in their order, in one round trip; claiming with the same token again prolongs the claim.

        `void` has for each key the run whose binding is worth nothing, or "": that key is claimed as if it were free.
        The first that is somebody else's claim is the last of the answers: none after it has been claimed.
        """
        keys = self.keyspace.of(org_id)
        binding = [keys.idempotency(digest) for digest in digests]
        replies = await self._scripts.run(
            scripts.claim(binding=binding, token=token, lifetime_ms=lifetime_ms, void=void)
        )
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

    def _accept(self, entry: Acceptance) -> scripts.Call[scripts.AcceptReply]:
        keys = self.keyspace.of(entry.org_id)
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


def _confirmed(
    entry: Acceptance,
    reply: Written[scripts.AcceptReply] | BufferUnavailableError,
) -> AcceptOutcome | BufferUnavailableError:
    if isinstance(reply, BufferUnavailableError):
        return reply
    outcome = _accepted(entry, reply.result)
    # What changed nothing wrote nothing: there was nothing to confirm.
    return outcome if reply.confirmed or not isinstance(outcome, Accepted) else Unconfirmed(outcome.run_id)


def _claimed(reply: scripts.ClaimReply) -> ClaimOutcome:
    match reply:
        case "claimed", _:
            return Claimed()
        case "bound", run_id:
            return Bound(run_id)
        case "pending", _:
            return KeyClaimed()
