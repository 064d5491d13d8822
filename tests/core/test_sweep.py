"""One sweep: what is planted on the server is found, counted and put right where it can be, and the next sweep finds nothing."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.buffer import Acceptance, Buffer, Look, Ready
from mollifier.buffer.mending import CHUNK
from mollifier.keys import PartitionKeys
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.scripts import Books, Restored
from mollifier.sweep import Ledger, Sweep, differing_sums
from mollifier.sweeps import SweepReport, from_fields, to_fields
from tests.core.observed import Observed, labels
from tests.core.support import ENV, ORG, drain_ids, execute, expire_lease, hold, lifetime_ms, state_of, take

HELD, AUDIT = EntryKind.HELD, EntryKind.AUDIT
FAR_MS = 2**42
"""A moment that does not come."""

pytestmark = pytest.mark.leaves_keys


async def sweep(buffer: Buffer, observed: Observed | None = None, stalled_ms: int = 30_000) -> SweepReport:
    sweep = Sweep(buffer, (observed or Observed()).telemetry, stalled_ms=stalled_ms)
    async for _ in sweep.pieces():
        pass
    assert sweep.report is not None
    return sweep.report


def found(report: SweepReport) -> dict[str, Any]:
    """What is not as it should be."""
    return {name: table for name in ("orphans", "mismatches", "repaired") if (table := getattr(report, name))}


async def drained(buffer: Buffer) -> list[str]:
    """Take out and settle whatever a drainer is told of."""
    ids: list[str] = []
    while ready := await buffer.ready():
        for org_id, env_ids in ready.items():
            for env_id in env_ids:
                ids += await drain_ids(buffer, env_id, org_id)
    return ids


Damage = Callable[[Redis, PartitionKeys], Awaitable[Any]]


def lose(*names: str) -> Damage:
    """Have keys of the partition vanish."""

    async def damage(redis: Redis, keys: PartitionKeys) -> None:
        for name in names:
            assert await execute(redis, "DEL", f"{keys.orgs.removesuffix('orgs')}{name}") == 1

    return damage


def run(*command: str | bytes | float) -> Damage:
    """Run a command on a key of the partition."""

    async def damage(redis: Redis, keys: PartitionKeys) -> None:
        verb, name, *rest = command
        assert await execute(redis, verb, f"{keys.orgs.removesuffix('orgs')}{name}", *rest) is not None

    return damage


# --- nothing wrong -------------------------------------------------------------------------------------------------


async def test_a_sweep_of_an_empty_buffer_finds_nothing_and_leaves_nothing(buffer: Buffer, redis_client: Redis) -> None:
    report = await sweep(buffer)
    assert msgspec.structs.replace(report, at_ms=0) == SweepReport(at_ms=0)
    assert await state_of(redis_client) == {}


async def test_a_sweep_changes_nothing_where_everything_fits_together(buffer: Buffer, redis_client: Redis) -> None:
    await hold(buffer, "leased", "given up", "retried", "materialised", "queued", kind=HELD)
    await take(buffer)
    assert await buffer.fail(await take(buffer), "error") == "held"
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_MS) == "held"
    assert await buffer.ack(await take(buffer)) == "held"
    await hold(buffer, "copy", env="other")
    before = await state_of(redis_client)

    report = await sweep(buffer)

    assert found(report) == {}
    assert (report.entries, report.held_bytes, report.dead_letters) == (4, 4 * len(b"payload"), 1)
    assert await state_of(redis_client) == before


async def test_a_sweep_neither_enumerates_keys_nor_reads_a_hash_of_records_whole(
    buffer: Buffer, redis_client: Redis
) -> None:
    await hold(buffer, "a", "b", kind=HELD)
    before = await execute(redis_client, "INFO", "commandstats")
    await sweep(buffer)
    after = await execute(redis_client, "INFO", "commandstats")
    used = {name for name, each in after.items() if each["calls"] != before.get(name, {"calls": 0})["calls"]}
    assert not used & {f"cmdstat_{verb}" for verb in ("keys", "scan", "hscan", "zscan", "hkeys", "hvals")}
    assert after["cmdstat_hgetall"]["calls"] - before.get("cmdstat_hgetall", {"calls": 0})["calls"] == len(
        buffer.keyspace.partitions
    )


# --- what is stale, and how much there is --------------------------------------------------------------------------


async def test_entries_that_have_been_due_for_long_are_stale_and_the_oldest_tells_the_age(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "old", "older", "new", kind=HELD)
    await hold(buffer, "old copy", env="other")
    now_ms = await buffer.now_ms()
    for run_id, age_ms in (("old", 31_000), ("older", 60_000), ("old copy", 40_000), ("new", 20_000)):
        await execute(redis_client, "HSET", keys.entry(run_id), "accepted_ms", now_ms - age_ms)
    report = await sweep(buffer)
    assert report.stale == 3
    assert 60_000 <= report.oldest_ms < 120_000
    await drained(buffer)
    report = await sweep(buffer)
    assert (report.stale, report.oldest_ms) == (0, 0)


@pytest.mark.parametrize(("due_since_ms", "stale"), [(-60_000, 0), (10_000, 0), (40_000, 1)])
async def test_a_retried_entry_is_due_from_its_not_before_time_on(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, due_since_ms: int, stale: int
) -> None:
    await hold(buffer, "run", kind=HELD)
    now_ms = await buffer.now_ms()
    assert await buffer.requeue(await take(buffer), not_before_ms=now_ms - due_since_ms) == "held"
    await execute(redis_client, "HSET", keys.entry("run"), "accepted_ms", now_ms - 3_600_000)
    report = await sweep(buffer)
    assert report.stale == stale
    assert (report.oldest_ms > 0) == (due_since_ms > 0)


async def test_a_lease_that_has_been_over_for_long_is_stale(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", "b", kind=HELD)
    await take(buffer)
    await take(buffer)
    await expire_lease(redis_client, keys, "a")
    assert (await sweep(buffer)).stale == 1


# --- the ready index -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HELD, AUDIT], ids=str)
@pytest.mark.parametrize(
    ("damage", "mismatch"),
    [
        (run("ZADD", "orgs", FAR_MS, ORG), "late"),
        (run("ZADD", f"envs:{ORG}", FAR_MS, ENV), "late"),
        (run("ZADD", f"envs:{ORG}", FAR_MS, "another"), "empty"),
        (run("ZADD", "orgs", FAR_MS, "another"), "empty"),
    ],
    ids=["late organization", "late environment", "empty environment", "empty organization"],
)
async def test_the_ready_index_is_put_right(
    *, buffer: Buffer, redis_client: Redis, keys: PartitionKeys, damage: Damage, mismatch: str, kind: EntryKind
) -> None:
    await hold(buffer, "a", "b", kind=kind)
    await hold(buffer, "other", kind=kind, env="other")
    before = {name: (await state_of(redis_client))[name] for name in (keys.queue(ENV), keys.entry("a"))}
    await damage(redis_client, keys)
    observed = Observed()

    report = await sweep(buffer, observed)

    assert found(report) == {"mismatches": {mismatch: 1}, "repaired": {mismatch: 1}}
    assert observed.points("mollifier.sweep.repairs") == {labels(kind=mismatch): 1}
    assert {org_id: set(env_ids) for org_id, env_ids in (await buffer.ready()).items()} == {ORG: {ENV, "other"}}
    after = await state_of(redis_client)
    assert {name: after[name] for name in before} == before
    for key in (keys.orgs, keys.envs(ORG)):
        assert (await lifetime_ms(redis_client, key) is None) == (kind is HELD)
    assert found(await sweep(buffer)) == {}
    assert sorted(await drained(buffer)) == ["a", "b", "other"]


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (run("ZREM", f"envs:{ORG}", ENV), 1),
        (lose(f"envs:{ORG}"), 2),
        (lose("orgs"), 1),
        (lose("orgs", f"envs:{ORG}"), 3),
        (lose("orgs", f"envs:{ORG}", "usage"), 3),
        (lose("orgs", f"envs:{ORG}", "owners"), 3),
    ],
    ids=["an environment", "environments", "organizations", "all of it", "the sums too", "the records too"],
)
async def test_what_is_held_is_found_where_the_ready_index_has_lost_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, damage: Damage, missing: int
) -> None:
    await hold(buffer, "a", "b", kind=HELD)
    await hold(buffer, "other", kind=HELD, env="other")
    await damage(redis_client, keys)
    report = await sweep(buffer)
    assert (report.mismatches["missing"], report.repaired) == (missing, {"missing": missing})
    assert (await sweep(buffer)).repaired == {}
    assert sorted(await drained(buffer)) == ["a", "b", "other"]


async def test_an_environment_that_only_waits_stands_at_its_earliest_not_before_time(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", "b", kind=HELD)
    first, second = await take(buffer), await take(buffer)
    assert await buffer.requeue(first, not_before_ms=FAR_MS + 1) == "held"
    assert await buffer.requeue(second, not_before_ms=FAR_MS) == "held"
    await execute(redis_client, "DEL", keys.orgs, keys.envs(ORG))
    assert found(await sweep(buffer))["repaired"] == {"missing": 2}
    state = await state_of(redis_client)
    assert state[keys.envs(ORG)] == [(ENV.encode(), FAR_MS)]
    assert state[keys.orgs] == [(ORG.encode(), FAR_MS)]


# --- entries that stand nowhere ------------------------------------------------------------------------------------


async def test_queued_entries_that_stand_nowhere_go_back_to_their_places(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", "b", "c", kind=HELD)
    await execute(redis_client, "ZREM", keys.queue(ENV), "a", "c")
    report = await sweep(buffer)
    assert found(report) == {"mismatches": {"unplaced": 2}, "repaired": {"returned": 2}}
    assert found(await sweep(buffer)) == {}
    assert await drained(buffer) == ["a", "b", "c"]


async def test_a_lost_queue_is_made_anew_from_what_is_held(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    names = [f"run-{number:03}" for number in range(2 * CHUNK + 1)]
    # All triggered in one moment, as the items of a batch are.
    accepted = [Acceptance(run_id=name, env_id=ENV, org_id=ORG, payload=b"", kind=HELD) for name in names]
    await buffer.accept_many(accepted)
    await execute(redis_client, "DEL", keys.queue(ENV), keys.orgs, keys.envs(ORG))
    await execute(redis_client, "DEL", *(keys.entry(name) for name in names[:5]))
    report = await sweep(buffer)
    assert report.repaired == {"returned": len(names) - 5, "buried": 5}
    assert await drained(buffer) == names[5:]


async def test_an_entry_that_waits_for_its_retry_goes_back_to_waiting(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", kind=HELD)
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_MS) == "held"
    before = await state_of(redis_client)
    await execute(redis_client, "DEL", keys.waiting(ENV), keys.envs(ORG), keys.orgs)
    assert found(await sweep(buffer))["repaired"] == {"returned": 1}
    assert await state_of(redis_client) == before


async def test_a_lease_that_is_lost_is_given_anew_so_that_a_dead_holders_entry_comes_back(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "alive", "dead", kind=HELD)
    alive = await take(buffer)
    await take(buffer)
    await execute(redis_client, "DEL", keys.draining)
    assert found(await sweep(buffer)) == {"mismatches": {"unplaced": 2}, "repaired": {"leased": 2}}
    assert found(await sweep(buffer)) == {}
    assert await buffer.extend_many([alive]) == ["held"]
    assert await buffer.ack(alive) == "held"
    await expire_lease(redis_client, keys, "dead")
    assert (await buffer.reclaim_expired()).returned == ("dead",)
    assert await drained(buffer) == ["dead"]


async def test_a_dead_letter_that_is_lost_is_listed_again(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    assert await buffer.fail(await take(buffer), "error") == "held"
    listed = await state_of(redis_client)
    await execute(redis_client, "DEL", keys.failed)
    report = await sweep(buffer)
    assert await state_of(redis_client) == listed
    assert (found(report), report.dead_letters) == ({"mismatches": {"unplaced": 1}, "repaired": {"listed": 1}}, 1)
    entry = await buffer.get_entry(ORG, "run")
    assert entry is not None
    assert (entry.state, entry.error) == (EntryState.FAILED, "error")


async def test_an_entry_that_does_not_read_as_one_and_stands_nowhere_is_counted_and_left_alone(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "no number", "no state", "not a hash", "of another", "queued", kind=HELD)
    await execute(redis_client, "HSET", keys.entry("no number"), "seq", "x")
    await execute(redis_client, "HDEL", keys.entry("no state"), "state")
    await execute(redis_client, "SET", keys.entry("not a hash"), "x")
    await execute(redis_client, "HSET", keys.entry("of another"), "env", "another")
    await execute(redis_client, "HSET", keys.entry("queued"), "seq", "x")
    lost = ("no number", "no state", "not a hash", "of another")
    await execute(redis_client, "ZREM", keys.queue(ENV), *lost)
    before = await state_of(redis_client)
    for _ in range(2):
        assert found(await sweep(buffer)) == {"mismatches": {"malformed": 4}}
    assert await state_of(redis_client) == before


async def test_a_dead_letter_that_does_not_read_as_an_entry_stays_one(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "leased", "queued", kind=HELD)
    await take(buffer)
    for run_id in ("leased", "queued"):
        await execute(redis_client, "HSET", keys.entry(run_id), "attempts", "x")
    await expire_lease(redis_client, keys, "leased")
    assert (await buffer.reclaim_expired()).malformed == ("leased",)
    assert await buffer.pop(ORG, ENV) is None
    before = await state_of(redis_client)
    report = await sweep(buffer)
    assert (found(report), report.dead_letters) == ({}, 2)
    assert await state_of(redis_client) == before


# --- entries that are gone -----------------------------------------------------------------------------------------


async def test_a_held_entry_that_vanished_is_a_dead_letter_wherever_it_stood_and_is_told_of_once(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, caplog: pytest.LogCaptureFixture
) -> None:
    await hold(buffer, "waiting", "queued", "leased", "there", kind=HELD)
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_MS) == "held"
    await hold(buffer, "nowhere", kind=HELD, env="other")
    await execute(redis_client, "DEL", *(keys.entry(run_id) for run_id in ("waiting", "queued", "nowhere")))
    await execute(redis_client, "DEL", keys.held("other"), keys.queue("other"))
    observed = Observed()

    report = await sweep(buffer, observed)

    assert report.orphans == {"waiting": 1, "queue": 1, "held": 2, "owners": 3}
    assert report.repaired == {"buried": 3, "dropped": 1, "empty": 1}
    assert report.dead_letters == 3
    evicted = [record for record in caplog.records if record.message == "mollifier.entry_evicted"]
    assert sorted(getattr(record, "fields", {})["run_id"] for record in evicted) == ["nowhere", "queued", "waiting"]
    assert observed.points("mollifier.drain.entries")[labels(outcome="evicted")] == 3
    report = await sweep(buffer)
    assert (found(report), report.dead_letters, report.entries) == ({}, 3, 2)
    assert await drained(buffer) == ["leased", "there"]


async def test_an_environment_of_which_all_has_vanished_leaves_the_ready_index_with_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "gone", kind=HELD)
    await execute(redis_client, "DEL", keys.entry("gone"))
    report = await sweep(buffer)
    assert (report.mismatches, report.repaired) == ({}, {"buried": 1})
    assert set(await state_of(redis_client)) == {keys.seq, keys.failed, keys.owners}


async def test_what_a_living_holder_has_in_its_hands_is_counted_and_left_to_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    entry = await take(buffer)
    await execute(redis_client, "DEL", keys.entry("run"))
    before = await state_of(redis_client)
    assert found(await sweep(buffer)) == {"orphans": {"draining": 1}}
    assert await state_of(redis_client) == before
    assert await buffer.ack(entry) == "missing"
    report = await sweep(buffer)
    assert (found(report), report.dead_letters) == ({}, 0)


async def test_references_to_audit_copies_that_expired_are_dropped(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "retried", "failed", "queued", "there")
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_MS) == "held"
    assert await buffer.fail(await take(buffer), "error") == "held"
    await execute(redis_client, "DEL", *(keys.entry(run_id) for run_id in ("retried", "failed", "queued")))
    report = await sweep(buffer)
    assert found(report) == {"orphans": {"waiting": 1, "failed": 1, "queue": 1}, "repaired": {"dropped": 3}}
    assert report.dead_letters == 0
    assert found(await sweep(buffer)) == {}
    assert await drained(buffer) == ["there"]


async def test_a_record_that_only_chance_finds_is_a_dead_letter(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    await execute(redis_client, "DEL", keys.entry("run"), keys.held(ENV), keys.queue(ENV), keys.orgs, keys.envs(ORG))
    report = await sweep(buffer)
    assert (report.orphans, report.repaired) == ({"owners": 1}, {"buried": 1})
    assert set(await state_of(redis_client)) == {keys.seq, keys.failed, keys.owners}


# --- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "mismatches"),
    [
        (run("HINCRBY", "usage", "entries", 1), 2),
        (run("HINCRBY", "usage", f"bytes:org:{ORG}", 1), 1),
        (run("HINCRBY", "usage", f"bytes:env:{ENV}", 1), 2),
        (run("HINCRBY", "usage", f"entries:env:{ENV}", 1), 2),
        (run("HSET", "usage", "entries:env:unknown", 1), 2),
        (run("HSET", "owners", "a", f"8:{len(ENV)}:{ENV}{ORG}"), 1),
        (run("HDEL", "owners", "a"), 1),
        (lose("usage"), 1),
    ],
    ids=[
        "all",
        "organization",
        "environment's bytes",
        "environment's entries",
        "unknown environment",
        "a record",
        "no record",
        "no sums",
    ],
)
async def test_sums_that_are_not_those_of_the_records_are_counted_and_left_alone(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, damage: Damage, mismatches: int
) -> None:
    await hold(buffer, "a", "b", kind=HELD)
    await damage(redis_client, keys)
    before = await state_of(redis_client)
    for _ in range(2):
        assert found(await sweep(buffer)) == {"mismatches": {"usage": mismatches}}
    assert await state_of(redis_client) == before


async def test_the_sums_of_many_records_are_compared_where_nothing_moves_meanwhile(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, *(f"run-{number:03}" for number in range(2 * CHUNK)), kind=HELD)
    assert found(await sweep(buffer)) == {}
    await execute(redis_client, "HDEL", keys.owners, "run-150")
    assert found(await sweep(buffer)) == {"mismatches": {"usage": 1}}


def books(sequence: int, listed: int, held_bytes: int, entries: int | None = None) -> Restored:
    of = Books(sequence, listed, listed if entries is None else entries, held_bytes)
    return Restored(stale=0, oldest_at_ms=None, held_bytes=5, books=of, verdicts=())


@pytest.mark.parametrize(
    ("entered", "adds_up"),
    [
        ([], True),
        ([books(1, 1, 5)], True),
        ([books(1, 1, 6)], False),
        ([books(1, 1, 5, entries=2)], False),
        ([books(1, 2, 10), books(1, 2, 10)], True),
        ([books(1, 2, 11), books(1, 2, 11)], False),
        ([books(1, 2, 11), books(2, 2, 11)], True),
        ([books(1, 2, 11), books(1, 3, 11)], True),
        ([books(1, 2, 11), books(1, 2, 12)], True),
        ([books(1, 2, 11), None, books(1, 2, 11)], True),
    ],
    ids=[
        "nothing",
        "right",
        "wrong",
        "wrong number",
        "two parts",
        "two parts, wrong",
        "something was accepted or popped",
        "something was settled",
        "something was changed",
        "something was not seen",
    ],
)
def test_sums_are_wrong_only_where_nothing_moved_that_could_explain_it(
    entered: list[Restored | None], adds_up: bool
) -> None:
    ledger = Ledger()
    for found in entered:
        ledger.enter(found)
    assert ledger.adds_up == adds_up


def test_the_parts_of_a_sum_make_up_the_whole() -> None:
    usage = {"entries": 3, "entries:env:a": 1, "entries:env:b:c": 2, "entries:org:o": 3, "bytes": 0}
    assert differing_sums(usage) == 0
    assert differing_sums({**usage, "entries:env:a": 2, "bytes:org:o": 1}) == 2


# --- all the while -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "repaired"),
    [
        (lose("orgs", f"envs:{ORG}"), {"missing": 3}),
        (run("ZADD", f"envs:{ORG}", FAR_MS, ENV), {"late": 1}),
        (run("ZREM", f"queue:{ENV}", "a"), {"returned": 1}),
        (lose("waiting:other"), {"returned": 1}),
        (lose("draining"), {"leased": 1}),
        (lose("failed"), {"listed": 1}),
        (lose("entry:b"), {"buried": 1}),
    ],
    ids=["lost index", "late", "lost in the queue", "lost while waiting", "lost lease", "lost letter", "vanished"],
)
async def test_a_server_whose_memory_is_full_is_put_right_too(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, damage: Damage, repaired: dict[str, int]
) -> None:
    await hold(buffer, "leased", "failed", "a", "b", kind=HELD)
    await take(buffer)
    assert await buffer.fail(await take(buffer), "error") == "held"
    await hold(buffer, "later", kind=HELD, env="other")
    assert await buffer.requeue(await take(buffer, env="other"), not_before_ms=FAR_MS) == "held"
    await damage(redis_client, keys)
    await execute(redis_client, "CONFIG", "SET", "maxmemory", 1)
    try:
        assert (await sweep(buffer)).repaired == repaired
        assert found(await sweep(buffer)) == {}
        assert (await drained(buffer)) == ["a", "b"][: 1 if "buried" in repaired else 2]
    finally:
        await execute(redis_client, "CONFIG", "SET", "maxmemory", 0)


async def test_a_script_that_the_server_refuses_costs_the_sweep_nothing_else(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "a", kind=HELD, env="a")
    await hold(buffer, "b", kind=HELD, env="b")
    await execute(redis_client, "DEL", keys.queue("a"), keys.queue("b"))
    await execute(redis_client, "SET", keys.queue("a"), "not a queue")
    await execute(redis_client, "SET", keys.waiting("a"), "not a set")
    observed = Observed()
    report = await sweep(buffer, observed)
    assert report.repaired["returned"] == 1
    assert observed.points("mollifier.drain.faults")[labels(operation="sweep")] >= 2
    assert await drain_ids(buffer, "b") == ["b"]


async def test_repairs_are_logged_once_with_ids_and_without_payloads(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, caplog: pytest.LogCaptureFixture
) -> None:
    await hold(buffer, "a", "b", kind=HELD, payload=b"secret")
    await execute(redis_client, "DEL", keys.queue(ENV))
    await execute(redis_client, "ZADD", keys.orgs, FAR_MS, "another")
    with caplog.at_level(logging.INFO):
        await sweep(buffer)
        await sweep(buffer)
    told = [getattr(record, "fields", {}) for record in caplog.records if record.message == "mollifier.index_repaired"]
    assert told == [
        {"kind": "returned", "org_id": ORG, "env_id": ENV, "run_ids": ["a", "b"]},
        {"kind": "empty", "org_id": "another", "env_id": "", "level": "organization"},
    ]
    assert "secret" not in caplog.text


async def test_a_look_that_comes_late_harms_nothing(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    names = ("acked", "forgotten", "leased", "failed", "waiting", "queued")
    await hold(buffer, *names, kind=HELD)
    entries = [await take(buffer) for _ in names[:-1]]
    for entry in entries[:2]:
        assert await buffer.ack(entry) == "held"
    await execute(redis_client, "DEL", keys.entry("forgotten"))
    assert await buffer.fail(entries[3], "error") == "held"
    assert await buffer.requeue(entries[4], not_before_ms=FAR_MS) == "held"
    before = await state_of(redis_client)
    seen_before_all_this = Look(keys, Ready(ORG, ENV), [(name, "") for name in names])
    (found,) = await buffer.restore_many([seen_before_all_this], stalled_ms=1)
    assert isinstance(found, Restored)
    assert found.verdicts == ()
    assert await buffer.repair_many([Ready(ORG, ENV)]) == [("", "")]
    assert await state_of(redis_client) == before


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.lists(
        st.tuples(
            st.sampled_from(["accept", "accept", "accept", "pop", "ack", "retry", "later", "fail"]),
            st.sampled_from([(ORG, ENV), (ORG, "b"), ("org:2", "c:d")]),
        ),
        min_size=1,
        max_size=25,
    ),
    losses=st.lists(
        st.tuples(
            st.sampled_from(["orgs", "envs", "queue", "waiting", "draining", "failed", "usage", "entry"]),
            st.integers(0, 9),
        ),
        max_size=6,
    ),
)
async def test_after_one_sweep_all_that_is_held_is_drained_whatever_the_indexes_lost(
    *, buffer: Buffer, redis_client: Redis, history: list[tuple[str, tuple[str, str]]], losses: list[tuple[str, int]]
) -> None:
    await execute(redis_client, "FLUSHALL")
    dead, here = await played(buffer, history)
    for noun, pick in losses:
        dead |= await lost_from(redis_client, buffer, here, noun, pick)

    report = await sweep(buffer)

    later = [entry for org_id, _, run_id in here if (entry := await buffer.get_entry(org_id, run_id))]
    for entry in later:
        keys = buffer.keyspace.of(entry.org_id)
        if entry.state is EntryState.DRAINING:
            await expire_lease(redis_client, keys, entry.run_id)
        elif entry.not_before_ms is not None:
            member = f"{entry.sequence}:{entry.run_id}"
            assert await execute(redis_client, "ZADD", keys.waiting(entry.env_id), "XX", "CH", 1, member) == 1
            for key, name in ((keys.envs(entry.org_id), entry.env_id), (keys.orgs, entry.org_id)):
                await execute(redis_client, "ZADD", key, 1, name)
    await buffer.reclaim_expired()
    assert sorted(await drained(buffer)) == sorted({run_id for _, _, run_id in here} - dead)
    assert report.dead_letters == len(dead)
    assert set((await sweep(buffer)).mismatches) <= {"usage"}


async def played(
    buffer: Buffer, history: list[tuple[str, tuple[str, str]]]
) -> tuple[set[str], list[tuple[str, str, str]]]:
    """Play a history of held entries; return those that failed, and all that are not settled with their places."""
    here: dict[str, tuple[str, str, str]] = {}
    popped: list[Entry] = []
    dead: set[str] = set()
    for number, (step, (org_id, env_id)) in enumerate(history):
        if step == "accept":
            await hold(buffer, f"run-{number:02}", org=org_id, env=env_id, kind=HELD)
            here[f"run-{number:02}"] = (org_id, env_id, f"run-{number:02}")
        elif step == "pop":
            entry = await buffer.pop(org_id, env_id)
            popped += [entry] if entry is not None else []
        elif popped:
            entry = popped.pop(0)
            match step:
                case "ack":
                    await buffer.ack(entry)
                    del here[entry.run_id]
                case "fail":
                    await buffer.fail(entry, "error")
                    dead.add(entry.run_id)
                case _:
                    await buffer.requeue(entry, not_before_ms=FAR_MS if step == "later" else None)
    return dead, list(here.values())


async def lost_from(redis: Redis, buffer: Buffer, here: list[tuple[str, str, str]], noun: str, pick: int) -> set[str]:
    """Have one member, or all of them, lost from a key; or an entry. Return who is dead for it."""
    if not here:
        return set()
    org_id, env_id, run_id = here[pick % len(here)]
    keys = buffer.keyspace.of(org_id)
    key = {
        "orgs": keys.orgs,
        "envs": keys.envs(org_id),
        "queue": keys.queue(env_id),
        "waiting": keys.waiting(env_id),
        "draining": keys.draining,
        "failed": keys.failed,
        "usage": keys.usage,
        "entry": keys.entry(run_id),
    }[noun]
    if noun == "entry":
        lease_ended = await execute(redis, "ZADD", keys.draining, "XX", "CH", 1, run_id)
        assert lease_ended in (0, 1)
        await execute(redis, "DEL", key)
        return {run_id}
    if noun == "usage" or pick % 2:
        await execute(redis, "DEL", key)
    else:
        members = await execute(redis, "ZRANGE", key, 0, -1)
        if members:
            await execute(redis, "ZREM", key, members[pick % len(members)])
    return set()


# --- the report ----------------------------------------------------------------------------------------------------

tables = st.dictionaries(st.sampled_from(["queue", "late", "usage"]), st.integers(1, 2**53))


@given(st.builds(SweepReport, at_ms=st.integers(0, 2**53), stale=st.integers(0, 9), orphans=tables, repaired=tables))
def test_a_report_comes_back_from_the_fields_of_a_hash_as_it_was(report: SweepReport) -> None:
    fields = to_fields(report)
    as_read = {name.encode(): value.encode() for name, value in zip(fields[::2], fields[1::2], strict=True)}
    assert from_fields(as_read) == report
    assert from_fields({**as_read, b"what:a later release": b"1", b"adds": b"x"}) == report


@pytest.mark.parametrize("fields", [{}, {b"stale": b"1"}, {b"at_ms": b"x"}, {b"\xff": b"1"}, ValueError("WRONGTYPE")])
def test_what_does_not_read_as_a_report_is_none(fields: Any) -> None:
    assert from_fields(fields) is None
