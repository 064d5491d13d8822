"""Claims: of any number of keys at once, each is one claimant's at a time, and nobody waits for whoever waits for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from mollifier import snapshots
from mollifier.backoff import Backoff
from mollifier.bindings import bindings
from mollifier.buffer import Buffer, Claimed, ClaimOutcome, Doubted, KeyClaimed
from mollifier.circuit import Circuit
from mollifier.claims import Claims
from mollifier.deadline import Breaker
from mollifier.engine import Existing
from mollifier.errors import BufferUnavailableError, EngineUnavailableError
from mollifier.model import EntryKind, Snapshot
from mollifier.refuge import Refuge
from mollifier.telemetry import Telemetry
from tests.core.support import ENV, ORG, SETTINGS, execute, lifetime_ms, until
from tests.model.engine import MemoryRunEngine

NOW = datetime(2030, 1, 2, tzinfo=UTC)
SOON = NOW + timedelta(days=1)

pytestmark = pytest.mark.leaves_keys("*:entry:*", "*:queue:*", "*:held:*", "*:owners", "*:usage", "*:orgs", "*:envs:*")


def keyed(key: str | None, request_key: str | None = None) -> Snapshot:
    return Snapshot(
        run_id=f"run-{key}",
        org_id=ORG,
        env_id=ENV,
        task_id="task",
        created_at=NOW,
        idempotency_key=key,
        idempotency_expires_at=SOON,
        request_key=request_key,
        request_key_expires_at=SOON,
    )


def digest_of(key: str) -> str:
    ((_, binding),) = bindings(keyed(key))
    return binding.digest


async def hold(buffer: Buffer, run_id: str, snapshot: Snapshot) -> None:
    """Bind the snapshot's keys to a held run."""
    found = [binding for _, binding in bindings(snapshot)]
    payload = snapshots.encode(snapshot)
    await buffer.accept(run_id, ENV, ORG, payload, kind=EntryKind.HELD, bindings=found)


async def outcome(buffer: Buffer, key: str, token: str = "asks") -> ClaimOutcome:
    """Tell whose key it is, leaving it as it was."""
    found = await buffer.claim(ORG, digest_of(key), token, 60_000)
    await buffer.release(ORG, [digest_of(key)], token)
    return found


async def rest(_: float) -> None:
    await asyncio.sleep(0)


def refuge() -> Refuge:
    return Refuge(MemoryRunEngine(lambda: NOW), Telemetry(), monotonic=lambda: 0.0, jitter=lambda: 0.0)


def claims_of(
    buffer: Buffer, sleep: Callable[[float], Awaitable[None]] = rest, breaker: Breaker | None = None
) -> Claims:
    return Claims(
        buffer,
        lambda: SETTINGS,
        Telemetry(),
        refuge=refuge(),
        engine_deadline_ms=15_000,
        breaker=breaker,
        sleep=sleep,
        new_token=lambda: "ours",
    )


async def test_free_keys_are_claimed_until_they_are_released(buffer: Buffer) -> None:
    claims = claims_of(buffer)

    taken = await claims.take([keyed("a"), keyed(None), keyed("b", "r"), keyed("a")])

    assert taken.existing == (None, None, None, None)
    assert len(taken.claim.digests) == 3
    assert [await outcome(buffer, key) for key in "ab"] == [KeyClaimed(), KeyClaimed()]
    await claims.release(taken.claim)
    assert [await outcome(buffer, key) for key in "ab"] == [Claimed(), Claimed()]


async def test_a_held_run_answers_for_whoever_has_one_of_its_keys(buffer: Buffer) -> None:
    await hold(buffer, "held", keyed("a", "r"))

    taken = await claims_of(buffer).take([keyed("b"), keyed("a"), keyed("other", "r"), keyed("a", "r")])

    assert taken.existing == (
        None,
        Existing("held", by="idempotency_key"),
        Existing("held", by="request_key"),
        Existing("held", by="request_key"),
    )


