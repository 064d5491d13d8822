"""Reading: listings and counts tell what is there and change nothing."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.buffer import Buffer, HeldPlace, Reclaimed
from mollifier.errors import BufferUnavailableError, MalformedEntryError
from mollifier.keys import PartitionKeys
from mollifier.model import Entry, EntryKind
from mollifier.server import Server, connect
from tests.core.support import ENV, ORG, SETTINGS, execute, hold, state_of, take

FAR_OFF_MS = 2**42


async def test_a_run_that_is_not_held_has_no_entry(buffer: Buffer) -> None:
    assert await buffer.get_entry(ORG, "nobody") is None
    assert await buffer.get_entries(ORG, []) == []


async def test_entries_are_listed_oldest_first_a_page_at_a_time(buffer: Buffer) -> None:
    await hold(buffer, *"abcde")

    async def page(offset: int, limit: int) -> list[str]:
        entries = await buffer.list_entries(ORG, ENV, offset=offset, limit=limit)
        return [entry.run_id for entry in entries if isinstance(entry, Entry)]

    assert await page(0, 2) == ["a", "b"]
    assert await page(2, 2) == ["c", "d"]
    assert await page(4, 2) == ["e"]
    assert await page(6, 2) == []
    assert await page(0, 100) == list("abcde")


async def test_a_listing_passes_over_what_is_gone_and_reports_what_is_broken(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "gone", "broken", "sound")
    await execute(redis_client, "DEL", keys.entry("gone"))
    await execute(redis_client, "HSET", keys.entry("broken"), "accepted_ms", "soon")
    broken, sound = await buffer.list_entries(ORG, ENV)
    assert isinstance(broken, MalformedEntryError)
    assert broken.run_id == "broken"
    assert isinstance(sound, Entry)
    assert sound.run_id == "sound"


@pytest.mark.leaves_keys
async def test_counts_tell_how_many_are_in_each_state(buffer: Buffer) -> None:
    await hold(buffer, *"abcd", kind=EntryKind.HELD)
    await hold(buffer, "other", env="env-2", org="org-2", kind=EntryKind.HELD)
    assert await buffer.requeue(await take(buffer), not_before_ms=FAR_OFF_MS) == "held"
    assert await buffer.fail(await take(buffer), "error") == "held"
    await take(buffer)
    counts = await buffer.counts()
    assert (counts.queued, counts.waiting, counts.draining, counts.failed) == (2, 1, 1, 1)
    assert counts.organizations == (ORG, "org-2")
    assert counts.left == 5


async def test_counts_of_an_empty_buffer_are_zero(buffer: Buffer) -> None:
    counts = await buffer.counts()
    assert (counts.queued, counts.waiting, counts.draining, counts.failed, counts.left) == (0, 0, 0, 0, 0)
    assert counts.organizations == ()
    assert counts.oldest_ms is None


async def test_counts_tell_the_age_of_the_oldest_queued_entry(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "old", env="a")
    await hold(buffer, "new", env="b")
    accepted_ms = int(await execute(redis_client, "HGET", keys.entry("old"), "accepted_ms"))
    await execute(redis_client, "HSET", keys.entry("old"), "accepted_ms", accepted_ms - 60_000)
    oldest_ms = (await buffer.counts()).oldest_ms
    assert oldest_ms is not None
    assert 60_000 <= oldest_ms < 120_000


async def test_reading_changes_nothing(buffer: Buffer, redis_client: Redis, keys: PartitionKeys) -> None:
    await hold(buffer, *"abc")
    await take(buffer)
    await execute(redis_client, "DEL", keys.entry("b"))
    before = await state_of(redis_client)
    await buffer.counts()
    await buffer.ready()
    await buffer.list_entries(ORG, ENV)
    await buffer.get_entries(ORG, ["a", "b", "nobody"])
    await buffer.ping()
    assert await state_of(redis_client) == before


async def test_an_index_of_another_type_crashes_no_reader(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "run")
    await execute(redis_client, "SET", keys.draining, "not a sorted set", "EX", 60)
    other = next(p for p in buffer.keyspace.partitions if p != keys)
    await execute(redis_client, "SET", other.orgs, "not a sorted set", "EX", 60)
    assert (await buffer.counts()).queued == 1
    assert await buffer.ready() == {ORG: (ENV,)}
    assert await buffer.reclaim_expired() == Reclaimed()


async def test_every_operation_on_a_server_that_is_not_there_is_one_kind_of_error(redis_client: Redis) -> None:
    there = Buffer(Server(redis_client), lambda: SETTINGS)
    await hold(there, "run")
    entry = await take(there)
    async with connect("unix:///nowhere/valkey.sock") as redis:
        buffer = Buffer(Server(redis), lambda: SETTINGS)
        for operation in (
            buffer.claim_layout(),
            buffer.ping(),
            buffer.accept("run", ENV, ORG, b""),
            buffer.ready(),
            buffer.pop(ORG, ENV),
            buffer.ack(entry),
            buffer.requeue(entry),
            buffer.fail(entry, "error"),
            buffer.extend_many([entry]),
            buffer.reclaim_expired(),
            buffer.get_entry(ORG, "run"),
            buffer.list_entries(ORG, ENV),
            buffer.counts(),
        ):
            with pytest.raises(BufferUnavailableError):
                await operation


# --- where held runs stand -----------------------------------------------------------------------------------------

places = st.lists(
    st.tuples(st.integers(0, 4) | st.integers(2**50, 2**50 + 2), st.text("ab_09", min_size=1, max_size=3)).map(
        lambda pair: HeldPlace(*pair)
    ),
    unique_by=lambda place: place.run_id,
    max_size=20,
)


@pytest.mark.leaves_keys
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=places, limit=st.integers(1, 5), newest_first=st.booleans(), span=st.tuples(st.integers(0, 4), st.none()))
async def test_held_places_are_walked_in_order_in_chunks_of_any_size(
    buffer: Buffer,
    redis_client: Redis,
    *,
    held: list[HeldPlace],
    limit: int,
    newest_first: bool,
    span: tuple[int | None, int | None],
) -> None:
    await execute(redis_client, "FLUSHALL")
    for place in held:
        await buffer.accept(place.run_id, ENV, ORG, b"", kind=EntryKind.HELD, created_us=place.created_us)
    walked: list[HeldPlace] = []
    while True:
        chunk = await buffer.held_places(
            ORG,
            ENV,
            beyond=walked[-1] if walked else None,
            newest_first=newest_first,
            limit=limit,
            from_us=span[0],
            to_us=span[1],
        )
        walked += chunk
        if len(chunk) < limit:
            break

    inside = [place for place in held if place.created_us >= (span[0] or 0)]
    assert walked == sorted(inside, reverse=newest_first)


@pytest.mark.leaves_keys
async def test_a_place_need_not_be_taken_for_others_to_be_beyond_it(buffer: Buffer) -> None:
    for run_id in ("a", "c", "e"):
        await buffer.accept(run_id, ENV, ORG, b"", kind=EntryKind.HELD, created_us=7)

    assert await buffer.held_places(ORG, ENV, beyond=HeldPlace(7, "d")) == [HeldPlace(7, "c"), HeldPlace(7, "a")]
    assert await buffer.held_places(ORG, ENV, beyond=HeldPlace(7, "b"), newest_first=False) == [
        HeldPlace(7, "c"),
        HeldPlace(7, "e"),
    ]
