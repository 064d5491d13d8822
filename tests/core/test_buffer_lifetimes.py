"""Lifetimes: audit copies and whatever names only them expire; a held entry and whatever names it never does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer, Reclaimed
from mollifier.keys import PartitionKeys, idempotency_digest
from mollifier.model import Entry, EntryKind
from mollifier.server import Server
from mollifier.settings import Settings
from tests.core.support import ENV, ORG, SETTINGS, bound, execute, expire_lease, hold, lifetime_ms, take

AUDIT, HELD = EntryKind.AUDIT, EntryKind.HELD
TTL_MS = SETTINGS.entry_ttl_s * 1000
FAR_OFF_MS = 2**42


def naming_keys(keys: PartitionKeys) -> list[str]:
    return [keys.queue(ENV), keys.envs(ORG), keys.orgs]


async def lifetimes(redis: Redis, names: list[str]) -> list[int | None]:
    return [await lifetime_ms(redis, name) for name in names]


async def ends(redis: Redis, name: str) -> bool:
    left_ms = await lifetime_ms(redis, name)
    return left_ms is not None and 0 < left_ms <= TTL_MS


async def test_an_audit_copy_and_all_that_names_it_expire(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await buffer.accept("run", ENV, ORG, b"", bindings=bound("task", "key"))
    binding = keys.idempotency(idempotency_digest(ENV, "task", "key"))
    assert await lifetime_ms(redis_client, binding)
    for name in (keys.entry("run"), *naming_keys(keys)):
        assert await ends(redis_client, name), name


async def test_names_live_as_long_as_the_last_audit_copy_they_name(redis_client: Redis, keys: PartitionKeys) -> None:
    lifetime_s = 1000
    buffer = Buffer(Server(redis_client), lambda: Settings(partitions=SETTINGS.partitions, entry_ttl_s=lifetime_s))
    await hold(buffer, "long")
    lifetime_s = 10
    await hold(buffer, "short")
    for name in naming_keys(keys):
        assert (await lifetime_ms(redis_client, name) or 0) > 900_000, name


@pytest.mark.leaves_keys
async def test_a_held_entry_and_all_that_names_it_never_expire(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await buffer.accept("run", ENV, ORG, b"", kind=HELD, bindings=bound("task", "key"))
    binding = keys.idempotency(idempotency_digest(ENV, "task", "key"))
    names = [keys.entry("run"), keys.held(ENV), *naming_keys(keys)]
    assert await lifetimes(redis_client, names) == [None] * 5
    assert (await lifetime_ms(redis_client, binding) or 0) > TTL_MS


@pytest.mark.leaves_keys
@pytest.mark.parametrize("order", [(AUDIT, HELD), (HELD, AUDIT), (AUDIT, HELD, AUDIT)], ids=str)
async def test_a_name_shared_by_both_kinds_never_expires(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, order: tuple[EntryKind, ...]
) -> None:
    for number, kind in enumerate(order):
        await hold(buffer, f"run-{number}", kind=kind)
    assert await lifetimes(redis_client, naming_keys(keys)) == [None] * 3
    for number, kind in enumerate(order):
        left_ms = await lifetime_ms(redis_client, keys.entry(f"run-{number}"))
        assert (left_ms is None) == (kind is HELD)


@pytest.mark.leaves_keys
async def test_environments_of_one_organization_live_each_for_itself(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "audit", env="a")
    await hold(buffer, "held", env="h", kind=HELD)
    assert await ends(redis_client, keys.queue("a"))
    assert await lifetimes(redis_client, [keys.queue("h"), keys.envs(ORG), keys.orgs]) == [None] * 3


async def drained(buffer: Buffer, entry: Entry) -> None:
    """Leave the entry under its lease."""


async def requeued(buffer: Buffer, entry: Entry) -> None:
    assert await buffer.requeue(entry) == "held"


async def put_off(buffer: Buffer, entry: Entry) -> None:
    assert await buffer.requeue(entry, not_before_ms=FAR_OFF_MS) == "held"


async def failed(buffer: Buffer, entry: Entry) -> None:
    assert await buffer.fail(entry, "error") == "held"


Handle = Callable[[Buffer, Entry], Awaitable[None]]
STAGES: dict[str, tuple[Handle, Callable[[PartitionKeys], list[str]]]] = {
    "drained": (drained, lambda keys: [keys.draining]),
    "requeued": (requeued, naming_keys),
    "put off": (put_off, lambda keys: [keys.waiting(ENV), keys.envs(ORG), keys.orgs]),
    "failed": (failed, lambda keys: [keys.failed]),
}

every_stage = pytest.mark.parametrize(("handle", "names"), STAGES.values(), ids=STAGES.keys())
Names = Callable[[PartitionKeys], list[str]]


@every_stage
async def test_an_audit_copy_expires_at_every_stage_and_so_does_what_names_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, handle: Handle, names: Names
) -> None:
    await hold(buffer, "run")
    await execute(redis_client, "PEXPIRE", keys.entry("run"), 50_000)
    await handle(buffer, await take(buffer))
    for name in (keys.entry("run"), *names(keys)):
        left_ms = await lifetime_ms(redis_client, name)
        assert left_ms is not None, name
        assert left_ms <= 50_000, name


@pytest.mark.leaves_keys
@every_stage
async def test_a_held_entry_never_expires_at_any_stage_and_neither_does_what_names_it(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys, handle: Handle, names: Names
) -> None:
    await hold(buffer, "run", kind=HELD)
    await handle(buffer, await take(buffer))
    assert await lifetimes(redis_client, [keys.entry("run"), *names(keys)]) == [None] * (1 + len(names(keys)))


@pytest.mark.leaves_keys
@every_stage
@pytest.mark.parametrize("kinds", [(AUDIT, HELD), (HELD, AUDIT)], ids=str)
async def test_a_name_shared_by_both_kinds_never_expires_at_any_stage(
    *,
    buffer: Buffer,
    redis_client: Redis,
    keys: PartitionKeys,
    handle: Handle,
    names: Names,
    kinds: tuple[EntryKind, EntryKind],
) -> None:
    for number, kind in enumerate(kinds):
        await hold(buffer, f"run-{number}", kind=kind)
    for entry in [await take(buffer), await take(buffer)]:
        await handle(buffer, entry)
    assert await lifetimes(redis_client, names(keys)) == [None] * len(names(keys))


@pytest.mark.leaves_keys
async def test_a_waiting_held_entry_that_falls_due_is_named_for_ever(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "held", kind=HELD)
    assert await buffer.requeue(await take(buffer), not_before_ms=1) == "held"
    await hold(buffer, "audit")
    (entry,) = [await take(buffer)]
    assert entry.run_id == "held"
    assert await buffer.requeue(entry) == "held"
    assert await lifetimes(redis_client, naming_keys(keys)) == [None] * 3


@pytest.mark.leaves_keys
async def test_a_held_entry_reclaimed_among_audit_copies_is_named_for_ever(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    await hold(buffer, "held", kind=HELD)
    await take(buffer)
    await hold(buffer, "audit")
    assert await ends(redis_client, keys.queue(ENV))
    await expire_lease(redis_client, keys, "held")
    assert await buffer.reclaim_expired() == Reclaimed(returned=("held",))
    assert await lifetimes(redis_client, naming_keys(keys)) == [None] * 3


async def test_an_audit_copy_about_to_expire_makes_nothing_immortal(
    buffer: Buffer, redis_client: Redis, keys: PartitionKeys
) -> None:
    # A key whose last millisecond runs has a PTTL of 0, which must not read as "for ever".
    for number in range(200):
        await hold(buffer, f"run-{number}", env=f"env-{number}")
        entry = await take(buffer, env=f"env-{number}")
        await execute(redis_client, "PEXPIRE", keys.entry(entry.run_id), 1)
        await buffer.fail(entry, "error")
        if await execute(redis_client, "EXISTS", keys.failed):
            assert await execute(redis_client, "PTTL", keys.failed) != -1
