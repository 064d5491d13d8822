"""Looking through everything that is held, in bounded pieces, and putting right what does not fit together.

A sorted set is walked by score: members that leave or come meanwhile cost no other its turn. The hashes of records and sums have no
order to walk by. What they name is found in three ways: the sums name each environment that has anything held; the walked sets name
its runs; and a few records are drawn at random, for what both have lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec
from redis.exceptions import RedisError

from mollifier import scripts
from mollifier.buffer.outcomes import Ready
from mollifier.buffer.part import Part
from mollifier.entries import owner_of, parse_owner
from mollifier.errors import BufferUnavailableError
from mollifier.inspection import listed
from mollifier.keys import PartitionKeys
from mollifier.scripts import IndexVerdict, Restored

CHUNK = 100
"""How many runs one script looks at: it keeps the server from everybody else for so long."""
_DRAWN = 32
_HEADS = 20
_ENTRIES_OF_ENV = "entries:env:"


class Cursor(NamedTuple):
    """How far a sorted set was walked: to this score, of which so many members were seen."""

    score: float
    seen: int


START = Cursor(float("-inf"), 0)


class Chunk(NamedTuple):
    """The members of a sorted set from a place on, with their scores."""

    at: Cursor
    members: Sequence[tuple[str, float]]

    def beyond(self, removed: Collection[str] = ()) -> Cursor | None:
        """Return where to go on, None at the end; `removed` are members that have left meanwhile."""
        if len(self.members) < CHUNK:
            return None
        score = self.members[-1][1]
        seen = sum(each == score and member not in removed for member, each in self.members)
        return Cursor(score, seen + (self.at.seen if score == self.at.score else 0))


class Look(NamedTuple):
    """Runs of one environment, in one partition, to look at; of each the member of `waiting` that named it, or ""."""

    keys: PartitionKeys
    environment: Ready
    runs: Sequence[tuple[str, str]] = ()


class Survey(msgspec.Struct, frozen=True):
    """What a partition has: its sums, the environments that are known of, with records drawn at random of each, and what is odd.

    `idle` are organizations in the ready index without any environment there; `unowned` environments that have sums, and nothing that
    tells their organization.
    """

    now_ms: int
    usage: Mapping[str, int]
    environments: Mapping[Ready, Sequence[str]]
    idle: Sequence[str]
    unowned: Sequence[str]


class Mending(Part):
    """The part of the buffer that the sweeper goes through."""

    async def survey(self, keys: PartitionKeys) -> Survey:
        """Return what the partition has. Six round trips at most, the largest of which names all of its environments."""
        now_ms = await self._server.now_ms()
        usage, organizations, drawn = await self._server.run_many(
            [
                ("HGETALL", keys.usage),
                ("ZRANGE", keys.orgs, 0, -1),
                ("HRANDFIELD", keys.owners, _DRAWN, "WITHVALUES"),
            ]
        )
        environments, idle = await self._indexed(keys, [org_id.decode() for org_id in listed(organizations)])
        for run_id, record in _pairs(drawn):
            owner = parse_owner(record)
            if owner is not None:
                environments.setdefault(Ready(owner.org_id, owner.env_id), []).append(run_id.decode())
        sums = _sums(usage)
        known = {environment.env_id for environment in environments}
        summed = [name.removeprefix(_ENTRIES_OF_ENV) for name in sums if name.startswith(_ENTRIES_OF_ENV)]
        owned = await self._owned(keys, [env_id for env_id in summed if env_id not in known])
        for env_id, org_id in owned.items():
            if org_id is not None:
                environments.setdefault(Ready(org_id, env_id), [])
        return Survey(
            now_ms=now_ms,
            usage=sums,
            environments=environments,
            idle=idle,
            unowned=[env_id for env_id, org_id in owned.items() if org_id is None],
        )

    async def chunks(self, walks: Sequence[tuple[str, Cursor]]) -> list[Chunk]:
        """Return the next members of each sorted set, up to a hundred. A key that is none has no members."""
        replies = await self._server.run_many(
            [
                ("ZRANGE", key, repr(at.score), "+inf", "BYSCORE", "LIMIT", at.seen, CHUNK, "WITHSCORES")
                for key, at in walks
            ]
        )
        return [
            Chunk(at, [(member.decode(), float(score)) for member, score in _pairs(reply)])
            for reply, (_, at) in zip(replies, walks, strict=True)
        ]

    async def restore_many(self, looks: Sequence[Look], *, stalled_ms: int) -> list[Restored | BufferUnavailableError]:
        """Put runs back to their places, each environment's by itself; see `lua/restore.lua`. One round trip.

        Queued entries that have been due for longer than `stalled_ms` count as stale.
        """
        return await self._scripts.run_many([self._restore(look, stalled_ms) for look in looks])

    async def repair_many(
        self, environments: Sequence[Ready]
    ) -> list[tuple[IndexVerdict, IndexVerdict] | BufferUnavailableError]:
        """Put the ready index right about environments and their organizations; see `lua/repair.lua`. One round trip."""
        return await self._scripts.run_many([self._repair(each.org_id, each.env_id) for each in environments])

    async def vanished(self, keys: PartitionKeys, run_ids: Sequence[str]) -> Mapping[str, bool]:
        """Return those of the runs that have no entry, and of each whether there is a record of it."""
        if not run_ids:
            return {}
        (there,) = await self._server.run_many([("EXISTS", *(keys.entry(run_id) for run_id in run_ids))])
        if there == len(run_ids):
            return {}
        questions = [(("EXISTS", keys.entry(run_id)), ("HGET", keys.owners, run_id)) for run_id in run_ids]
        replies = await self._server.run_many([question for pair in questions for question in pair])
        found = zip(run_ids, replies[::2], replies[1::2], strict=True)
        return {run_id: record is not None for run_id, has_entry, record in found if has_entry == 0}

    async def now_ms(self) -> int:
        """Return the server's clock, milliseconds since the epoch."""
        return await self._server.now_ms()

    async def dead_letters(self, keys: PartitionKeys) -> int:
        """Return how many dead letters the partition keeps."""
        (number,) = await self._server.run_many([("ZCARD", keys.failed)])
        return number if isinstance(number, int) else 0

    # --- what is known of ------------------------------------------------------------------------------------------

    async def _indexed(
        self, keys: PartitionKeys, organizations: Sequence[str]
    ) -> tuple[dict[Ready, list[str]], list[str]]:
        replies = await self._server.run_many([("ZRANGE", keys.envs(org_id), 0, -1) for org_id in organizations])
        members = {org_id: listed(reply) for org_id, reply in zip(organizations, replies, strict=True)}
        environments: dict[Ready, list[str]] = {
            Ready(org_id, env_id.decode()): [] for org_id, found in members.items() for env_id in found
        }
        return environments, [org_id for org_id, found in members.items() if not found]

    async def _owned(self, keys: PartitionKeys, env_ids: Sequence[str]) -> Mapping[str, str | None]:
        """Return the organization of each environment, by what is known of its oldest held runs."""
        heads = await self._server.run_many([("ZRANGE", keys.held(env_id), 0, _HEADS - 1) for env_id in env_ids])
        runs = [
            (env_id, run_id.decode()) for env_id, head in zip(env_ids, heads, strict=True) for run_id in listed(head)
        ]
        records = await self._server.run_many([("HGET", keys.owners, run_id) for _, run_id in runs])
        fields = await self._server.run_many([("HMGET", keys.entry(run_id), "org", "env") for _, run_id in runs])
        owners: dict[str, str | None] = dict.fromkeys(env_ids)
        for (env_id, _), record, found in zip(runs, records, fields, strict=True):
            owner = owner_of(record, *((None, None) if isinstance(found, RedisError) else found))
            if owner is not None and owner.env_id == env_id:
                owners[env_id] = owners[env_id] or owner.org_id
        return owners

    def _repair(self, org_id: str, env_id: str) -> scripts.Call[tuple[IndexVerdict, IndexVerdict]]:
        keys = self.keyspace.of(org_id)
        return scripts.repair(
            queue=keys.queue(env_id),
            waiting=keys.waiting(env_id),
            envs=keys.envs(org_id),
            orgs=keys.orgs,
            env_id=env_id,
            org_id=org_id,
        )

    def _restore(self, look: Look, stalled_ms: int) -> scripts.Call[Restored]:
        keys, org_id, env_id = look.keys, look.environment.org_id, look.environment.env_id
        return scripts.restore(
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
            seq=keys.seq,
            entry=[keys.entry(run_id) for run_id, _ in look.runs],
            env_id=env_id,
            org_id=org_id,
            lease_ms=self._settings().lease_ms,
            stalled_ms=stalled_ms,
            runs=[text for run in look.runs for text in run],
        )


def _pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """Return pairs that come as such in RESP3, and as a flat list in RESP2; what answers an error has none."""
    members = listed(reply)
    if members and isinstance(members[0], list):
        return [(first, second) for first, second in cast("list[list[bytes]]", members)]
    return list(zip(members[::2], members[1::2], strict=True))


def _sums(reply: Any) -> Mapping[str, int]:
    if isinstance(reply, RedisError):
        return {}
    fields = cast("Mapping[bytes, bytes]", reply).items()
    return {name.decode(): int(number) for name, number in fields if number.isdigit()}