async def test_a_key_that_is_anothers_claim_is_waited_for_while_none_after_it_is_held(buffer: Buffer) -> None:
    first, middle, last = sorted("abc", key=digest_of)
    await buffer.claim(ORG, digest_of(middle), "theirs", 60_000)
    seen: list[Sequence[ClaimOutcome]] = []

    async def look(_: float) -> None:
        seen.append([await outcome(buffer, key) for key in (first, last)])
        if len(seen) == 3:
            await buffer.release(ORG, [digest_of(middle)], "theirs")

    taken = await claims_of(buffer, sleep=look).take([keyed(key) for key in "abc"])

    assert seen == [[KeyClaimed(), Claimed()]] * 3
    assert taken.existing == (None, None, None)
    assert [await outcome(buffer, key) for key in "abc"] == [KeyClaimed()] * 3


async def test_a_key_that_becomes_a_held_runs_while_it_is_waited_for_is_answered_with_that_run(buffer: Buffer) -> None:
    (binding,) = [found for _, found in bindings(keyed("a"))]
    await buffer.claim(ORG, binding.digest, "theirs", 60_000)

    async def bind(_: float) -> None:
        payload = snapshots.encode(keyed("a"))
        await buffer.accept("held", ENV, ORG, payload, kind=EntryKind.HELD, bindings=[binding], token="theirs")

    taken = await claims_of(buffer, sleep=bind).take([keyed("a"), keyed("b")])

    assert taken.existing == (Existing("held", by="idempotency_key"), None)


async def test_a_claim_that_outlasts_every_trigger_is_an_error_and_all_others_are_given_back(buffer: Buffer) -> None:
    await buffer.claim(ORG, digest_of("a"), "theirs", 600_000)
    waited_s = 0.0

    async def wait(seconds: float) -> None:
        nonlocal waited_s
        waited_s += seconds

    claims = claims_of(buffer, sleep=wait)
    with pytest.raises(EngineUnavailableError):
        await claims.take([keyed(key) for key in "abc"])

    assert waited_s * 1000 > claims.lifetime_ms
    assert [await outcome(buffer, key) for key in "bc"] == [Claimed(), Claimed()]


