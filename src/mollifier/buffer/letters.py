"""Dead letters: listing them, and what an operator does about them. They are looked up by run alone, in all partitions at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from redis.exceptions import RedisError

from mollifier import scripts
from mollifier.buffer.outcomes import Disposal, Revival
from mollifier.buffer.part import Part, members_of, scored
from mollifier.cursors import as_us
from mollifier.entries import Owner, digests_of, named, owner_of
from mollifier.errors import BufferUnavailableError
from mollifier.keys import WAKE, PartitionKeys, parent_number
from mollifier.letters import Letter, LetterPage, LetterPlace, Remains, letter_of
from mollifier.server import Command

READ_BYTES_MAX = 4 * 1024 * 1024
"""So much of entries is read at once to look into them; of those that are beyond it no more than what stands beside the payload."""
_BESIDE_THE_PAYLOAD = ("state", "kind", "org", "env", "seq", "accepted_ms", "attempts", "reclaims", "bindings", "error")
_CHUNK = 200
_CHUNKS_MAX = 20


class _Dead(msgspec.Struct, frozen=True):
    """A dead letter as it is listed, and its partition."""

    keys: PartitionKeys
    place: LetterPlace


class _Sized(msgspec.Struct, frozen=True):
    """A dead letter of which it is known whose it is, and how much there is to read."""

    dead: _Dead
    owner: Owner | None
    payload_bytes: int | None

    @property
    def entry_bytes(self) -> int:
        """About what the entry takes, its changes included."""
        return max(self.payload_bytes or 0, (self.owner and self.owner.held_bytes) or 0)


class Letters(Part):
    """The part of the buffer that keeps dead letters."""

    async def list_letters(
        self,
        *,
        org_id: str | None = None,
        env_id: str | None = None,
        beyond: LetterPlace | None = None,
        limit: int = 100,
    ) -> LetterPage:
        """Return up to `limit` dead letters, newest first, beyond a place; of one organization or environment, where asked for.

        Three round trips. Asked for some only, it looks through 4,000 letters at most, in two round trips for each 200: the page then may
        be short, or empty, and have a next one all the same. Payloads are left out.
        """
        partitions = self.keyspace.partitions if org_id is None else (self.keyspace.of(org_id),)
        is_filtered = org_id is not None or env_id is not None
        size = max(limit, _CHUNK) if is_filtered else limit
        wanted: list[_Sized] = []
        for _ in range(_CHUNKS_MAX if is_filtered else 1):
            listed = await self._listed(partitions, beyond, size)
            wanted += [each for each in await self._sized(listed) if _is_of(each.owner, org_id, env_id)]
            beyond = listed[-1].place if len(listed) == size else None
            if len(wanted) > limit:
                wanted, beyond = wanted[:limit], wanted[limit - 1].dead.place
            if beyond is None or len(wanted) == limit:
                break
        letters = [letter_of(remains) for remains in await self._remains(wanted)]
        return LetterPage(tuple(map(_without_payload, letters)), beyond)

    async def get_letter(self, run_id: str) -> Letter | None:
        """Return one dead letter with its payload, None when there is none of this run. Two round trips."""
        for dead in await self._located([run_id]):
            questions: list[Command] = [("HGETALL", dead.keys.entry(run_id)), ("HGET", dead.keys.owners, run_id)]
            reply, record = await self._server.run_many(questions)
            fields = _fields(reply)
            owner = self._owner(dead.keys, record, *((fields or {}).get(name) for name in ("org", "env")))
            return letter_of(Remains(place=dead.place, owner=owner, fields=fields))
        return None

    async def revive_many(self, run_ids: Sequence[str]) -> list[Revival | BufferUnavailableError]:
        """Put dead letters back to their places in their queues, as if nobody had tried them yet. One outcome each, in order.

        Four round trips. Each by itself: one that cannot be revived is left as it is, and harms no other.
        """
        found = await self._opened(run_ids)
        replies = await self._scripts.run_many([self._revive(dead, remains) for dead, remains in found])
        outcomes = {
            dead.place.run_id: reply
            if isinstance(reply, BufferUnavailableError)
            else Revival(dead.place.run_id, reply, _without_payload(letter_of(remains)), remains.fault)
            for (dead, remains), reply in zip(found, replies, strict=True)
        }
        return [outcomes.get(run_id) or Revival(run_id, "missing") for run_id in run_ids]

    async def discard_many(self, run_ids: Sequence[str]) -> list[Disposal | BufferUnavailableError]:
        """Drop dead letters for good, with all that is left of their entries. One outcome each, in order; four round trips."""
        found = await self._opened(run_ids)
        replies = await self._scripts.run_many([self._discard(dead, remains) for dead, remains in found])
        outcomes = {
            dead.place.run_id: reply
            if isinstance(reply, BufferUnavailableError)
            else Disposal(dead.place.run_id, reply, _without_payload(letter_of(remains)))
            for (dead, remains), reply in zip(found, replies, strict=True)
        }
        return [outcomes.get(run_id) or Disposal(run_id, "missing") for run_id in run_ids]

    # --- reading ---------------------------------------------------------------------------------------------------

    async def _listed(self, partitions: Sequence[PartitionKeys], beyond: LetterPlace | None, limit: int) -> list[_Dead]:
        """Return the newest dead letters beyond a place, in one round trip. Those of that very millisecond are read whole."""
        start = "+inf" if beyond is None else f"({beyond.died_at_ms}"
        reads: list[Command] = [
            ("ZRANGE", keys.failed, start, "-inf", "BYSCORE", "REV", "LIMIT", 0, limit, "WITHSCORES")
            for keys in partitions
        ]
        if beyond is not None:
            at_ms = beyond.died_at_ms
            reads += [("ZRANGE", keys.failed, at_ms, at_ms, "BYSCORE", "REV", "WITHSCORES") for keys in partitions]
        replies = [members_of(reply) for reply in await self._server.run_many(reads)]
        found = [
            _Dead(keys, LetterPlace(*place))
            for keys, members in zip((*partitions, *partitions), replies, strict=False)
            for place in scored(members)
        ]
        further = [dead for dead in found if beyond is None or dead.place < beyond]
        return sorted(further, key=lambda dead: dead.place, reverse=True)[:limit]

    async def _located(self, run_ids: Sequence[str]) -> list[_Dead]:
        """Return those of the runs that are dead letters, wherever they are, in one round trip."""
        sought = list(dict.fromkeys(run_ids))
        if not sought:
            return []
        partitions = self.keyspace.partitions
        replies = await self._server.run_many([("ZMSCORE", keys.failed, *sought) for keys in partitions])
        return [
            _Dead(keys, LetterPlace(int(float(score)), run_id))
            for keys, scores in zip(partitions, replies, strict=True)
            for run_id, score in zip(sought, members_of(scores), strict=True)
            if score is not None
        ]

    async def _sized(self, listed: Sequence[_Dead]) -> list[_Sized]:
        questions: list[Command] = []
        for dead in listed:
            entry = dead.keys.entry(dead.place.run_id)
            questions += (
                ("HMGET", entry, "org", "env"),
                ("HSTRLEN", entry, "payload"),
                ("HGET", dead.keys.owners, dead.place.run_id),
            )
        replies = iter(await self._server.run_many(questions))
        sized: list[_Sized] = []
        for dead, ids, size, record in zip(listed, replies, replies, replies, strict=True):
            org, env = (None, None) if isinstance(ids, RedisError) else ids
            owner = self._owner(dead.keys, record, org, env)
            sized.append(_Sized(dead, owner, size if isinstance(size, int) else None))
        return sized

    async def _remains(self, sized: Sequence[_Sized]) -> list[Remains]:
        """Return what is left of their entries, in one round trip: whole, as far as they are small enough together."""
        questions: list[Command] = []
        whole: list[bool] = []
        left_bytes = READ_BYTES_MAX
        for each in sized:
            entry = each.dead.keys.entry(each.dead.place.run_id)
            whole.append(each.entry_bytes <= left_bytes)
            left_bytes -= each.entry_bytes if whole[-1] else 0
            questions.append(("HGETALL", entry) if whole[-1] else ("HMGET", entry, *_BESIDE_THE_PAYLOAD))
        replies = await self._server.run_many(questions)
        return [
            Remains(
                place=each.dead.place,
                owner=each.owner,
                fields=_fields(reply) if is_whole else _fields_beside(reply),
                is_whole=is_whole,
                unread_bytes=None if is_whole else each.payload_bytes,
            )
            for each, is_whole, reply in zip(sized, whole, replies, strict=True)
        ]

    async def _opened(self, run_ids: Sequence[str]) -> list[tuple[_Dead, Remains]]:
        located = await self._located(run_ids)
        return list(zip(located, await self._remains(await self._sized(located)), strict=True))

    def _owner(self, keys: PartitionKeys, record: Any, org: bytes | None, env: bytes | None) -> Owner | None:
        """Return whose an entry is; an organization of another partition is damage, nobody's name."""
        owner = owner_of(record, org, env)
        return owner if owner is not None and self.keyspace.of(owner.org_id) == keys else None

    # --- changing --------------------------------------------------------------------------------------------------

    def _revive(self, dead: _Dead, remains: Remains) -> scripts.Call[scripts.ReviveReply]:
        keys, run_id = dead.keys, dead.place.run_id
        org_id, env_id = _ids(remains.owner)
        return scripts.revive(
            entry=keys.entry(run_id),
            queue=keys.queue(env_id),
            waiting=keys.waiting(env_id),
            envs=keys.envs(org_id),
            orgs=keys.orgs,
            draining=keys.draining,
            failed=keys.failed,
            held=keys.held(env_id),
            owners=keys.owners,
            usage=keys.usage,
            children=keys.children(env_id),
            run_id=run_id,
            env_id=env_id,
            org_id=org_id,
            created_us=_created_us(remains),
            parent=_parent(remains),
            wake=WAKE,
        )

    def _discard(self, dead: _Dead, remains: Remains) -> scripts.Call[scripts.DiscardReply]:
        keys, run_id = dead.keys, dead.place.run_id
        _, env_id = _ids(remains.owner)
        return scripts.discard(
            entry=keys.entry(run_id),
            queue=keys.queue(env_id),
            waiting=keys.waiting(env_id),
            draining=keys.draining,
            failed=keys.failed,
            held=keys.held(env_id),
            owners=keys.owners,
            usage=keys.usage,
            children=keys.children(env_id),
            binding=[keys.idempotency(digest) for digest in digests_of((remains.fields or {}).get("bindings"))],
            run_id=run_id,
        )


