"""Pop: the oldest entries first, under a lease each, past whatever is gone or broken, and nothing partial left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.buffer import Acceptance, Buffer, Popped, Ready
from mollifier.buffer.taking import ENOUGH_BYTES
from mollifier.errors import BufferUnavailableError, MalformedEntryError
from mollifier.keys import PartitionKeys
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.server import Command, Reply, Server
from tests.core.support import ENV, ORG, SETTINGS, drain_ids, execute, hold, lifetime_ms, state_of, take

HERE = Ready(ORG, ENV)


async def pop_some(buffer: Buffer, limit: int, ready: Ready = HERE) -> Popped:
    (popped,) = await buffer.pop_many([(ready, limit)])
    assert isinstance(popped, Popped)
    return popped


def ids(popped: Popped) -> list[str]:
    return [entry.run_id for entry in popped.entries]


async def test_pop_takes_the_oldest_entry_and_marks_it_draining(buffer: Buffer) -> None:
    await hold(buffer, "first", "second")
    entry = await take(buffer)
    assert (entry.run_id, entry.state, entry.payload) == ("first", EntryState.DRAINING, b"payload")
    assert entry.lease > 0
    stored = await buffer.get_entry(ORG, "first")
    assert stored is not None
    assert (stored.state, stored.lease) == (EntryState.DRAINING, entry.lease)


async def test_pop_of_an_environment_that_has_nothing_is_none_and_changes_nothing(
    buffer: Buffer, redis_client: Redis
) -> None:
    await hold(buffer, "elsewhere", env="other")
    before = await state_of(redis_client)
    assert await buffer.pop(ORG, ENV) is None
    assert await state_of(redis_client) == before


async def test_entries_come_in_the_order_in_which_they_were_accepted(buffer: Buffer) -> None:
    names = [f"run-{n}" for n in (5, 3, 11, 1, 2)]
    await hold(buffer, *names)
    assert await drain_ids(buffer) == names


async def test_a_batch_takes_the_oldest_first_and_no_more_than_asked(buffer: Buffer) -> None:
    await hold(buffer, *"abcde")
    assert ids(await pop_some(buffer, 3)) == ["a", "b", "c"]
    assert ids(await pop_some(buffer, 3)) == ["d", "e"]
    assert ids(await pop_some(buffer, 3)) == []


async def test_of_large_entries_a_batch_takes_few_and_one_at_least(buffer: Buffer) -> None:
    third = b"." * (ENOUGH_BYTES // 3 + 1)
    await hold(buffer, *"abcd", payload=third)
    await hold(buffer, "e", payload=3 * third)
    await hold(buffer, *"fg")
    assert ids(await pop_some(buffer, 25)) == ["a", "b", "c"]
    assert ids(await pop_some(buffer, 25)) == ["d", "e"]
    assert ids(await pop_some(buffer, 25)) == ["f", "g"]


async def test_one_call_pops_many_environments_each_its_share(buffer: Buffer) -> None:
    await hold(buffer, "a1", "a2", env="a", org="one")
    await hold(buffer, "b1", "b2", env="b", org="two")
    popped = await buffer.pop_many([(Ready("two", "b"), 1), (Ready("one", "a"), 5), (Ready("none", "c"), 5)])
    assert [ids(one) for one in popped if isinstance(one, Popped)] == [["b1"], ["a1", "a2"], []]


async def test_every_pop_gives_a_lease_of_its_own_to_all_that_it_takes(buffer: Buffer) -> None:
    await hold(buffer, *"abcd")
    first, second = await pop_some(buffer, 2), await pop_some(buffer, 2)
    leases = [{entry.lease for entry in popped.entries} for popped in (first, second)]
    assert [len(lease) for lease in leases] == [1, 1]
    assert leases[0] != leases[1]


async def test_a_pop_of_more_than_a_script_writes_at_once_takes_them_all(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    names = [f"run-{n:04}" for n in range(1_203)]
    await buffer.accept_many([Acceptance(run_id=name, env_id=ENV, org_id=ORG, payload=b"") for name in names])
    popped = await pop_some(buffer, 1_201)
    assert ids(popped) == names[:1_201]
    leased: Any = await execute(redis_client, "ZRANGE", keys.draining, 0, -1)
    assert sorted(leased) == [name.encode() for name in names[:1_201]]
    assert await buffer.ack_many(popped.entries) == ["held"] * 1_201
    assert await execute(redis_client, "EXISTS", keys.draining) == 0
    assert await drain_ids(buffer) == names[1_201:]


async def test_a_server_whose_memory_is_full_gives_out_what_it_holds(buffer: Buffer, redis_client: Redis) -> None:
    await hold(buffer, "waiting", "next", kind=EntryKind.HELD)
    assert await buffer.requeue(await take(buffer), not_before_ms=1) == "held"
    await execute(redis_client, "CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(BufferUnavailableError):
            await buffer.accept("refused", ENV, ORG, b"")
        assert await drain_ids(buffer) == ["waiting", "next"]
    finally:
        await execute(redis_client, "CONFIG", "SET", "maxmemory", 0)


async def test_concurrent_pops_take_every_entry_once(buffer: Buffer) -> None:
    await hold(buffer, *(f"run-{n:02}" for n in range(40)))
    taken: list[str] = []
    while (await buffer.counts()).queued:
        replies = await asyncio.gather(*(pop_some(buffer, 3) for _ in range(4)))
        taken += [run_id for popped in replies for run_id in ids(popped)]
    assert sorted(taken) == [f"run-{n:02}" for n in range(40)]


async def test_the_dwell_is_told_by_the_servers_clock(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    await hold(buffer, "run")
    accepted = int(await execute(redis_client, "HGET", keys.entry("run"), "accepted_ms"))
    await execute(redis_client, "HSET", keys.entry("run"), "accepted_ms", accepted - 5000)
    assert (await take(buffer)).dwell_ms >= 5000


async def test_the_pop_that_empties_a_queue_takes_environment_and_organization_out_of_the_ready_index(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a1", env="a")
    await hold(buffer, "b1", env="b")
    await take(buffer, env="a")
    assert await buffer.ready() == {ORG: ("b",)}
    await take(buffer, env="b")
    assert await buffer.ready() == {}
    left = set(await state_of(redis_client))
    assert left == {keys.entry("a1"), keys.entry("b1"), keys.draining, keys.seq}


async def test_an_environment_with_something_left_stays_ready(buffer: Buffer) -> None:
    await hold(buffer, "a", "b")
    await take(buffer)
    assert await buffer.ready() == {ORG: (ENV,)}


# --- references whose entry is gone --------------------------------------------------------------------------------


async def test_references_whose_entry_is_gone_are_skipped_without_making_a_partial_one(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "gone-1", "gone-2", "there")
    await execute(redis_client, "DEL", keys.entry("gone-1"), keys.entry("gone-2"))
    assert (await take(buffer)).run_id == "there"
    assert await execute(redis_client, "EXISTS", keys.entry("gone-1"), keys.entry("gone-2")) == 0
    assert await buffer.ready() == {}


async def test_a_batch_tells_how_many_references_it_dropped(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "gone-1", "there", "gone-2")
    await execute(redis_client, "DEL", keys.entry("gone-1"), keys.entry("gone-2"))
    popped = await pop_some(buffer, 10)
    assert (ids(popped), popped.orphans) == (["there"], 2)


async def test_a_pop_skips_a_bounded_number_of_references_and_the_next_one_goes_on(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    gone = [f"gone-{n}" for n in range(150)]
    await hold(buffer, *gone, "there")
    await execute(redis_client, "DEL", *(keys.entry(run_id) for run_id in gone))
    assert await buffer.pop(ORG, ENV) is None
    assert await buffer.ready() == {ORG: (ENV,)}
    assert (await take(buffer)).run_id == "there"


async def test_a_queue_of_nothing_but_gone_entries_leaves_the_ready_index(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "gone")
    await execute(redis_client, "DEL", keys.entry("gone"))
    assert await buffer.pop(ORG, ENV) is None
    assert set(await state_of(redis_client)) == {keys.seq}


@pytest.mark.leaves_keys
async def test_an_environment_whose_queue_expired_leaves_the_ready_index_when_it_is_served(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "audit", env="expired")
    await hold(buffer, "held", env=ENV, kind=EntryKind.HELD)
    await execute(redis_client, "DEL", keys.entry("audit"), keys.queue("expired"))
    assert set((await buffer.ready())[ORG]) == {ENV, "expired"}
    assert ids(await pop_some(buffer, 5, Ready(ORG, "expired"))) == []
    assert await buffer.ready() == {ORG: (ENV,)}


# --- entries that do not read as one -------------------------------------------------------------------------------

BROKEN: Mapping[str, tuple[str | bytes, ...]] = {
    "no payload": ("HDEL", "payload"),
    "no organization": ("HDEL", "org"),
    "no environment": ("HDEL", "env"),
    "no sequence": ("HDEL", "seq"),
    "no acceptance": ("HDEL", "accepted_ms"),
    "no kind": ("HDEL", "kind"),
    "another environment": ("HSET", "env", "other"),
    "another organization": ("HSET", "org", "other"),
    "garbage sequence": ("HSET", "seq", "first"),
    "garbage acceptance": ("HSET", "accepted_ms", "yesterday"),
    "fractional acceptance": ("HSET", "accepted_ms", "1e3"),
    "endless acceptance": ("HSET", "accepted_ms", "9" * 5000),
    "garbage attempts": ("HSET", "attempts", "many"),
    "garbage reclaims": ("HSET", "reclaims", "-"),
    "unknown kind": ("HSET", "kind", "borrowed"),
    "bytes that are no text": ("HSET", "bindings", b"\xff\xfe"),
    "garbage for a number of changes": ("HSET", "patches", "some"),
    "a change that is missing": ("HSET", "patches", "2", "patch:0", "change"),
}


async def break_entry(redis: Redis, key: str, damage: tuple[str | bytes, ...]) -> None:
    command, *rest = damage
    await execute(redis, command, key, *rest)


@pytest.mark.leaves_keys("*:failed")
@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_entry_is_reported_and_kept_for_inspection_and_blocks_nobody(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, damage: tuple[str | bytes, ...]
) -> None:
    await hold(buffer, "broken", "sound")
    await break_entry(redis_client, keys.entry("broken"), damage)
    before = (await state_of(redis_client))[keys.entry("broken")]
    popped = await pop_some(buffer, 10)
    assert ids(popped) == ["sound"]
    assert [error.run_id for error in popped.malformed] == ["broken"]
    state = await state_of(redis_client)
    assert state[keys.entry("broken")] == before
    assert [member for member, _ in state[keys.failed]] == [b"broken"]
    assert [member for member, _ in state[keys.draining]] == [b"sound"]
    assert (await buffer.counts()).failed == 1


FIELDS = (
    *(
        "state",
        "kind",
        "env",
        "org",
        "seq",
        "accepted_ms",
        "payload",
        "attempts",
        "reclaims",
        "bindings",
        "patches",
        "patch:0",
    ),
    *("not_before_ms", "lease", "taken", "error"),
)
damages = st.dictionaries(
    st.sampled_from(FIELDS),
    st.none() | st.sampled_from([b"", b"0", b"1", b"-1", b"ab,cd"]) | st.binary(max_size=20),
    max_size=3,
)


@pytest.mark.leaves_keys
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages)
async def test_whatever_is_broken_of_an_entry_it_is_handed_out_whole_or_is_a_dead_letter_and_never_both(
    *, buffer: Buffer, redis_client: Redis, keys: PartitionKeys, damage: Mapping[str, bytes | None]
) -> None:
    await execute(redis_client, "FLUSHALL")
    await hold(buffer, "run", kind=EntryKind.HELD)
    for field, value in damage.items():
        await execute(
            redis_client,
            *(("HDEL", keys.entry("run"), field) if value is None else ("HSET", keys.entry("run"), field, value)),
        )
    popped = await pop_some(buffer, 10)
    state = await state_of(redis_client)
    assert [keys.failed in state, keys.draining in state] == [bool(popped.malformed), bool(popped.entries)]
    assert bool(popped.malformed) != bool(popped.entries)


@pytest.mark.leaves_keys("*:failed")
async def test_a_key_of_another_type_in_the_place_of_an_entry_is_reported_and_left_alone(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "broken", "sound")
    await execute(redis_client, "SET", keys.entry("broken"), "not a hash", "EX", 60)
    popped = await pop_some(buffer, 10)
    assert ids(popped) == ["sound"]
    assert [error.run_id for error in popped.malformed] == ["broken"]
    assert await execute(redis_client, "GET", keys.entry("broken")) == b"not a hash"


@pytest.mark.leaves_keys("*:failed")
async def test_a_single_pop_passes_a_broken_entry_by(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    await hold(buffer, "broken", "sound")
    await execute(redis_client, "HDEL", keys.entry("broken"), "payload")
    assert (await take(buffer)).run_id == "sound"


async def test_a_broken_audit_copy_is_not_listed_as_failed_for_ever(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "broken")
    await execute(redis_client, "HDEL", keys.entry("broken"), "payload")
    assert await buffer.pop(ORG, ENV) is None
    assert await lifetime_ms(redis_client, keys.failed) is not None


@pytest.mark.leaves_keys
async def test_a_broken_held_entry_stays_listed_as_failed_for_ever(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "audit")
    assert await buffer.fail(await take(buffer), "error") == "held"
    await hold(buffer, "broken", kind=EntryKind.HELD)
    await execute(redis_client, "HDEL", keys.entry("broken"), "payload")
    assert await buffer.pop(ORG, ENV) is None
    assert await lifetime_ms(redis_client, keys.failed) is None


async def test_a_queue_of_another_type_is_its_environments_fault_alone(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    await execute(redis_client, "SET", keys.queue("bad"), "not a sorted set", "EX", 60)
    bad, good = await buffer.pop_many([(Ready(ORG, "bad"), 1), (HERE, 1)])
    assert isinstance(bad, BufferUnavailableError)
    assert isinstance(good, Popped)
    assert ids(good) == ["run"]


async def test_an_entry_that_does_not_parse_is_reported_to_its_reader(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "broken", "sound")
    await execute(redis_client, "HSET", keys.entry("broken"), "state", "LOST")
    with pytest.raises(MalformedEntryError, match=r"broken.*'state'"):
        await buffer.get_entry(ORG, "broken")
    broken, sound, gone = await buffer.get_entries(ORG, ["broken", "sound", "gone"])
    assert isinstance(broken, MalformedEntryError)
    assert isinstance(sound, Entry)
    assert gone is None


class CountingServer(Server):
    """Counts its round trips."""

    round_trips = 0

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        self.round_trips += bool(commands)
        return await super().run_many(commands)


@pytest.fixture
async def counting(redis_client: Redis, buffer: Buffer) -> CountingServer:
    server = CountingServer(redis_client)
    # Scripts that the server does not know yet would cost a round trip more.
    await hold(buffer, "warm")
    assert await drain_ids(buffer) == ["warm"]
    return server


async def test_a_pop_that_follows_a_pop_is_one_round_trip(buffer: Buffer, counting: CountingServer) -> None:
    await hold(buffer, *"abcde")
    drainer = Buffer(counting, lambda: SETTINGS)
    trips: list[int] = []
    for taken in (["a", "b"], ["c", "d"], ["e"]):
        before = counting.round_trips
        assert ids(await pop_some(drainer, 2)) == taken
        trips.append(counting.round_trips - before)
    assert trips == [2, 1, 1]


async def test_a_pop_takes_the_oldest_though_others_took_what_the_last_one_told(
    buffer: Buffer, counting: CountingServer
) -> None:
    await hold(buffer, *"abcdef")
    drainer = Buffer(counting, lambda: SETTINGS)
    assert ids(await pop_some(drainer, 2)) == ["a", "b"]
    assert ids(await pop_some(buffer, 2)) == ["c", "d"]
    before = counting.round_trips
    assert ids(await pop_some(drainer, 2)) == ["e", "f"]
    assert counting.round_trips - before == 2
    assert ids(await pop_some(drainer, 2)) == []


async def test_what_has_waited_long_enough_comes_before_what_the_last_pop_told(buffer: Buffer) -> None:
    await hold(buffer, *"abc")
    assert await buffer.requeue(await take(buffer), not_before_ms=1) == "held"
    assert await drain_ids(buffer) == ["a", "b", "c"]


async def test_where_a_pop_left_something_is_looked_at_in_one_round_trip(
    buffer: Buffer, counting: CountingServer
) -> None:
    await hold(buffer, *"ab")
    drainer = Buffer(counting, lambda: SETTINGS)
    assert await drainer.ready([ORG]) == {ORG: (ENV,)}
    assert ids(await pop_some(drainer, 1)) == ["a"]
    before = counting.round_trips
    assert await drainer.ready([ORG]) == {ORG: (ENV,)}
    assert counting.round_trips - before == 1
    assert ids(await pop_some(drainer, 1)) == ["b"]
    assert await drainer.ready([ORG]) == {}
