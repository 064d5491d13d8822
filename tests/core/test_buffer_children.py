"""Held children: found by their parent, in one question, for as long as they are held."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Acceptance, Accepted, Buffer
from mollifier.keys import PartitionKeys
from mollifier.model import EntryKind
from mollifier.server import Command, Reply, Server
from tests.core.support import ENV, ORG, SETTINGS, execute, expire_lease, take

pytestmark = pytest.mark.leaves_keys


class CountingServer(Server):
    """Notes what is asked, one list for each round trip."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.asked: list[Sequence[Command]] = []

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        self.asked.append(commands)
        return await super().run_many(commands)


async def hold_children(buffer: Buffer, parent: str | None, *run_ids: str, kind: EntryKind = EntryKind.HELD) -> None:
    entries = [
        Acceptance(run_id=run_id, env_id=ENV, org_id=ORG, payload=b"", kind=kind, parent_run_id=parent)
        for run_id in run_ids
    ]
    assert all(isinstance(outcome, Accepted) for outcome in await buffer.accept_many(entries))


async def children(buffer: Buffer, parent: str, limit: int = 100) -> list[str]:
    return await buffer.held_children(ORG, ENV, parent, limit)


async def test_children_are_found_in_one_command_among_any_number_of_others(redis_client: Redis) -> None:
    server = CountingServer(redis_client)
    buffer = Buffer(server, lambda: SETTINGS)
    await hold_children(buffer, None, *(f"other-{n}" for n in range(500)))
    await hold_children(buffer, "stranger", *(f"theirs-{n}" for n in range(500)))
    await hold_children(buffer, "parent", "a", "b", "c")
    server.asked.clear()

    assert await children(buffer, "parent") == ["a", "b", "c"]
    assert [len(commands) for commands in server.asked] == [1]
    assert await children(buffer, "parent", limit=2) == ["a", "b"]
    assert await children(buffer, "a") == []
    assert await buffer.held_children(ORG, "env-2", "parent", 100) == []


async def test_a_child_is_known_until_its_run_exists(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    await hold_children(buffer, "parent", "a", "b")
    entry = await take(buffer)
    assert await children(buffer, "parent") == ["a", "b"]
    assert await buffer.requeue(entry) == "held"
    assert await children(buffer, "parent") == ["a", "b"]
    entry = await take(buffer)
    await expire_lease(redis_client, keys, "a")
    await buffer.reclaim_expired()
    assert await children(buffer, "parent") == ["a", "b"]

    assert await buffer.ack(await take(buffer)) == "held"
    assert await children(buffer, "parent") == ["b"]
    # A dead letter is still a run that shows.
    assert await buffer.fail(await take(buffer), "error") == "held"
    assert await children(buffer, "parent") == ["b"]
    await buffer.discard_many(["b"])
    assert await children(buffer, "parent") == []


async def test_nothing_is_left_of_children_once_none_is_held(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold_children(buffer, "parent", "a")
    await hold_children(buffer, "other", "b")
    await hold_children(buffer, "parent", "copy", kind=EntryKind.AUDIT)
    assert await children(buffer, "parent") == ["a"]
    for _ in range(3):
        assert await buffer.ack(await take(buffer)) == "held"

    assert await execute(redis_client, "EXISTS", keys.children(ENV)) == 0


@pytest.mark.parametrize("noticed_by", ["pop", "requeue", "fail", "reclaim"])
async def test_a_child_whose_entry_vanished_is_none_once_that_is_noticed(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, noticed_by: str
) -> None:
    await hold_children(buffer, "parent", "gone", "next")
    entry = await take(buffer) if noticed_by != "pop" else None
    await execute(redis_client, "DEL", keys.entry("gone"))
    match noticed_by:
        case "requeue" if entry is not None:
            await buffer.requeue(entry)
        case "fail" if entry is not None:
            await buffer.fail(entry, "error")
        case "reclaim":
            await expire_lease(redis_client, keys, "gone")
            await buffer.reclaim_expired()
        case _:
            assert (await take(buffer)).run_id == "next"

    assert await children(buffer, "parent") == ["next"]