def _is_of(owner: Owner | None, org_id: str | None, env_id: str | None) -> bool:
    if owner is None:
        return org_id is None and env_id is None
    return org_id in (None, owner.org_id) and env_id in (None, owner.env_id)


def _ids(owner: Owner | None) -> tuple[str, str]:
    """Return (organization, environment), empty where they are not known."""
    return ("", "") if owner is None else (owner.org_id, owner.env_id)


def _fields(reply: Any) -> Mapping[str, bytes] | None:
    """Return the fields of a hash that was read whole: None when there is none, no fields of a key that holds something else."""
    if isinstance(reply, RedisError):
        return {}
    return named(reply) if reply else None


def _fields_beside(reply: Any) -> Mapping[str, bytes] | None:
    pairs: Iterator[tuple[str, bytes | None]] = zip(_BESIDE_THE_PAYLOAD, reply, strict=True)
    return {name: value for name, value in pairs if value is not None} or None


def _created_us(remains: Remains) -> int:
    """Return the moment of the trigger; where its payload does not tell, that of its acceptance is near."""
    snapshot = remains.snapshot
    if snapshot is not None:
        return as_us(snapshot.created_at)
    return (letter_of(remains).accepted_at_ms or 0) * 1000


def _parent(remains: Remains) -> str:
    """Return what its parent's children are found by; where its payload does not tell, nothing."""
    parent = remains.snapshot.parent_run_id if remains.snapshot is not None else None
    return "" if parent is None else str(parent_number(parent))


def _without_payload(letter: Letter) -> Letter:
    return msgspec.structs.replace(letter, payload=None)
