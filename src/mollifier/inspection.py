"""Looking into the buffer: entries by run id, what it holds in all, and whose that is. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from redis.exceptions import RedisError

from mollifier.caps import Amount, Usage
from mollifier.entries import parse
from mollifier.errors import MalformedEntryError
from mollifier.keys import Keyspace, PartitionKeys
from mollifier.model import Entry
from mollifier.server import Server

STALLED_MS = 30_000
"""A queued entry that is older than this waits longer than any drainer at work lets it."""


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


async def entries(
    server: Server, keys: PartitionKeys, run_ids: Sequence[str]
) -> list[Entry | MalformedEntryError | None]:
    """Return the entries of these runs in one round trip: None where there is none, an error where one does not parse."""
    hashes = await server.run_many([("HGETALL", keys.entry(run_id)) for run_id in run_ids])
    return [parse(run_id, fields) for run_id, fields in zip(run_ids, hashes, strict=True)]


async def count(server: Server, keyspace: Keyspace) -> Counts:
    """Count everything in the buffer. A handful of round trips, whatever it holds."""
    now_ms = await server.now_ms()
    organizations = await _members(server, [(keys, keys.orgs) for keys in keyspace.partitions])
    environments = await _members(server, [(keys, keys.envs(org_id)) for keys, org_id in organizations])
    totals, heads = await _queues(server, environments)
    # In the order in which entries move on, so that one that moves meanwhile is counted twice rather than not at all.
    draining = await server.run_many([("ZCARD", keys.draining) for keys in keyspace.partitions])
    failed = await server.run_many([("ZCARD", keys.failed) for keys in keyspace.partitions])
    accepted = await server.run_many([("HGET", keys.entry(run_id), "accepted_ms") for keys, run_id in heads])
    moments = [int(moment) for moment in accepted if isinstance(moment, bytes) and moment.isdigit()]
    return Counts(
        queued=totals["queued"],
        waiting=totals["waiting"],
        draining=sum(_number(reply) for reply in draining),
        failed=sum(_number(reply) for reply in failed),
        organizations=tuple(sorted(org_id for _, org_id in organizations)),
        oldest_ms=max(0, now_ms - min(moments)) if moments else None,
    )


async def held_sums(server: Server, keyspace: Keyspace) -> Mapping[int, Amount]:
    """Return how much is held in each partition, as its script of the last change has it. One round trip."""
    replies = await server.run_many([("HMGET", keys.usage, "entries", "bytes") for keys in keyspace.partitions])
    # A reply that is an error speaks of a key that somebody has spoilt; what cannot be read fills nothing.
    read = [(None, None) if isinstance(reply, RedisError) else reply for reply in replies]
    sums = zip(keyspace.partitions, read, strict=True)
    return {keys.number: Amount(int(entries or 0), int(by or 0)) for keys, (entries, by) in sums}


async def usage(server: Server, keyspace: Keyspace) -> Usage:
    """Return how much is held, in all, by organization and by environment. One round trip; as much to read as environments hold."""
    replies = await server.run_many([("HGETALL", keys.usage) for keys in keyspace.partitions])
    found: dict[tuple[str, str], dict[str, int]] = {}
    for reply in replies:
        sums: Mapping[bytes, bytes] = {} if isinstance(reply, RedisError) else reply
        for name, number in sums.items():
            noun, scope, owner_id = (*name.decode().split(":", 2), "", "")[:3]
            amount = found.setdefault((scope, owner_id), {"entries": 0, "bytes": 0})
            amount[noun] += int(number)

    def of(scope: str) -> Mapping[str, Amount]:
        return {owner_id: Amount(**amount) for (each, owner_id), amount in found.items() if each == scope}

    return Usage(of("").get("", Amount()), of("org"), of("env"))


async def _members(server: Server, sets: Sequence[tuple[PartitionKeys, str]]) -> list[tuple[PartitionKeys, str]]:
    replies = await server.run_many([("ZRANGE", key, 0, -1) for _, key in sets])
    return [
        (keys, member.decode()) for (keys, _), members in zip(sets, replies, strict=True) for member in listed(members)
    ]


async def _queues(
    server: Server, environments: Sequence[tuple[PartitionKeys, str]]
) -> tuple[Counter[str], list[tuple[PartitionKeys, str]]]:
    """Return how many runs are queued and waiting, and the run at the head of each queue."""
    totals: Counter[str] = Counter()
    for noun, of in (("queued", PartitionKeys.queue), ("waiting", PartitionKeys.waiting)):
        sizes = await server.run_many([("ZCARD", of(keys, env_id)) for keys, env_id in environments])
        totals[noun] = sum(_number(size) for size in sizes)
    firsts = await server.run_many([("ZRANGE", keys.queue(env_id), 0, 0) for keys, env_id in environments])
    heads = [
        (keys, first[0].decode())
        for (keys, _), first in zip(environments, firsts, strict=True)
        if first and not isinstance(first, RedisError)
    ]
    return totals, heads


def listed(reply: Any) -> list[bytes]:
    """Return a list reply; a set that answers an error has no members."""
    return [] if isinstance(reply, RedisError) else reply


def _number(reply: Any) -> int:
    return reply if isinstance(reply, int) else 0
