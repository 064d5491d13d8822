"""How much is held: the sums are those of the records, whatever becomes of an entry, and a held entry that vanished is missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.buffer import Buffer, DuplicateRun, Popped, Ready, Reclaimed
from mollifier.entries import Owner, parse_owner
from mollifier.keys import PartitionKeys
from mollifier.model import Entry, EntryKind
from mollifier.scripts import Settlement
from tests.core.support import ENV, ORG, execute, expire_lease, hold, state_of, take

HELD, AUDIT = EntryKind.HELD, EntryKind.AUDIT

pytestmark = pytest.mark.leaves_keys

Settle = Callable[[Buffer, Entry], Awaitable[Settlement]]


async def usage(redis: Redis, keys: PartitionKeys) -> dict[str, int]:
    fields = (await state_of(redis)).get(keys.usage, {})
    return {name.decode(): int(value) for name, value in fields.items()}


async def owners(redis: Redis, keys: PartitionKeys) -> dict[str, Owner | None]:
    fields = (await state_of(redis)).get(keys.owners, {})
    return {run_id.decode(): parse_owner(record) for run_id, record in fields.items()}


async def vanish(redis: Redis, keys: PartitionKeys, *run_ids: str) -> None:
    for run_id in run_ids:
        assert await execute(redis, "DEL", keys.entry(run_id)) == 1


# --- sums ----------------------------------------------------------------------------------------------------------


async def test_what_is_held_is_summed_in_all_by_organization_and_by_environment(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", kind=HELD, payload=b"12345")
    await hold(buffer, "b", kind=HELD, payload=b"123", env="other:env")
    assert await usage(redis_client, keys) == {
        "entries": 2,
        "bytes": 8,
        f"entries:org:{ORG}": 2,
        f"bytes:org:{ORG}": 8,
        f"entries:env:{ENV}": 1,
        f"bytes:env:{ENV}": 5,
        "entries:env:other:env": 1,
        "bytes:env:other:env": 3,
    }
    assert await owners(redis_client, keys) == {"a": Owner(ORG, ENV, 5), "b": Owner(ORG, "other:env", 3)}


async def test_audit_copies_are_in_no_sum(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    await hold(buffer, "copy", kind=AUDIT)
    assert (await usage(redis_client, keys), await owners(redis_client, keys)) == ({}, {})


async def test_a_run_that_is_accepted_twice_counts_once(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    before = await usage(redis_client, keys)
    assert await buffer.accept("run", ENV, ORG, b"more bytes", kind=HELD) == DuplicateRun("run")
    assert await usage(redis_client, keys) == before


async def test_an_entry_counts_until_its_run_exists_and_no_longer(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    before = await usage(redis_client, keys)
    assert await buffer.requeue(await take(buffer)) == "held"
    entry = await take(buffer)
    assert await usage(redis_client, keys) == before
    assert await buffer.ack(entry) == "held"
    assert await usage(redis_client, keys) == {}
    assert await buffer.ack(entry) == "stale"
    assert await usage(redis_client, keys) == {}


async def test_an_entry_that_was_given_up_takes_its_room_on(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    before = await usage(redis_client, keys)
    assert await buffer.fail(await take(buffer), "error") == "held"
    assert await usage(redis_client, keys) == before
    assert [place.run_id for place in await buffer.held_places(ORG, ENV)] == ["run"]


async def test_the_changes_of_a_held_run_count_with_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD, payload=b"12345")
    entry = await take(buffer)
    assert await buffer.patch(entry, b"123") == "held"
    assert await buffer.patch(entry, b"refused, for it has changed") == "changed"
    assert (await usage(redis_client, keys))["bytes"] == 8
    changed = await buffer.get_entry(ORG, "run")
    assert changed is not None
    assert await buffer.ack(changed) == "held"
    assert await usage(redis_client, keys) == {}


ids = st.text(min_size=1, max_size=8) | st.sampled_from(["a:b", ":", "1:2:3", "\n", "\0", "0\0", "\N{SNOWMAN}"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(st.tuples(ids, ids, st.binary(max_size=20), st.integers(0, 3)), min_size=1, max_size=12),
)
async def test_the_sums_are_those_of_what_is_held_whatever_the_ids_contain_and_whatever_became_of_it(
    *, buffer: Buffer, redis_client: Redis, entries: list[tuple[str, str, bytes, int]]
) -> None:
    await execute(redis_client, "FLUSHALL")
    expected: Counter[str] = Counter()
    for number, (org, env_name, payload, fate) in enumerate(entries):
        env = f"{org}/{env_name}"
        run_id = f"run-{number}"
        await buffer.accept(run_id, env, org, payload, kind=HELD)
        size = len(payload)
        if fate == 1:
            popped = await buffer.get_entry(org, run_id)
            assert popped is not None
            assert await buffer.patch(popped, b"patch") == "held"
            size += len(b"patch")
        if fate == 2:
            (popped,) = await buffer.pop_many([(Ready(org, env), 100)])
            assert isinstance(popped, Popped)
            assert await buffer.ack(popped.entries[-1]) == "held"
        else:
            for scope in ("", f":org:{org}", f":env:{env}"):
                expected[f"entries{scope}"] += 1
                expected[f"bytes{scope}"] += size
    found: Counter[str] = Counter()
    for partition in buffer.keyspace.partitions:
        found.update(await usage(redis_client, partition))
    assert found == +expected


# --- what vanished -------------------------------------------------------------------------------------------------


async def test_a_held_entry_that_vanished_is_a_dead_letter_and_in_no_sum(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "gone", "there", kind=HELD)
    await vanish(redis_client, keys, "gone")
    (popped,) = await buffer.pop_many([(Ready(ORG, ENV), 10)])
    assert isinstance(popped, Popped)
    assert ([entry.run_id for entry in popped.entries], popped.evicted, popped.orphans) == (["there"], ("gone",), 0)
    assert await owners(redis_client, keys) == {"gone": Owner(ORG, ENV, None), "there": Owner(ORG, ENV, 7)}
    assert (await usage(redis_client, keys))["entries"] == 1
    assert [place.run_id for place in await buffer.held_places(ORG, ENV)] == ["there"]
    assert (await buffer.counts()).failed == 1
    assert await buffer.get_entry(ORG, "gone") is None


async def test_an_audit_copy_that_expired_is_dropped_and_no_dead_letter(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "copy")
    await vanish(redis_client, keys, "copy")
    (popped,) = await buffer.pop_many([(Ready(ORG, ENV), 10)])
    assert popped == Popped(orphans=1)
    assert (await buffer.counts()).failed == 0


UNSETTLED: dict[str, Settle] = {
    "requeue": lambda buffer, entry: buffer.requeue(entry),
    "requeue for later": lambda buffer, entry: buffer.requeue(entry, not_before_ms=2**42),
    "fail": lambda buffer, entry: buffer.fail(entry, "error"),
}


@pytest.mark.parametrize("settle", UNSETTLED.values(), ids=UNSETTLED.keys())
async def test_a_held_entry_that_vanished_while_its_handling_failed_is_a_dead_letter(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, settle: Settle
) -> None:
    await hold(buffer, "run", kind=HELD)
    entry = await take(buffer)
    await vanish(redis_client, keys, "run")
    assert await settle(buffer, entry) == "evicted"
    found = await state_of(redis_client)
    assert await settle(buffer, entry) == "missing"
    assert await state_of(redis_client) == found
    state = await state_of(redis_client)
    assert set(state) == {keys.seq, keys.failed, keys.owners}
    assert [member for member, _ in state[keys.failed]] == [b"run"]
    assert await owners(redis_client, keys) == {"run": Owner(ORG, ENV, None)}


async def test_a_held_entry_that_vanished_after_its_run_was_created_leaves_nothing(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    entry = await take(buffer)
    await vanish(redis_client, keys, "run")
    assert await buffer.ack(entry) == "missing"
    assert set(await state_of(redis_client)) == {keys.seq}


async def test_a_held_entry_that_vanished_together_with_its_handler_is_a_dead_letter(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    await take(buffer)
    await vanish(redis_client, keys, "run")
    await expire_lease(redis_client, keys, "run")
    assert await buffer.reclaim_expired() == Reclaimed(evicted=("run",))
    assert set(await state_of(redis_client)) == {keys.seq, keys.failed, keys.owners}


async def test_a_late_settlement_of_a_run_that_was_drained_long_ago_makes_no_dead_letter(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    entry = await take(buffer)
    assert await buffer.ack(entry) == "held"
    await vanish(redis_client, keys, "run")
    for settle in UNSETTLED.values():
        assert await settle(buffer, entry) == "missing"
    assert set(await state_of(redis_client)) == {keys.seq}


async def test_a_run_that_vanished_can_be_accepted_again_and_is_a_dead_letter_no_more(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", "again", kind=HELD)
    await vanish(redis_client, keys, "run", "again")
    (popped,) = await buffer.pop_many([(Ready(ORG, ENV), 1)])
    assert popped == Popped(evicted=("run",))
    await hold(buffer, "run", "again", kind=HELD, payload=b"1234567890")
    assert (await buffer.counts()).failed == 0
    assert (await usage(redis_client, keys))["bytes"] == 20
    assert [(await take(buffer)).run_id for _ in range(2)] == ["run", "again"]


async def test_a_record_of_what_vanished_is_found_even_where_the_records_are_gone_too(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    await execute(redis_client, "DEL", keys.entry("run"), keys.owners)
    (popped,) = await buffer.pop_many([(Ready(ORG, ENV), 1)])
    assert popped == Popped(evicted=("run",))
    assert await owners(redis_client, keys) == {"run": Owner(ORG, ENV, None)}


def test_a_record_says_whose_an_entry_is() -> None:
    assert parse_owner(None) is None
    assert parse_owner(b"12:3:envorg") == Owner("org", "env", 12)
    assert parse_owner(b"gone:5:a:b:co:g") == Owner("o:g", "a:b:c", None)
