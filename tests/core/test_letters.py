"""Dead letters: whatever an entry died of, it is listed with the reason, and can be read, revived or discarded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier import snapshots
from mollifier.buffer import Buffer, Disposal, Popped, Ready, Revival
from mollifier.buffer import letters as letters_part
from mollifier.cursors import as_us
from mollifier.entries import Owner, parse_owner
from mollifier.errors import BufferUnavailableError
from mollifier.keys import PartitionKeys
from mollifier.letters import Letter, LetterPlace, Reason
from mollifier.model import EntryKind, Snapshot
from mollifier.server import Server
from mollifier.settings import GIVE_UPS_MAX
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

HELD, AUDIT = EntryKind.HELD, EntryKind.AUDIT
SNAPSHOT = Snapshot(
    run_id="run",
    org_id=ORG,
    env_id=ENV,
    task_id="echo",
    created_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    parent_run_id="parent",
)
PAYLOAD = snapshots.encode(SNAPSHOT)

pytestmark = pytest.mark.leaves_keys


@pytest.fixture
def buffer(redis_client: Redis) -> Buffer:
    settings = msgspec.structs.replace(SETTINGS, drain_max_reclaims=0)
    return Buffer(Server(redis_client), lambda: settings)


async def letter(buffer: Buffer, run_id: str = "run") -> Letter:
    """Return a dead letter that is there."""
    found = await buffer.get_letter(run_id)
    assert found is not None
    return found


async def listed(buffer: Buffer, limit: int = 100, **of: str) -> list[str]:
    """Return the runs of all dead letters, read page by page."""
    run_ids: list[str] = []
    place: LetterPlace | None = None
    while True:
        page = await buffer.list_letters(beyond=place, limit=limit, **of)  # pyright: ignore[reportArgumentType] - one test's filter
        assert len(page.letters) <= limit
        run_ids += [each.run_id for each in page.letters]
        if page.next is None:
            return run_ids
        place = page.next


async def revive(buffer: Buffer, run_id: str = "run") -> str:
    (revived,) = await buffer.revive_many([run_id])
    assert isinstance(revived, Revival)
    return revived.reply


async def discard(buffer: Buffer, run_id: str = "run") -> str:
    (discarded,) = await buffer.discard_many([run_id])
    assert isinstance(discarded, Disposal)
    return discarded.reply


# --- ways to die ---------------------------------------------------------------------------------------------------

Die = Callable[[Buffer, Redis, PartitionKeys], Awaitable[None]]


class Death(NamedTuple):
    """A way to die, and what is to be said of it."""

    die: Die
    reason: Reason
    said: str


async def give_up(buffer: Buffer, redis: Redis, keys: PartitionKeys) -> None:
    assert await buffer.fail(await take(buffer), "ValueError: no room") == "held"


async def kill_its_drainers(buffer: Buffer, redis: Redis, keys: PartitionKeys) -> None:
    for _ in range(GIVE_UPS_MAX):
        await take(buffer)
        await expire_lease(redis, keys, "run")
        assert (await buffer.reclaim_expired()).returned == ("run",)
    await take(buffer)
    await expire_lease(redis, keys, "run")
    assert (await buffer.reclaim_expired()).failed == ("run",)


async def spoil(buffer: Buffer, redis: Redis, keys: PartitionKeys) -> None:
    await execute(redis, "HSET", keys.entry("run"), "accepted_ms", "yesterday")
    assert await buffer.pop(ORG, ENV) is None


async def spoil_while_it_is_drained(buffer: Buffer, redis: Redis, keys: PartitionKeys) -> None:
    await take(buffer)
    await execute(redis, "HDEL", keys.entry("run"), "seq")
    await expire_lease(redis, keys, "run")
    assert (await buffer.reclaim_expired()).malformed == ("run",)


async def misplace(buffer: Buffer, redis: Redis, keys: PartitionKeys) -> None:
    await execute(redis, "HSET", keys.entry("run"), "org", b"\xff", "env", b"\xfe")
    assert await buffer.pop(ORG, ENV) is None


async def take_its_place(buffer: Buffer, redis: Redis, keys: PartitionKeys) -> None:
    await execute(redis, "SET", keys.entry("run"), "no hash")
    assert await buffer.pop(ORG, ENV) is None


async def evict(buffer: Buffer, redis: Redis, keys: PartitionKeys) -> None:
    await execute(redis, "DEL", keys.entry("run"))
    assert await buffer.pop(ORG, ENV) is None


DEATHS: Mapping[str, Death] = {
    "attempts exhausted": Death(give_up, Reason.FAILED, "ValueError: no room"),
    "drainers died": Death(kill_its_drainers, Reason.RECLAIM_LIMIT, "its lease ran out 4 times"),
    "malformed": Death(spoil, Reason.MALFORMED, "field 'accepted_ms' is not a number"),
    "malformed under a lease": Death(spoil_while_it_is_drained, Reason.MALFORMED, "field 'seq' is not a number"),
    "damaged ids": Death(misplace, Reason.MALFORMED, "fields 'org' and 'env'"),
    "no hash at all": Death(take_its_place, Reason.MALFORMED, "no hash"),
    "evicted": Death(evict, Reason.EVICTED, "the payload is lost"),
}
every_death = pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())


@every_death
async def test_a_dead_letter_is_listed_and_read_with_whose_it_was_and_what_it_died_of(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, death: Death
) -> None:
    await hold(buffer, "run", kind=HELD, payload=PAYLOAD)
    await death.die(buffer, redis_client, keys)
    before = await state_of(redis_client)

    (one,) = (await buffer.list_letters()).letters

    assert (one.run_id, one.org_id, one.env_id, one.reason) == ("run", ORG, ENV, death.reason)
    assert death.said in one.error
    assert one.died_at_ms == dict(before[keys.failed])[b"run"]
    whole = await letter(buffer)
    assert msgspec.structs.replace(whole, payload=None) == one
    has_payload = death.die not in (evict, take_its_place)
    assert (whole.payload, whole.payload_bytes, whole.task_id) == (
        (PAYLOAD, len(PAYLOAD), "echo") if has_payload else (None, None, None)
    )
    assert (await buffer.counts()).failed == 1
    assert await state_of(redis_client) == before


@every_death
async def test_whatever_it_died_of_nothing_is_left_of_a_letter_that_was_discarded(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, death: Death
) -> None:
    await hold(buffer, "neighbour", kind=HELD, env="next door")
    before = await state_of(redis_client)
    await hold(buffer, "run", kind=HELD, payload=PAYLOAD)
    await death.die(buffer, redis_client, keys)
    assert await discard(buffer) == "discarded"
    assert {**await state_of(redis_client), keys.seq: b"1"} == before
    assert await discard(buffer) == "missing"
    assert await buffer.get_letter("neighbour") is None


REPLAYABLE = {name: death for name, death in DEATHS.items() if death.reason in (Reason.FAILED, Reason.RECLAIM_LIMIT)}
LOST = {name: death for name, death in DEATHS.items() if name not in REPLAYABLE}


@pytest.mark.parametrize("death", REPLAYABLE.values(), ids=REPLAYABLE.keys())
async def test_a_revived_letter_is_queued_in_its_place_as_if_nobody_had_tried_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, death: Death
) -> None:
    await hold(buffer, "run", kind=HELD, payload=PAYLOAD)
    accepted = await state_of(redis_client)
    await death.die(buffer, redis_client, keys)
    await hold(buffer, "later", kind=HELD)
    assert await revive(buffer) == "revived"
    state = await state_of(redis_client)
    assert state[keys.entry("run")] == {**accepted[keys.entry("run")], b"taken": b"1"}
    assert [state.get(key) for key in (keys.failed, keys.draining)] == [None, None]
    assert await buffer.ready() == {ORG: (ENV,)}
    assert await revive(buffer) == "missing"
    assert await state_of(redis_client) == state
    assert await drain_ids(buffer) == ["run", "later"]
    assert {keys.owners, keys.usage, keys.held(ENV)} & set(await state_of(redis_client)) == set()


@pytest.mark.parametrize("death", LOST.values(), ids=LOST.keys())
async def test_what_is_not_whole_is_not_revived_and_stays_as_it_is(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, death: Death
) -> None:
    await hold(buffer, "run", kind=HELD, payload=PAYLOAD)
    await death.die(buffer, redis_client, keys)
    before = await state_of(redis_client)
    (refused,) = await buffer.revive_many(["run"])
    assert isinstance(refused, Revival)
    assert refused.reply == ("gone" if death.reason is Reason.EVICTED else "malformed")
    assert death.said in (refused.fault or "")
    assert await state_of(redis_client) == before


async def test_letters_are_revived_and_discarded_on_a_server_whose_memory_is_full(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    for run_id in ("run", "other"):
        await hold(buffer, run_id, kind=HELD)
        assert await buffer.fail(await take(buffer), "error") == "held"
    await execute(redis_client, "CONFIG", "SET", "maxmemory", 1)
    try:
        assert (await revive(buffer), await discard(buffer, "other")) == ("revived", "discarded")
    finally:
        await execute(redis_client, "CONFIG", "SET", "maxmemory", 0)
    assert await drain_ids(buffer) == ["run"]
    assert set(await state_of(redis_client)) == {keys.seq, keys.entry("run")}


# --- what is mended, restored, or alive ----------------------------------------------------------------------------


@pytest.mark.parametrize("die", [spoil, spoil_while_it_is_drained, misplace], ids=lambda die: die.__name__)
async def test_an_entry_that_was_mended_is_said_to_read_again_and_is_revived(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, die: Die
) -> None:
    await hold(buffer, "run", kind=HELD, payload=PAYLOAD)
    whole = (await state_of(redis_client))[keys.entry("run")]
    await die(buffer, redis_client, keys)
    for name, value in whole.items():
        await execute(redis_client, "HSET", keys.entry("run"), name, value)
    assert "reads as one again" in (await letter(buffer)).error
    assert await revive(buffer) == "revived"
    assert await drain_ids(buffer) == ["run"]


async def test_an_old_holder_cannot_settle_what_was_revived(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    stale = await take(buffer)
    await execute(redis_client, "HDEL", keys.entry("run"), "seq")
    await expire_lease(redis_client, keys, "run")
    await buffer.reclaim_expired()
    await execute(redis_client, "HSET", keys.entry("run"), "seq", stale.sequence)
    assert await revive(buffer) == "revived"
    for settle in (buffer.ack(stale), buffer.requeue(stale), buffer.fail(stale, "error")):
        assert await settle == "stale"
    assert await drain_ids(buffer) == ["run"]


async def test_an_evicted_entry_that_was_restored_is_revived_counted_and_listed_in_its_place(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD, payload=PAYLOAD)
    entry = await buffer.get_entry(ORG, "run")
    assert entry is not None
    assert await buffer.patch(entry, b"patch") == "held"
    before = await state_of(redis_client)
    copy = await execute(redis_client, "DUMP", keys.entry("run"))
    await evict(buffer, redis_client, keys)
    await execute(redis_client, "RESTORE", keys.entry("run"), 0, copy)
    assert await revive(buffer) == "revived"
    state = await state_of(redis_client)
    assert [state[key] for key in (keys.owners, keys.usage)] == [before[key] for key in (keys.owners, keys.usage)]
    assert state[keys.held(ENV)] == [(b"run", as_us(SNAPSHOT.created_at))]
    assert await buffer.held_children(ORG, ENV, "parent", 100) == ["run"]
    assert await drain_ids(buffer) == ["run"]


async def test_an_audit_copy_of_which_nothing_is_left_is_listed_as_expired_until_it_is_discarded(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    await give_up(buffer, redis_client, keys)
    copy = await letter(buffer)
    assert (copy.reason, copy.kind, copy.org_id) == (Reason.FAILED, AUDIT, ORG)
    await execute(redis_client, "DEL", keys.entry("run"))
    expired = await letter(buffer)
    assert (expired.reason, expired.org_id, expired.payload_bytes) == (Reason.EXPIRED, None, None)
    assert await revive(buffer) == "gone"
    assert await discard(buffer) == "discarded"
    assert (await buffer.counts()).failed == 0


async def test_a_revived_audit_copy_expires_as_it_would_have(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    await give_up(buffer, redis_client, keys)
    assert await revive(buffer) == "revived"
    for key in (keys.entry("run"), keys.queue(ENV), keys.envs(ORG), keys.orgs):
        left_ms = await lifetime_ms(redis_client, key)
        assert left_ms is not None
        assert left_ms <= SETTINGS.entry_ttl_s * 1000
    assert keys.owners not in await state_of(redis_client)


async def queued(buffer: Buffer) -> None:
    """Leave it where it is."""


async def waiting(buffer: Buffer) -> None:
    assert await buffer.requeue(await take(buffer), not_before_ms=2**42) == "held"


async def drained(buffer: Buffer) -> None:
    await take(buffer)


async def settled(buffer: Buffer) -> None:
    assert await buffer.ack(await take(buffer)) == "held"


@pytest.mark.parametrize("life", [queued, waiting, drained, settled], ids=lambda life: life.__name__)
async def test_a_letter_whose_run_was_accepted_anew_is_not_revived_and_costs_the_entry_nothing_when_discarded(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, life: Callable[[Buffer], Awaitable[None]]
) -> None:
    await hold(buffer, "run")
    await give_up(buffer, redis_client, keys)
    await execute(redis_client, "DEL", keys.entry("run"))
    await hold(buffer, "run")
    await life(buffer)
    before = await state_of(redis_client)
    assert await revive(buffer) == "alive"
    assert await state_of(redis_client) == before
    assert await discard(buffer) == "discarded"
    del before[keys.failed]
    assert await state_of(redis_client) == before


async def test_a_key_of_the_callers_that_a_malformed_entry_still_has_is_freed_with_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    mine, others = bound("task", "mine")[0], bound("task", "other's")[0]
    await buffer.accept("run", ENV, ORG, PAYLOAD, kind=HELD, bindings=[mine, others])
    await execute(redis_client, "SET", keys.idempotency(others.digest), "run:other", "EX", 60)
    await spoil(buffer, redis_client, keys)
    assert await discard(buffer) == "discarded"
    assert await buffer.bound_run(ORG, mine.digest) is None
    assert await buffer.bound_run(ORG, others.digest) == "other"


# --- many ----------------------------------------------------------------------------------------------------------


async def test_many_are_looked_up_over_all_partitions_and_each_is_revived_or_refused_by_itself(
    buffer: Buffer, redis_client: Redis
) -> None:
    organizations = [f"org-{number}" for number in range(8)]
    assert len({buffer.keyspace.of(org).number for org in organizations}) > 1
    for org in organizations:
        await hold(buffer, f"run of {org}", org=org, env=f"env of {org}", kind=HELD)
        assert await buffer.fail(await take(buffer, f"env of {org}", org), "error") == "held"
    await execute(redis_client, "DEL", buffer.keyspace.of("org-0").entry("run of org-0"))
    asked = ["nobody", *[f"run of {org}" for org in organizations], "run of org-1"]
    revived = await buffer.revive_many(asked)
    replies = [each.reply for each in revived if isinstance(each, Revival)]
    assert replies == ["missing", "gone", *["revived"] * 8]
    assert await buffer.ready() == {org: (f"env of {org}",) for org in organizations[1:]}
    discarded = await buffer.discard_many(["run of org-0", "run of org-1"])
    assert [each.reply for each in discarded if isinstance(each, Disposal)] == ["discarded", "missing"]
    assert await buffer.revive_many([]) == []


async def test_what_the_server_refuses_of_one_is_its_own_fault_alone(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", kind=HELD)
    await give_up(buffer, redis_client, keys)
    await hold(buffer, "bad", kind=HELD, env="bad")
    assert await buffer.fail(await take(buffer, "bad"), "error") == "held"
    await execute(redis_client, "SET", keys.queue("bad"), "no queue", "EX", 60)
    bad, good = await buffer.revive_many(["bad", "run"])
    assert isinstance(bad, BufferUnavailableError)
    assert isinstance(good, Revival)
    assert good.reply == "revived"


async def test_larger_payloads_than_can_be_read_together_are_listed_without_being_looked_into(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letters_part, "READ_BYTES_MAX", len(PAYLOAD) + 10)
    for run_id in ("old", "new"):
        await hold(buffer, run_id, kind=HELD, payload=PAYLOAD)
        assert await buffer.fail(await take(buffer), "error") == "held"
    new, old = (await buffer.list_letters()).letters
    assert [each.task_id for each in (new, old)] == ["echo", None]
    assert [each.payload_bytes for each in (new, old)] == [len(PAYLOAD)] * 2
    assert msgspec.structs.replace(old, run_id="", died_at_ms=0, accepted_at_ms=0, task_id="echo") == (
        msgspec.structs.replace(new, run_id="", died_at_ms=0, accepted_at_ms=0)
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deaths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(1, 4)), max_size=25),
    limit=st.integers(1, 7),
)
async def test_pages_of_any_size_list_every_letter_once_newest_first_in_all_and_by_owner(
    *, buffer: Buffer, redis_client: Redis, deaths: list[tuple[int, int, int]], limit: int
) -> None:
    await execute(redis_client, "FLUSHALL")
    expected: list[tuple[int, str, str, str]] = []
    for number, (org_number, env_number, died_at_ms) in enumerate(deaths):
        run_id, org, env = f"run-{number}", f"org-{org_number}", f"org-{org_number}/{env_number}"
        keys = buffer.keyspace.of(org)
        await execute(redis_client, "ZADD", keys.failed, died_at_ms, run_id)
        await execute(redis_client, "HSET", keys.owners, run_id, f"gone:{len(env)}:{env}{org}")
        expected.append((died_at_ms, run_id, org, env))
    expected.sort(reverse=True)
    assert await listed(buffer, limit) == [run_id for _, run_id, _, _ in expected]
    for org in {org for _, _, org, _ in expected}:
        assert await listed(buffer, limit, org_id=org) == [each[1] for each in expected if each[2] == org]
    for env in {env for _, _, _, env in expected}:
        assert await listed(buffer, limit, env_id=env) == [each[1] for each in expected if each[3] == env]


async def test_a_listing_for_one_of_many_owners_looks_through_a_bounded_number_and_says_where_to_go_on(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letters_part, "_CHUNK", 10)
    monkeypatch.setattr(letters_part, "_CHUNKS_MAX", 2)
    for number in range(35):
        env = "rare" if number == 0 else "common"
        await execute(redis_client, "ZADD", keys.failed, 1000 + number, f"run-{number}")
        await execute(redis_client, "HSET", keys.owners, f"run-{number}", f"gone:{len(env)}:{env}{ORG}")
    page = await buffer.list_letters(env_id="rare", limit=5)
    assert (page.letters, page.next) == ((), LetterPlace(1015, "run-15"))
    assert await listed(buffer, 5, env_id="rare") == ["run-0"]


async def test_an_entry_that_dies_meanwhile_moves_no_page(buffer: Buffer, keys: PartitionKeys) -> None:
    for run_id in ("a", "b", "c"):
        await hold(buffer, run_id)
        assert await buffer.fail(await take(buffer), "error") == "held"
    page = await buffer.list_letters(limit=2)
    assert await discard(buffer, page.letters[-1].run_id) == "discarded"
    await hold(buffer, "new")
    assert await buffer.fail(await take(buffer), "error") == "held"
    rest = await buffer.list_letters(beyond=page.next, limit=2)
    assert {each.run_id for each in (*page.letters, *rest.letters)} == {"a", "b", "c"}


# --- damaged ids elsewhere -----------------------------------------------------------------------------------------


async def test_an_audit_copy_whose_ids_are_no_text_keeps_nobody_from_being_reclaimed(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run", "other")
    (popped,) = await buffer.pop_many([(Ready(ORG, ENV), 2)])
    assert isinstance(popped, Popped)
    await execute(redis_client, "HSET", keys.entry("run"), "org", b"\xff", "bindings", b"\xff")
    for run_id in ("run", "other"):
        await expire_lease(redis_client, keys, run_id)
    reclaimed = await buffer.reclaim_expired()
    assert (reclaimed.malformed, reclaimed.returned) == (("run",), ("other",))
    assert (await letter(buffer)).org_id is None
    assert await discard(buffer) == "discarded"


def test_a_record_that_does_not_read_as_one_says_nothing() -> None:
    assert [parse_owner(record) for record in (b"", b"1", b"1:x:", b"x:1:eo", b"1:1:e\xff")] == [None] * 5
    assert parse_owner(b"1:1:eo") == Owner("o", "e", 1)