async def test_who_is_cancelled_while_waiting_gives_back_what_it_claimed(buffer: Buffer) -> None:
    first, last = sorted("ab", key=digest_of)
    await buffer.claim(ORG, digest_of(last), "theirs", 60_000)
    waiting = asyncio.Event()

    async def wait(_: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    taking = asyncio.create_task(claims_of(buffer, sleep=wait).take([keyed("a"), keyed("b")]))
    await waiting.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking

    assert await outcome(buffer, first) == Claimed()


async def test_many_who_want_the_same_keys_in_any_order_all_get_them_in_turn(buffer: Buffer) -> None:
    keys = [f"k{number}" for number in range(12)]
    owners: dict[str, int] = {}

    async def claim(number: int) -> None:
        wanted = random.Random(number).sample(keys, 8)
        claims = Claims(buffer, lambda: SETTINGS, Telemetry(), refuge=refuge(), engine_deadline_ms=15_000)
        taken = await claims.take([keyed(key) for key in wanted])
        for key in wanted:
            assert key not in owners, "two claimants had one key at once"
            owners[key] = number
        await asyncio.sleep(0)
        for key in wanted:
            del owners[key]
        await claims.release(taken.claim)

    async with asyncio.timeout(20):
        await asyncio.gather(*(claim(number) for number in range(20)))
    assert [await outcome(buffer, key) for key in keys] == [Claimed()] * 12


async def test_without_the_buffers_server_nothing_is_claimed_and_nothing_fails(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise BufferUnavailableError("gone")

    monkeypatch.setattr(buffer, "claim_many", fail)
    taken = await claims_of(buffer).take([keyed("a"), keyed("b")])
    assert taken.existing == (None, None)


async def test_while_the_server_is_left_alone_nothing_is_claimed_and_nothing_is_to_be_given_back(
    buffer: Buffer,
) -> None:
    circuit = Circuit(Backoff(60_000), failures=1)
    circuit.ask().failed()

    taken = await claims_of(buffer, breaker=Breaker(circuit)).take([keyed("a"), keyed("b")])

    assert taken.existing == (None, None)
    assert (taken.claim.digests, taken.claim.proof) == ((), "")
    assert await outcome(buffer, "a") == Claimed()


async def test_what_was_claimed_is_given_back_even_when_the_server_is_left_alone_by_then(buffer: Buffer) -> None:
    circuit = Circuit(Backoff(60_000), failures=1)
    claims = claims_of(buffer, breaker=Breaker(circuit))
    taken = await claims.take([keyed("a")])
    circuit.ask().failed()

    await claims.release(taken.claim)

    async def is_free() -> bool:
        return await outcome(buffer, "a") == Claimed()

    await until(is_free)


async def test_after_a_probe_alone_a_claim_is_the_gates_question_and_waits_no_longer_than_the_gate(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    circuit = Circuit(Backoff(1_000), failures=1, monotonic=lambda: now_s)
    deadlines_ms: list[float] = []

    async def noting(deadline_ms: float, operation: Awaitable[Any]) -> Any:
        deadlines_ms.append(deadline_ms)
        return await operation

    monkeypatch.setattr("mollifier.claims.within", noting)
    claims = claims_of(buffer, breaker=Breaker(behind=Breaker(circuit, probe=buffer.ping)))
    circuit.ask().failed()
    now_s = 1.0
    circuit.ask().answered()

    await claims.take([keyed("a")])
    assert (deadlines_ms[0], circuit.on_trial) == (SETTINGS.gate_deadline_ms, False)
    await claims.take([keyed("b")])
    assert deadlines_ms[-1] == SETTINGS.accept_deadline_ms


async def test_a_claim_outlives_whatever_triggers_may_take(buffer: Buffer, redis_client: Redis) -> None:
    """Looked up, created, refused by the buffer and created after all, each at its deadline."""
    claims = claims_of(buffer)
    engine_ms, buffer_ms = 3 * 15_000, SETTINGS.gate_deadline_ms + SETTINGS.accept_deadline_ms

    await claims.take([keyed("a")])

    assert claims.deadline_ms > engine_ms + buffer_ms
    left_ms = await lifetime_ms(redis_client, buffer.keyspace.of(ORG).idempotency(digest_of("a")))
    assert left_ms is not None
    assert left_ms > claims.deadline_ms


async def test_claims_are_prolonged_while_another_is_waited_for_and_when_it_is_over(
    buffer: Buffer, redis_client: Redis
) -> None:
    first, last = sorted("ab", key=digest_of)
    claimed = buffer.keyspace.of(ORG).idempotency(digest_of(first))
    await buffer.claim(ORG, digest_of(last), "theirs", 600_000)
    waited_ms = since_ms = 0.0
    seen: list[float] = []

    async def wait(seconds: float) -> None:
        nonlocal waited_ms, since_ms
        waited_ms, since_ms = waited_ms + seconds * 1000, since_ms + seconds * 1000
        left_ms = await lifetime_ms(redis_client, claimed)
        if left_ms is not None and left_ms > 20_000:
            seen.append(since_ms)
            since_ms = 0.0
        await execute(redis_client, "PEXPIRE", claimed, 20_000)
        if waited_ms > 3 * claims.lease_ms:
            await buffer.release(ORG, [digest_of(last)], "theirs")

    claims = claims_of(buffer, sleep=wait)
    await claims.take([keyed("a"), keyed("b")])

    assert len(seen) > 3
    assert max(seen) < claims.lease_ms / 2
    left_ms = await lifetime_ms(redis_client, claimed)
    assert left_ms is not None
    assert left_ms > claims.deadline_ms


async def test_a_claim_that_was_lost_while_waiting_is_waited_for_and_none_after_it_is_held(buffer: Buffer) -> None:
    first, middle, last = sorted("abc", key=digest_of)
    await buffer.claim(ORG, digest_of(last), "theirs", 600_000)
    asked = 0

    async def wait(_: float) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            # The claims of whoever waits have run out, and another has the first of them now; what they all waited for is free.
            await buffer.release(ORG, [digest_of(first), digest_of(middle)], "ours")
            await buffer.claim(ORG, digest_of(first), "another", 600_000)
            await buffer.release(ORG, [digest_of(last)], "theirs")
        elif asked == 2:
            assert [await outcome(buffer, key) for key in (middle, last)] == [Claimed()] * 2
            await buffer.release(ORG, [digest_of(first)], "another")

    taken = await claims_of(buffer, sleep=wait).take([keyed(key) for key in "abc"])

    assert taken.existing == (None,) * 3
    assert [await outcome(buffer, key) for key in "abc"] == [KeyClaimed()] * 3


async def age(redis_client: Redis, buffer: Buffer, key: str, by_ms: int) -> None:
    """Have so much time pass for a claim."""
    claimed = buffer.keyspace.of(ORG).idempotency(digest_of(key))
    await execute(redis_client, "PEXPIRE", claimed, await execute(redis_client, "PTTL", claimed) - by_ms)


async def test_a_claimant_that_is_heard_of_no_more_is_waited_for_for_a_lease_and_then_nobody_holds_the_key(
    buffer: Buffer, redis_client: Redis
) -> None:
    (binding,) = [found for _, found in bindings(keyed("a"))]
    claims = claims_of(buffer)
    lost = await claims.take([keyed("a")])
    waits = 0

    async def wait(_: float) -> None:
        nonlocal waits
        waits += 1
        await age(redis_client, buffer, "a", claims.lease_ms // 2)

    heirs = [
        Claims(
            buffer,
            lambda: SETTINGS,
            Telemetry(),
            refuge=refuge(),
            engine_deadline_ms=15_000,
            sleep=wait,
            new_token=lambda token=token: token,
        )
        for token in ("next", "last")
    ]
    taken = [await heir.take([keyed("a")]) for heir in heirs]

    assert [found.existing for found in taken] == [(None,), (None,)]
    assert 1 < waits < 4
    for token in (lost.claim.proof, *(found.claim.proof for found in taken), ""):
        accepted = await buffer.accept(
            f"run-{token}", ENV, ORG, b"{}", kind=EntryKind.HELD, bindings=[binding], token=token
        )
        assert accepted == KeyClaimed()
    for found in (lost, *taken):
        await claims.release(found.claim)
    assert await outcome(buffer, "a") == Doubted()


async def test_the_doubt_about_a_key_ends_with_the_life_of_the_claim(buffer: Buffer, redis_client: Redis) -> None:
    claims = claims_of(buffer)
    await claims.take([keyed("a")])
    await age(redis_client, buffer, "a", claims.lease_ms + 1)
    before_ms = await lifetime_ms(redis_client, buffer.keyspace.of(ORG).idempotency(digest_of("a")))

    found = await buffer.claim_many(ORG, [digest_of("a")], "next", claims.lifetime_ms, lease_ms=claims.lease_ms)

    left_ms = await lifetime_ms(redis_client, buffer.keyspace.of(ORG).idempotency(digest_of("a")))
    assert found == [Doubted()]
    assert before_ms is not None
    assert left_ms is not None
    assert left_ms <= before_ms
    await age(redis_client, buffer, "a", left_ms)
    assert await outcome(buffer, "a") == Claimed()


async def test_a_claim_is_prolonged_while_its_run_is_being_made_and_no_longer(
    buffer: Buffer, redis_client: Redis
) -> None:
    pauses: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
    waited_s: list[float] = []

    async def pause(seconds: float) -> None:
        waited_s.append(seconds)
        await pauses.put(over := asyncio.get_running_loop().create_future())
        await over

    claimed = buffer.keyspace.of(ORG).idempotency(digest_of("a"))
    claims = claims_of(buffer, sleep=pause)
    taken = await claims.take([keyed("a"), keyed("b")])
    async with claims.keeping(taken.claim):
        for _ in range(3):
            over = await pauses.get()
            await execute(redis_client, "PEXPIRE", claimed, 1_000)
            over.set_result(None)
        await pauses.get()
        left_ms = await lifetime_ms(redis_client, claimed)
        # What became of it meanwhile stays so.
        await buffer.release(ORG, [digest_of("b")], "ours")

    assert left_ms is not None
    assert left_ms > claims.deadline_ms
    assert sum(waited_s[:3]) * 1000 < claims.lease_ms
    assert [await outcome(buffer, key) for key in "ab"] == [Claimed(), Claimed()]


async def test_only_a_claim_that_is_still_its_claimants_is_prolonged(buffer: Buffer, redis_client: Redis) -> None:
    (binding,) = [found for _, found in bindings(keyed("bound"))]
    digests = {key: digest_of(key) for key in ("ours", "bound", "theirs", "free")}
    await buffer.claim_many(ORG, [digests["ours"], digests["bound"]], "ours", 1_000)
    await buffer.accept("held", ENV, ORG, b"{}", kind=EntryKind.HELD, bindings=[binding], token="ours")
    await buffer.claim(ORG, digests["theirs"], "theirs", 1_000)

    async def lives_ms() -> dict[str, int]:
        named = buffer.keyspace.of(ORG).idempotency
        return {key: int(await execute(redis_client, "PTTL", named(digest))) for key, digest in digests.items()}

    before_ms = await lives_ms()
    assert await buffer.prolong(ORG, list(digests.values()), "ours", 60_000) == 1

    assert [key for key, left_ms in (await lives_ms()).items() if left_ms > before_ms[key]] == ["ours"]


@pytest.mark.parametrize("damage", [("DEL",), ("HDEL", "seq"), ("HSET", "seq", "x")])
async def test_a_key_whose_entry_is_gone_or_does_not_parse_is_free(
    buffer: Buffer, redis_client: Redis, damage: tuple[str, ...]
) -> None:
    snapshot = keyed("a", "r")
    await hold(buffer, "held", snapshot)
    command, *arguments = damage
    await execute(redis_client, command, buffer.keyspace.of(ORG).entry("held"), *arguments)

    taken = await claims_of(buffer).take([snapshot])

    assert taken.existing == (None,)
    assert len(taken.claim.digests) == 2
    assert await outcome(buffer, "a") == KeyClaimed()


async def test_an_idempotency_key_of_a_run_that_expired_while_held_is_free_and_its_request_key_is_not(
    buffer: Buffer,
) -> None:
    await hold(buffer, "held", replace(keyed("a", "r"), created_at=NOW - timedelta(seconds=10), ttl_s=10))
    await hold(buffer, "waits", replace(keyed("b"), created_at=NOW - timedelta(seconds=10), ttl_s=11))

    taken = await claims_of(buffer).take([keyed("a"), keyed("b"), keyed("c", "r")])

    assert taken.existing == (
        None,
        Existing("waits", by="idempotency_key"),
        Existing("held", by="request_key"),
    )
    assert digest_of("a") in taken.claim.digests


async def test_a_binding_that_is_worth_nothing_is_taken_over_by_one_alone(buffer: Buffer) -> None:
    await hold(buffer, "held", keyed("a"))

    claiming = [buffer.claim_many(ORG, [digest_of("a")], token, 60_000, ["held"]) for token in ("first", "second")]
    outcomes = [list(found) for found in await asyncio.gather(*claiming)]

    assert sorted(outcomes, key=str) == [[Claimed()], [KeyClaimed()]]
