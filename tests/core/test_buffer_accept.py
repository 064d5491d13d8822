"""Accept: one run is stored once, under the next sequence number, whatever comes twice and whatever it holds."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.buffer import Acceptance, Accepted, Bound, Buffer, Claimed, DuplicateKey, DuplicateRun, KeyClaimed
from mollifier.errors import BufferUnavailableError, SettingsError
from mollifier.keys import PartitionKeys, idempotency_digest
from mollifier.model import Entry, EntryKind, EntryState
from mollifier.server import Server
from mollifier.settings import Settings
from tests.core.support import ENV, ORG, SETTINGS, bound, execute, hold, lifetime_ms, state_of, take

KEY = ("task", "key")
DIGEST = idempotency_digest(ENV, *KEY)


async def test_an_accepted_entry_is_queued_with_everything_it_was_given(buffer: Buffer, redis_client: Redis) -> None:
    seconds, _ = await execute(redis_client, "TIME")
    outcome = await buffer.accept("run", ENV, ORG, b"payload")
    assert outcome == Accepted("run", 1)
    entry = await buffer.get_entry(ORG, "run")
    assert entry is not None
    assert (entry.run_id, entry.env_id, entry.org_id, entry.payload) == ("run", ENV, ORG, b"payload")
    assert (entry.state, entry.kind, entry.sequence) == (EntryState.QUEUED, EntryKind.AUDIT, 1)
    assert (entry.attempts, entry.reclaims, entry.lease) == (0, 0, 0)
    assert (entry.not_before_ms, entry.patches, entry.bindings, entry.error) == (None, (), (), None)
    assert entry.accepted_at_ms >= int(seconds) * 1000


async def test_an_accept_makes_the_environment_ready(buffer: Buffer) -> None:
    await hold(buffer, "run")
    assert await buffer.ready() == {ORG: (ENV,)}


async def test_sequence_numbers_rise_within_an_environment(buffer: Buffer) -> None:
    outcomes = [await buffer.accept(f"run-{n}", ENV, ORG, b"") for n in range(5)]
    sequences = [outcome.sequence for outcome in outcomes if isinstance(outcome, Accepted)]
    assert sequences == sorted(set(sequences))
    assert len(sequences) == 5


def entry_of(run_id: str, **fields: object) -> Acceptance:
    return Acceptance(**{"run_id": run_id, "env_id": ENV, "org_id": ORG, "payload": b"", **fields})  # pyright: ignore[reportArgumentType]


async def test_many_entries_are_stored_in_their_order_each_with_its_own_outcome(buffer: Buffer) -> None:
    await hold(buffer, "there")
    outcomes = await buffer.accept_many(
        [
            entry_of("first"),
            entry_of("there"),
            entry_of("keyed", bindings=bound(*KEY)),
            entry_of("same key", bindings=bound(*KEY)),
            entry_of("last"),
        ]
    )
    assert outcomes == [
        Accepted("first", 2),
        DuplicateRun("there"),
        Accepted("keyed", 3),
        DuplicateKey("keyed", DIGEST),
        Accepted("last", 4),
    ]
    queued = await buffer.list_entries(ORG, ENV)
    assert [entry.run_id for entry in queued] == ["there", "first", "keyed", "last"]


async def test_an_entry_that_cannot_be_stored_harms_no_other_of_its_call(buffer: Buffer, redis_client: Redis) -> None:
    await execute(redis_client, "SET", buffer.keyspace.of(ORG).queue("broken"), "no queue", "EX", 60)
    first, broken, last = await buffer.accept_many([entry_of("a"), entry_of("b", env_id="broken"), entry_of("c")])
    assert isinstance(first, Accepted)
    assert isinstance(broken, BufferUnavailableError)
    assert isinstance(last, Accepted)


async def test_storing_nothing_stores_nothing(buffer: Buffer, redis_client: Redis) -> None:
    assert await buffer.accept_many([]) == []
    assert await state_of(redis_client) == {}


async def test_many_keys_are_claimed_in_their_order_up_to_the_first_that_is_anothers_claim(buffer: Buffer) -> None:
    await buffer.accept("run", ENV, ORG, b"", bindings=bound(*KEY))
    (binding,) = bound(*KEY)
    await buffer.claim(ORG, "theirs", "they", 60_000)

    outcomes = await buffer.claim_many(ORG, ["ours", binding.digest, "too", "theirs", "after"], "we", 60_000)

    assert outcomes == [Claimed(), Bound("run"), Claimed(), KeyClaimed()]
    assert await buffer.claim(ORG, "too", "they", 60_000) == KeyClaimed()
    assert await buffer.claim(ORG, "after", "they", 60_000) == Claimed()


async def test_releasing_many_claims_frees_those_that_are_the_claimants_own(buffer: Buffer) -> None:
    await buffer.claim_many(ORG, ["a", "b"], "we", 60_000)
    await buffer.claim(ORG, "theirs", "they", 60_000)

    assert await buffer.release(ORG, ["a", "theirs", "b", "nobody's"], "we") == 2

    outcomes = [await buffer.claim(ORG, digest, "others", 60_000) for digest in ("a", "theirs", "b")]
    assert outcomes == [Claimed(), KeyClaimed(), Claimed()]


async def arrange(buffer: Buffer, state: EntryState, kind: EntryKind) -> Entry | None:
    """Bring the run `run` into the state; return the entry of the pop that this took."""
    await hold(buffer, "run", kind=kind)
    if state is EntryState.QUEUED:
        return None
    entry = await take(buffer)
    if state is EntryState.MATERIALISED:
        assert await buffer.ack(entry) == "held"
    if state is EntryState.FAILED:
        assert await buffer.fail(entry, "error") == "held"
    return entry


@pytest.mark.leaves_keys
@pytest.mark.parametrize("state", EntryState)
@pytest.mark.parametrize(
    ("first", "second"),
    [(EntryKind.AUDIT, EntryKind.AUDIT), (EntryKind.HELD, EntryKind.AUDIT), (EntryKind.HELD, EntryKind.HELD)],
)
async def test_a_second_accept_of_a_run_in_any_state_changes_nothing_and_says_so(
    buffer: Buffer, redis_client: Redis, state: EntryState, first: EntryKind, second: EntryKind
) -> None:
    await arrange(buffer, state, first)
    before = await state_of(redis_client)
    again = await buffer.accept("run", ENV, ORG, b"another payload", kind=second, bindings=bound(*KEY))
    assert again == DuplicateRun("run")
    assert await state_of(redis_client) == before


@pytest.mark.leaves_keys
@pytest.mark.parametrize("state", [*EntryState, "WAITING"])
async def test_a_held_entry_takes_the_place_of_an_audit_copy_in_any_state(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, state: EntryState | str
) -> None:
    if isinstance(state, EntryState):
        taken = await arrange(buffer, state, EntryKind.AUDIT)
    else:
        taken = await arrange(buffer, EntryState.DRAINING, EntryKind.AUDIT)
        assert taken is not None
        assert await buffer.requeue(taken, not_before_ms=2**42) == "held"
    assert isinstance(await buffer.accept("before", ENV, ORG, b""), Accepted)
    outcome = await buffer.accept("run", ENV, ORG, b"held", kind=EntryKind.HELD, bindings=bound(*KEY))
    assert isinstance(outcome, Accepted)
    assert isinstance(await buffer.accept("after", ENV, ORG, b""), Accepted)

    # What is all there is of a run, and whatever names it, is for ever.
    for key in (keys.entry("run"), keys.queue(ENV), keys.held(ENV), keys.envs(ORG), keys.orgs, keys.owners, keys.usage):
        assert await lifetime_ms(redis_client, key) is None
    if taken is not None:
        for settle in (buffer.ack, buffer.requeue):
            assert await settle(taken) == "stale"
        assert await buffer.fail(taken, "late") == "stale"
    counts = await buffer.counts()
    assert (counts.queued, counts.waiting, counts.draining, counts.failed) == (3, 0, 0, 0)
    entries = [await take(buffer) for _ in range(3)]
    assert [entry.run_id for entry in entries] == ["before", "run", "after"]
    assert (entries[1].kind, entries[1].payload, entries[1].attempts) == (EntryKind.HELD, b"held", 0)
    assert entries[1].bindings == tuple(binding.digest for binding in bound(*KEY))
    assert await buffer.ack(entries[1]) == "held"


@pytest.mark.leaves_keys
async def test_an_audit_copy_stays_as_it_is_where_the_held_entrys_key_is_anothers(
    buffer: Buffer, redis_client: Redis
) -> None:
    await hold(buffer, "run")
    await buffer.accept("other", ENV, ORG, b"", kind=EntryKind.HELD, bindings=bound(*KEY))
    before = await state_of(redis_client)
    outcome = await buffer.accept("run", ENV, ORG, b"held", kind=EntryKind.HELD, bindings=bound(*KEY))
    assert outcome == DuplicateKey("other", DIGEST)
    assert await state_of(redis_client) == before


async def test_a_second_accept_of_a_waiting_run_changes_nothing(buffer: Buffer, redis_client: Redis) -> None:
    await hold(buffer, "run")
    assert await buffer.requeue(await take(buffer), not_before_ms=2**42) == "held"
    before = await state_of(redis_client)
    assert await buffer.accept("run", ENV, ORG, b"another payload") == DuplicateRun("run")
    assert await state_of(redis_client) == before


async def test_concurrent_accepts_of_one_run_make_one_entry(buffer: Buffer, redis_client: Redis) -> None:
    outcomes = await asyncio.gather(*(buffer.accept("run", ENV, ORG, b"%d" % n) for n in range(20)))
    assert [type(outcome) for outcome in outcomes].count(Accepted) == 1
    assert outcomes.count(DuplicateRun("run")) == 19
    assert (await take(buffer)).run_id == "run"
    assert await buffer.pop(ORG, ENV) is None


async def test_a_key_bound_to_a_live_entry_answers_that_entrys_run(buffer: Buffer, redis_client: Redis) -> None:
    assert await buffer.accept("first", ENV, ORG, b"", bindings=bound(*KEY)) == Accepted("first", 1)
    before = await state_of(redis_client)
    assert await buffer.accept("second", ENV, ORG, b"", bindings=bound(*KEY)) == DuplicateKey("first", DIGEST)
    assert await state_of(redis_client) == before


async def test_concurrent_accepts_of_one_key_make_one_entry(buffer: Buffer) -> None:
    outcomes = await asyncio.gather(
        *(buffer.accept(f"run-{n}", ENV, ORG, b"", bindings=bound(*KEY)) for n in range(20))
    )
    (winner,) = (outcome for outcome in outcomes if isinstance(outcome, Accepted))
    assert outcomes.count(DuplicateKey(winner.run_id, DIGEST)) == 19
    assert (await buffer.counts()).queued == 1


@pytest.mark.parametrize("settle", ["ack", "fail"])
async def test_a_key_is_free_again_once_its_entry_is_settled(buffer: Buffer, settle: str) -> None:
    await buffer.accept("first", ENV, ORG, b"", bindings=bound(*KEY))
    entry = await take(buffer)
    assert await (buffer.ack(entry) if settle == "ack" else buffer.fail(entry, "error")) == "held"
    assert isinstance(await buffer.accept("second", ENV, ORG, b"", bindings=bound(*KEY)), Accepted)


async def test_a_key_stays_bound_while_its_entry_is_drained_and_retried(buffer: Buffer) -> None:
    await buffer.accept("first", ENV, ORG, b"", bindings=bound(*KEY))
    entry = await take(buffer)
    assert await buffer.accept("second", ENV, ORG, b"", bindings=bound(*KEY)) == DuplicateKey("first", DIGEST)
    assert await buffer.requeue(entry) == "held"
    assert await buffer.accept("second", ENV, ORG, b"", bindings=bound(*KEY)) == DuplicateKey("first", DIGEST)


async def test_a_late_settlement_frees_no_key_that_has_a_new_owner(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await buffer.accept("first", ENV, ORG, b"", bindings=bound(*KEY))
    entry = await take(buffer)
    binding = keys.idempotency(idempotency_digest(ENV, *KEY))
    await execute(redis_client, "SET", binding, "run:second", "EX", 60)
    assert await buffer.ack(entry) == "held"
    assert await buffer.accept("third", ENV, ORG, b"", bindings=bound(*KEY)) == DuplicateKey("second", DIGEST)


@pytest.mark.parametrize(
    ("env", "key"),
    [("other", KEY), (ENV, ("other", "key")), (ENV, ("task", "other")), (ENV, ("taskkey", "")), (ENV, ("tas", "kkey"))],
)
async def test_keys_of_other_environments_and_tasks_do_not_collide(
    buffer: Buffer, env: str, key: tuple[str, str]
) -> None:
    await buffer.accept("first", ENV, ORG, b"", bindings=bound(*KEY))
    assert isinstance(await buffer.accept("second", env, ORG, b"", bindings=bound(*key, env=env)), Accepted)


names = (f"run-{number}" for number in itertools.count())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.binary(max_size=2000) | st.text(max_size=500).map(lambda text: text.encode("utf-8", "surrogatepass")))
async def test_payload_bytes_come_back_exactly_as_they_went_in(buffer: Buffer, payload: bytes) -> None:
    run_id = next(names)
    await hold(buffer, run_id, payload=payload)
    stored = await buffer.get_entry(ORG, run_id)
    assert stored is not None
    assert stored.payload == payload
    entry = await take(buffer)
    assert (entry.run_id, entry.payload) == (run_id, payload)
    assert await buffer.requeue(entry) == "held"
    again = await take(buffer)
    assert again.payload == payload
    assert await buffer.ack(again) == "held"


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b"{}", b"9007199254740993", b"1e309", b'"\\u0000"', b"\x00\xff", b"[" * 5000, b"x" * 1_000_000],
    ids=[
        "empty",
        "empty array",
        "empty object",
        "2^53+1",
        "1e309",
        "NUL escape",
        "bytes",
        "deep nesting",
        "a megabyte",
    ],
)
async def test_awkward_payloads_survive_the_buffer(buffer: Buffer, payload: bytes) -> None:
    await hold(buffer, "run", payload=payload)
    assert (await take(buffer)).payload == payload


@pytest.mark.leaves_keys("mollifier:partitions")
async def test_a_buffer_made_with_another_number_of_partitions_is_refused(redis_client: Redis) -> None:
    def buffer_of(partitions: int) -> Buffer:
        settings = Settings(partitions=partitions)
        return Buffer(Server(redis_client), lambda: settings)

    await buffer_of(8).claim_layout()
    await buffer_of(8).claim_layout()
    with pytest.raises(SettingsError, match=r"MOLLIFIER_PARTITIONS.*16.*8"):
        await buffer_of(16).claim_layout()
    await buffer_of(8).claim_layout()


async def test_an_audit_copys_lifetime_is_read_at_the_accept(redis_client: Redis, keys: PartitionKeys) -> None:
    lifetime_s = 100
    buffer = Buffer(Server(redis_client), lambda: Settings(partitions=SETTINGS.partitions, entry_ttl_s=lifetime_s))
    await hold(buffer, "short")
    lifetime_s = 5000
    await hold(buffer, "long")
    assert 0 < await execute(redis_client, "PTTL", keys.entry("short")) <= 100_000
    assert 100_000 < await execute(redis_client, "PTTL", keys.entry("long")) <= 5_000_000
