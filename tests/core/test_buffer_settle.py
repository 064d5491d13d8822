"""Settling: only the holder of a lease ends, returns or prolongs it, and what is gone is never half made again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier import scripts
from mollifier.buffer import Buffer, Ready, Reclaimed
from mollifier.errors import BufferUnavailableError
from mollifier.keys import PartitionKeys
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.scripts import Settlement
from mollifier.server import Server
from tests.core.support import (
    ENV,
    ORG,
    SETTINGS,
    bound,
    drain_ids,
    execute,
    expire_lease,
    hold,
    lifetime_ms,
    state_of,
    take,
)

FAR_OFF_MS = 2**42

Settle = Callable[[Buffer, Entry], Awaitable[Settlement]]


async def extend_one(buffer: Buffer, entry: Entry) -> Settlement:
    (reply,) = await buffer.extend_many([entry])
    assert isinstance(reply, str)
    return reply


SETTLEMENTS: dict[str, Settle] = {
    "ack": lambda buffer, entry: buffer.ack(entry),
    "requeue": lambda buffer, entry: buffer.requeue(entry),
    "requeue for later": lambda buffer, entry: buffer.requeue(entry, not_before_ms=FAR_OFF_MS),
    "fail": lambda buffer, entry: buffer.fail(entry, "error"),
    "extend": extend_one,
}

every_settlement = pytest.mark.parametrize("settle", SETTLEMENTS.values(), ids=SETTLEMENTS.keys())


async def now_ms(redis: Redis) -> int:
    seconds, microseconds = await execute(redis, "TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


async def fall_due(redis: Redis, keys: PartitionKeys, *run_ids: str) -> None:
    """Arrange that the not-before moments of these waiting runs have come, in this order."""
    for moment, run_id in enumerate(run_ids, start=1):
        sequence = await execute(redis, "HGET", keys.entry(run_id), "seq")
        assert await execute(
            redis, "ZADD", keys.waiting(ENV), "XX", "CH", moment, b"%b:%b" % (sequence, run_id.encode())
        )
    await execute(redis, "ZADD", keys.envs(ORG), 1, ENV)
    await execute(redis, "ZADD", keys.orgs, 1, ORG)


# --- whoever holds no lease changes nothing ------------------------------------------------------------------------


@every_settlement
async def test_settling_an_entry_that_is_gone_makes_no_partial_one(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, settle: Settle
) -> None:
    await hold(buffer, "run")
    entry = await take(buffer)
    await execute(redis_client, "DEL", keys.entry("run"))
    assert await settle(buffer, entry) == "missing"
    assert set(await state_of(redis_client)) <= {keys.seq, keys.draining}


@every_settlement
async def test_a_lease_that_was_reclaimed_settles_nothing(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, settle: Settle
) -> None:
    await hold(buffer, "run")
    stale = await take(buffer)
    await expire_lease(redis_client, keys, "run")
    assert await buffer.reclaim_expired() == Reclaimed(returned=("run",))
    before = await state_of(redis_client)
    assert await settle(buffer, stale) == "stale"
    assert await state_of(redis_client) == before


@every_settlement
async def test_a_lease_that_another_pop_replaced_settles_nothing(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, settle: Settle
) -> None:
    await hold(buffer, "run")
    stale = await take(buffer)
    await expire_lease(redis_client, keys, "run")
    assert await buffer.reclaim_expired() == Reclaimed(returned=("run",))
    holder = await take(buffer)
    assert holder.run_id == "run"
    before = await state_of(redis_client)
    assert await settle(buffer, stale) == "stale"
    assert await state_of(redis_client) == before
    assert await buffer.ack(holder) == "held"


@every_settlement
@pytest.mark.parametrize("first", ["ack", "requeue", "fail"])
async def test_an_entry_that_is_settled_is_not_settled_again(
    buffer: Buffer, redis_client: Redis, settle: Settle, first: str
) -> None:
    await hold(buffer, "run")
    entry = await take(buffer)
    assert await SETTLEMENTS[first](buffer, entry) == "held"
    before = await state_of(redis_client)
    assert await settle(buffer, entry) == "stale"
    assert await state_of(redis_client) == before


@every_settlement
async def test_a_made_up_lease_settles_nothing(buffer: Buffer, redis_client: Redis, settle: Settle) -> None:
    await hold(buffer, "run")
    entry = await take(buffer)
    before = await state_of(redis_client)
    for lease in (0, entry.lease + 1):
        assert await settle(buffer, msgspec.structs.replace(entry, lease=lease)) == "stale"
    assert await state_of(redis_client) == before


# --- ack -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EntryKind)
async def test_an_acked_entry_stays_readable_for_the_grace_and_no_longer(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, kind: EntryKind
) -> None:
    await hold(buffer, "run", kind=kind)
    assert await buffer.ack(await take(buffer)) == "held"
    entry = await buffer.get_entry(ORG, "run")
    assert entry is not None
    assert (entry.state, entry.payload) == (EntryState.MATERIALISED, b"payload")
    left_ms = await lifetime_ms(redis_client, keys.entry("run"))
    assert left_ms is not None
    assert 0 < left_ms <= SETTINGS.ack_grace_ttl_s * 1000


async def test_after_an_ack_nothing_but_the_entry_is_left(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await buffer.accept("run", ENV, ORG, b"", kind=EntryKind.HELD, bindings=bound("task", "key"))
    assert await buffer.ack(await take(buffer)) == "held"
    assert set(await state_of(redis_client)) == {keys.seq, keys.entry("run")}


@pytest.mark.leaves_keys
async def test_a_batch_of_acks_answers_for_each_entry_in_its_place(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "one", "patched", "gone", "stale", kind=EntryKind.HELD)
    await hold(buffer, "other", env="elsewhere", org="elsewhere", kind=EntryKind.HELD)
    one, patched, gone, stale = [await take(buffer) for _ in range(4)]
    other = await take(buffer, env="elsewhere", org="elsewhere")
    assert await buffer.patch(patched, b"patch") == "held"
    await execute(redis_client, "DEL", keys.entry("gone"))
    assert await buffer.requeue(stale) == "held"
    assert await buffer.ack_many([stale, one, other, gone, patched]) == ["stale", "held", "held", "missing", "changed"]
    assert [(await entry_of(buffer, name)).state for name in ("one", "patched", "stale")] == [
        EntryState.MATERIALISED,
        EntryState.DRAINING,
        EntryState.QUEUED,
    ]
    leased = {key: value for key, value in (await state_of(redis_client)).items() if key.endswith(":draining")}
    assert {run_id for members in leased.values() for run_id, _ in members} == {b"patched"}


async def test_an_entry_that_was_overwritten_is_refused_and_its_neighbours_in_the_batch_are_settled(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", "broken", "b")
    entries = [await take(buffer) for _ in range(3)]
    await execute(redis_client, "SET", keys.entry("broken"), "no hash", "EX", 60)
    first, refusal, last = await buffer.ack_many(entries)
    assert (first, last) == ("held", "held")
    assert isinstance(refusal, BufferUnavailableError)
    assert "WRONGTYPE" in str(refusal)
    assert await execute(redis_client, "ZRANGE", keys.draining, 0, -1) == [b"broken"]


async def test_a_batch_of_acks_frees_the_keys_of_each_entry_and_no_others(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await buffer.accept("two", ENV, ORG, b"", kind=EntryKind.HELD, bindings=[*bound("task", "a"), *bound("task", "b")])
    await hold(buffer, "none")
    await buffer.accept("one", ENV, ORG, b"", kind=EntryKind.HELD, bindings=bound("task", "c"))
    await buffer.accept("kept", ENV, ORG, b"", kind=EntryKind.HELD, bindings=bound("task", "d"))
    entries = [await take(buffer) for _ in range(3)]
    assert await buffer.ack_many(entries) == ["held"] * 3
    (kept,) = bound("task", "d")
    left = {key for key in await state_of(redis_client) if ":idempotency:" in key}
    assert left == {keys.idempotency(kept.digest)}
    assert await buffer.ack(await take(buffer)) == "held"


async def entry_of(buffer: Buffer, run_id: str) -> Entry:
    entry = await buffer.get_entry(ORG, run_id)
    assert entry is not None
    return entry


# --- requeue -------------------------------------------------------------------------------------------------------


async def test_a_requeued_entry_goes_back_to_its_place_with_one_attempt_more(buffer: Buffer) -> None:
    await hold(buffer, "a", "b")
    entry = await take(buffer)
    assert await buffer.requeue(entry) == "held"
    stored = await buffer.get_entry(ORG, "a")
    assert stored is not None
    assert (stored.state, stored.attempts, stored.lease) == (EntryState.QUEUED, 1, 0)
    again = await take(buffer)
    assert (again.run_id, again.attempts, again.sequence) == ("a", 1, entry.sequence)


async def test_a_requeue_that_is_no_fault_of_the_entry_counts_no_attempt(buffer: Buffer) -> None:
    await hold(buffer, "run")
    assert await buffer.requeue(await take(buffer), attempts=0) == "held"
    assert (await take(buffer)).attempts == 0


async def test_several_requeued_in_any_order_keep_the_order_of_their_acceptance(buffer: Buffer) -> None:
    await hold(buffer, *"abcdef")
    taken = [await take(buffer) for _ in range(4)]
    for position in (2, 0, 3, 1):
        assert await buffer.requeue(taken[position]) == "held"
    assert await drain_ids(buffer) == list("abcdef")


async def test_a_batch_of_requeues_keeps_the_order_of_acceptance(buffer: Buffer) -> None:
    await hold(buffer, *"abcd")
    taken = [await take(buffer) for _ in range(3)]
    assert await buffer.requeue_many(taken[::-1]) == ["held"] * 3
    assert await drain_ids(buffer) == list("abcd")


async def test_a_requeue_into_an_empty_queue_restores_the_ready_index(buffer: Buffer) -> None:
    await hold(buffer, "run")
    entry = await take(buffer)
    assert await buffer.ready() == {}
    assert await buffer.requeue(entry) == "held"
    assert await buffer.ready() == {ORG: (ENV,)}


async def test_an_entry_that_waits_is_not_ready_and_blocks_nobody(buffer: Buffer) -> None:
    await hold(buffer, "later", "now")
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_OFF_MS) == "held"
    assert await drain_ids(buffer) == ["now"]
    assert await buffer.ready() == {}
    stored = await buffer.get_entry(ORG, "later")
    assert stored is not None
    assert (stored.state, stored.not_before_ms) == (EntryState.QUEUED, FAR_OFF_MS)
    counts = await buffer.counts()
    assert (counts.queued, counts.waiting) == (0, 1)


async def test_a_waiting_entry_comes_back_when_its_moment_has_come(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    due_ms = await now_ms(redis_client) + 20
    assert await buffer.requeue(await take(buffer), not_before_ms=due_ms) == "held"
    while (entry := await buffer.pop(ORG, ENV)) is None:
        await asyncio.sleep(0)
    assert await now_ms(redis_client) >= due_ms
    assert (entry.run_id, entry.attempts, entry.not_before_ms) == ("run", 1, None)
    assert entry.dwell_ms >= 20
    assert keys.waiting(ENV) not in await state_of(redis_client)


async def test_a_waiting_entry_comes_back_to_its_original_place(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", "b", "c")
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_OFF_MS) == "held"
    await fall_due(redis_client, keys, "a")
    assert await drain_ids(buffer) == ["a", "b", "c"]


async def test_of_several_that_fell_due_the_oldest_comes_first_whenever_each_fell_due(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", "b", "c")
    for entry in [await take(buffer) for _ in range(3)]:
        assert await buffer.requeue(entry, not_before_ms=FAR_OFF_MS) == "held"
    await fall_due(redis_client, keys, "c", "b", "a")
    assert await drain_ids(buffer) == ["a", "b", "c"]


async def scores_of(redis: Redis, key: str) -> dict[bytes, float]:
    return dict((await state_of(redis)).get(key, []))


async def test_the_ready_index_is_ordered_by_the_earliest_due_moment(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a1", "a2", env="a")
    await hold(buffer, "b1", env="b")
    late, later = [await take(buffer, env="a") for _ in range(2)]
    assert await buffer.requeue(later, not_before_ms=FAR_OFF_MS + 2000) == "held"
    assert await scores_of(redis_client, keys.envs(ORG)) == {
        b"a": FAR_OFF_MS + 2000,
        b"b": (await scores_of(redis_client, keys.envs(ORG)))[b"b"],
    }
    assert await buffer.requeue(late, not_before_ms=FAR_OFF_MS + 1000) == "held"
    assert (await scores_of(redis_client, keys.envs(ORG)))[b"a"] == FAR_OFF_MS + 1000
    assert await buffer.ready() == {ORG: ("b",)}
    await take(buffer, env="b")
    assert await scores_of(redis_client, keys.orgs) == {ORG.encode(): FAR_OFF_MS + 1000}
    assert await buffer.ready() == {}


async def test_an_accept_makes_an_environment_ready_that_only_waited(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "waits")
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_OFF_MS) == "held"
    await hold(buffer, "new")
    assert await buffer.ready() == {ORG: (ENV,)}
    assert (await take(buffer)).run_id == "new"
    assert await buffer.ready() == {}
    assert await scores_of(redis_client, keys.envs(ORG)) == {ENV.encode(): FAR_OFF_MS}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(taken=st.integers(0, 8), back=st.permutations(range(8)), direct=st.lists(st.booleans(), min_size=8, max_size=8))
async def test_first_in_first_out_survives_any_pattern_of_retries(
    *, buffer: Buffer, redis_client: Redis, keys: PartitionKeys, taken: int, back: list[int], direct: list[bool]
) -> None:
    await execute(redis_client, "FLUSHALL")
    names = [f"run-{n}" for n in range(8)]
    await hold(buffer, *names)
    popped = [await take(buffer) for _ in range(taken)]
    waiting: list[str] = []
    for position in (p for p in back if p < taken):
        entry = popped[position]
        if direct[position]:
            assert await buffer.requeue(entry) == "held"
        else:
            assert await buffer.requeue(entry, not_before_ms=FAR_OFF_MS) == "held"
            waiting.append(entry.run_id)
    await fall_due(redis_client, keys, *waiting)
    assert await drain_ids(buffer) == names


# --- fail ----------------------------------------------------------------------------------------------------------


@pytest.mark.leaves_keys
async def test_a_failed_entry_is_kept_with_its_error_and_counted(buffer: Buffer, redis_client: Redis) -> None:
    await hold(buffer, "run", kind=EntryKind.HELD)
    assert await buffer.fail(await take(buffer), "no such column: \N{SNOWMAN}") == "held"
    entry = await buffer.get_entry(ORG, "run")
    assert entry is not None
    assert (entry.state, entry.error, entry.attempts) == (EntryState.FAILED, "no such column: \N{SNOWMAN}", 1)
    assert (entry.payload, entry.lease) == (b"payload", 0)
    counts = await buffer.counts()
    assert (counts.failed, counts.draining, counts.queued) == (1, 0, 0)
    assert await buffer.pop(ORG, ENV) is None


# --- leases --------------------------------------------------------------------------------------------------------


async def test_a_lease_ends_after_the_time_that_is_set(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    before_ms = await now_ms(redis_client)
    await hold(buffer, "run")
    await take(buffer)
    end_ms = (await scores_of(redis_client, keys.draining))[b"run"]
    assert before_ms + SETTINGS.lease_ms <= end_ms <= await now_ms(redis_client) + SETTINGS.lease_ms


async def test_an_extended_lease_ends_later(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    await hold(buffer, "run")
    entry = await take(buffer)
    await expire_lease(redis_client, keys, "run")
    assert await extend_one(buffer, entry) == "held"
    assert await buffer.reclaim_expired() == Reclaimed()
    assert (await scores_of(redis_client, keys.draining))[b"run"] > await now_ms(redis_client)


async def test_a_lease_that_still_runs_is_not_reclaimed(buffer: Buffer, redis_client: Redis) -> None:
    await hold(buffer, "run")
    await take(buffer)
    before = await state_of(redis_client)
    assert await buffer.reclaim_expired() == Reclaimed()
    assert await state_of(redis_client) == before


@pytest.mark.parametrize("kind", EntryKind)
async def test_a_server_whose_memory_is_full_extends_leases(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, kind: EntryKind
) -> None:
    await hold(buffer, "run", kind=kind)
    entry = await take(buffer)
    await expire_lease(redis_client, keys, "run")
    await execute(redis_client, "CONFIG", "SET", "maxmemory", 1)
    try:
        assert await extend_one(buffer, entry) == "held"
        assert await buffer.reclaim_expired() == Reclaimed()
    finally:
        await execute(redis_client, "CONFIG", "SET", "maxmemory", 0)
    # What names audit copies alone ends with the last of them, also after it was the only one and was taken away.
    assert (await lifetime_ms(redis_client, keys.draining) is None) is (kind is EntryKind.HELD)
    assert await buffer.ack(entry) == "held"


async def test_a_lease_that_was_extended_after_it_was_listed_is_not_reclaimed(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    await take(buffer)
    before = await state_of(redis_client)
    call = scripts.reclaim(
        entry=keys.entry("run"),
        queue=keys.queue(ENV),
        envs=keys.envs(ORG),
        orgs=keys.orgs,
        draining=keys.draining,
        failed=keys.failed,
        held=keys.held(ENV),
        owners=keys.owners,
        usage=keys.usage,
        children=keys.children(ENV),
        binding=[],
        run_id="run",
        env_id=ENV,
        org_id=ORG,
        max_reclaims=10,
    )
    assert await scripts.Scripts(Server(redis_client)).run(call) == "stale"
    assert await state_of(redis_client) == before


async def test_entries_of_a_dead_holder_come_back_to_their_places(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, *"abcd")
    for run_id in [(await take(buffer)).run_id for _ in range(3)]:
        await expire_lease(redis_client, keys, run_id)
    assert await buffer.reclaim_expired() == Reclaimed(returned=("a", "b", "c"))
    assert await buffer.ready() == {ORG: (ENV,)}
    stored = await buffer.get_entry(ORG, "a")
    assert stored is not None
    assert (stored.state, stored.lease) == (EntryState.QUEUED, 0)
    entry = await take(buffer)
    assert (entry.run_id, entry.attempts, entry.reclaims) == ("a", 0, 1)
    assert await drain_ids(buffer) == ["b", "c", "d"]


async def test_a_reclaim_reaches_every_partition(buffer: Buffer, redis_client: Redis) -> None:
    organizations = [f"org-{n}" for n in range(12)]
    for org in organizations:
        await hold(buffer, f"run-of-{org}", env=f"env-of-{org}", org=org)
        await take(buffer, env=f"env-of-{org}", org=org)
        await expire_lease(redis_client, buffer.keyspace.of(org), f"run-of-{org}")
    reclaimed = await buffer.reclaim_expired()
    assert sorted(reclaimed.returned) == sorted(f"run-of-{org}" for org in organizations)
    assert await buffer.ready() == {org: (f"env-of-{org}",) for org in organizations}


async def test_reclaims_come_in_bounded_portions(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    await hold(buffer, *"abcde")
    for run_id in [(await take(buffer)).run_id for _ in range(5)]:
        await expire_lease(redis_client, keys, run_id)
    portions = [await buffer.reclaim_expired(limit=2) for _ in range(4)]
    assert [portion.returned for portion in portions] == [("a", "b"), ("c", "d"), ("e",), ()]
    assert await drain_ids(buffer) == list("abcde")


async def test_the_lease_of_an_entry_that_is_gone_is_dropped(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    await take(buffer)
    await expire_lease(redis_client, keys, "run")
    await execute(redis_client, "DEL", keys.entry("run"))
    assert await buffer.reclaim_expired() == Reclaimed(missing=("run",))
    assert set(await state_of(redis_client)) == {keys.seq}


@pytest.mark.parametrize("field", ["env", "org", "seq", "payload"])
async def test_an_entry_that_broke_while_it_was_drained_is_listed_as_failed_and_queued_nowhere(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, field: str
) -> None:
    await hold(buffer, "run")
    await take(buffer)
    await execute(redis_client, "HDEL", keys.entry("run"), field)
    await expire_lease(redis_client, keys, "run")
    assert await buffer.reclaim_expired() == Reclaimed(malformed=("run",))
    assert set(await state_of(redis_client)) == {keys.seq, keys.entry("run"), keys.failed}
    assert await buffer.ready() == {}


async def test_a_batch_settles_entries_of_many_organizations(buffer: Buffer) -> None:
    taken: list[Entry] = []
    for org in ("one", "two", "three"):
        await hold(buffer, f"run-{org}", env=f"env-{org}", org=org)
        taken.append(await take(buffer, env=f"env-{org}", org=org))
    assert await buffer.ack_many([*taken, taken[0]]) == ["held", "held", "held", "stale"]
    assert (await buffer.counts()).left == 0


async def test_an_empty_batch_is_settled_without_asking_the_server(buffer: Buffer) -> None:
    assert await buffer.ack_many([]) == []
    assert await buffer.requeue_many([]) == []
    assert await buffer.extend_many([]) == []
    assert await buffer.pop_many([]) == []


async def test_a_pop_of_an_environment_under_another_organization_takes_nothing_of_it(buffer: Buffer) -> None:
    await hold(buffer, "run")
    same_partition = next(
        org for org in (f"org-{n}" for n in range(100)) if buffer.keyspace.of(org) == buffer.keyspace.of(ORG)
    )
    (popped,) = await buffer.pop_many([(Ready(same_partition, "env-of-its-own"), 5)])
    assert not isinstance(popped, Exception)
    assert popped.entries == ()
    assert (await take(buffer)).run_id == "run"
