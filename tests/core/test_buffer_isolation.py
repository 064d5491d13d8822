"""Isolation: whatever ids contain, no environment or organization reaches another's entries."""

from __future__ import annotations

import itertools

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.keys import Keyspace
from tests.core.support import ORG, drain_ids, hold, take

AWKWARD = [
    "a",
    "a:b",
    "a:",
    ":a",
    "a:b:c",
    "{a}",
    "{",
    "}",
    "{}",
    "p00",
    "{p00}",
    "a b",
    "é",
    "e\u0301",
    "\U0001f4a5",
    "A",
    "a\n",
]


async def test_environments_with_awkward_ids_keep_their_entries_apart(buffer: Buffer) -> None:
    for env in AWKWARD:
        await hold(buffer, f"first of {env}", f"second of {env}", env=env)
    assert set((await buffer.ready())[ORG]) == set(AWKWARD)
    for env in AWKWARD:
        assert await drain_ids(buffer, env=env) == [f"first of {env}", f"second of {env}"]
    assert await buffer.ready() == {}


async def test_organizations_with_awkward_ids_keep_their_entries_apart(buffer: Buffer) -> None:
    for org in AWKWARD:
        await hold(buffer, f"run of {org}", env=f"env of {org}", org=org)
    assert await buffer.ready() == {org: (f"env of {org}",) for org in AWKWARD}
    assert set((await buffer.counts()).organizations) == set(AWKWARD)
    for org in AWKWARD:
        assert await drain_ids(buffer, env=f"env of {org}", org=org) == [f"run of {org}"]


async def test_runs_with_awkward_ids_are_found_again(buffer: Buffer) -> None:
    await hold(buffer, *AWKWARD)
    for run_id in AWKWARD:
        entry = await take(buffer)
        assert entry.run_id == run_id
        assert await buffer.requeue(entry, not_before_ms=1) == "held"
        again = await take(buffer)
        assert again.run_id == run_id
        assert await buffer.ack(again) == "held"


async def test_a_run_is_not_found_under_another_organization_of_its_partition(buffer: Buffer) -> None:
    await hold(buffer, "run")
    neighbour = next(
        org for org in (f"org-{n}" for n in itertools.count()) if buffer.keyspace.of(org) == buffer.keyspace.of(ORG)
    )
    assert await buffer.get_entry(neighbour, "run") is None
    assert await buffer.get_entries(neighbour, ["run"]) == [None]


@pytest.mark.parametrize("partitions", [1, 2, 64, 1024])
async def test_all_keys_of_an_organization_are_in_its_partition(partitions: int, redis_client: Redis) -> None:
    keyspace = Keyspace(partitions)
    for org in AWKWARD:
        assert keyspace.of(org) in keyspace.partitions
        assert keyspace.of(org) == Keyspace(partitions).of(org)
