"""One key, any number of triggers, any mix of held and created: one run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from mollifier.engine import Creation, Existing
from mollifier.errors import BufferUnavailableError, EngineUnavailableError
from mollifier.facade import Mollifier
from mollifier.keys import idempotency_digest
from mollifier.model import RunFilter, RunStatus, Snapshot, TriggerRequest
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.engine import PostgresRunEngine
from tests.core.support import execute, until
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


async def all_ids(house: House) -> list[str]:
    return [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter(page_size=100))).runs]


async def test_a_hundred_concurrent_held_triggers_with_one_key_are_one_run(holding: House) -> None:
    answers = await asyncio.gather(*(holding.trigger_all(idempotency_key="k") for _ in range(100)))

    assert len({run_id for run_id, _ in answers}) == 1
    assert sum(not cached for _, cached in answers) == 1
    assert len(await all_ids(holding)) == 1
    await holding.drain()
    assert len(await all_ids(holding)) == 1


async def test_a_mix_of_held_and_created_triggers_with_one_key_is_one_run(house: House) -> None:
    """The environment trips in the middle of the burst."""
    house.settings = replace(house.settings, trip_threshold=3)

    async def trigger(number: int) -> tuple[str, bool]:
        await house.trigger()
        return await house.trigger_all(idempotency_key=f"k{number % 5}")

    answers = await asyncio.gather(*(trigger(number) for number in range(60)))
    await house.drain()

    by_key = [{run_id for index, (run_id, _) in enumerate(answers) if index % 5 == key} for key in range(5)]
    assert [len(ids) for ids in by_key] == [1] * 5
    assert len(await all_ids(house)) == 65


async def test_a_held_runs_key_answers_before_and_after_it_is_drained(holding: House) -> None:
    run_id = await holding.trigger(idempotency_key="k")

    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)
    await holding.drain()
    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)


async def test_a_request_that_is_sent_again_while_its_run_is_held_gets_that_run(holding: House) -> None:
    run_id = await holding.trigger(request_key="r")

    assert await holding.trigger_all(request_key="r") == (run_id, False)
    await holding.drain()
    assert await holding.trigger_all(request_key="r") == (run_id, False)


@pytest.mark.parametrize(
    ("again", "cached"),
    [
        ({"request_key": "r", "idempotency_key": "other"}, False),
        ({"request_key": "other", "idempotency_key": "k"}, True),
        ({"request_key": "r", "idempotency_key": "k"}, False),
    ],
)
async def test_which_key_answered_is_told_also_when_the_buffer_says_so_only_at_the_accept(
    holding: House, monkeypatch: pytest.MonkeyPatch, again: dict[str, Any], cached: bool
) -> None:
    run_id = await holding.trigger(request_key="r", idempotency_key="k")

    async def fail(*_: object, **__: object) -> None:
        raise BufferUnavailableError("gone")

    monkeypatch.setattr(holding.buffer, "claim_many", fail)

    assert await holding.trigger_all(**again) == (run_id, cached)


async def test_a_reset_frees_the_key_of_a_held_run_in_both_stores(holding: House) -> None:
    first = await holding.trigger(idempotency_key="k")

    assert await holding.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")
    second = await holding.trigger(idempotency_key="k")
    await holding.drain()

    assert first != second
    assert await holding.trigger_all(idempotency_key="k") == (second, True)
    assert not await holding.runs.reset_idempotency_key(ENVIRONMENT, "other", "k")


async def test_a_key_that_was_reset_is_free_by_the_clock_of_any_process(holding: House) -> None:
    first = await holding.trigger(idempotency_key="k")
    assert await holding.runs.reset_idempotency_key(ENVIRONMENT, "echo", "k")
    second, cached = await holding.trigger_all(idempotency_key="k")

    # The drainer's clock is behind that of whoever reset the key.
    holding.clock = lambda: datetime.now(UTC) - timedelta(minutes=1)
    await holding.drain()

    assert not cached
    for run_id in (first, second):
        created = await holding.created(run_id)
        assert created is not None
        assert created.status is RunStatus.QUEUED
    assert await holding.trigger_all(idempotency_key="k") == (second, True)


async def test_a_key_whose_lifetime_is_over_while_its_run_is_held_is_free(holding: House) -> None:
    first = await holding.trigger(idempotency_key="k", idempotency_lifetime=timedelta(milliseconds=50))

    async def is_free() -> bool:
        return await holding.buffer.bound_run("org_a", idempotency_digest("env_a", "echo", "k")) is None

    await until(is_free)
    second, cached = await holding.trigger_all(idempotency_key="k")
    await holding.drain()

    assert (second != first, cached) == (True, False)
    statuses = [(await holding.created(run_id)).status for run_id in (first, second)]  # pyright: ignore[reportOptionalMemberAccess]
    assert statuses == [RunStatus.QUEUED, RunStatus.QUEUED]
    assert await holding.trigger_all(idempotency_key="k") == (second, True)


async def test_a_crashed_claimant_unblocks_others_and_a_late_release_harms_nobody(holding: House) -> None:
    digest = idempotency_digest("env_a", "echo", "k")
    await holding.buffer.claim("org_a", digest, "crashed", 100)

    run_id, cached = await holding.trigger_all(idempotency_key="k")
    await holding.buffer.release("org_a", [digest], "crashed")

    assert not cached
    assert await holding.trigger_all(idempotency_key="k") == (run_id, True)


async def test_a_held_run_that_finds_its_key_taken_is_created_cancelled_and_names_the_winner(holding: House) -> None:
    loser = await holding.trigger(idempotency_key="k")
    held = await holding.runs.get(ENVIRONMENT, loser)
    assert held is not None
    rival = replace(held.snapshot, run_id="run_rival")
    await holding.create(Creation(snapshot=rival))

    await holding.drain()

    created = await holding.created(loser)
    assert created is not None
    assert created.status is RunStatus.CANCELED
    assert created.error is not None
    assert "run_rival" in created.error.message


async def trigger_through(engine: PostgresRunEngine, house: House) -> tuple[str, bool]:
    """Trigger with the key at another process of the house's, whose engine this is."""
    mollifier = Mollifier(lambda: house.settings, engine=engine, tasks=PostgresTaskCatalog(house.database))
    request = TriggerRequest(task_id="echo", payload=b"1", idempotency_key="k")
    triggered = await mollifier.triggers.trigger(ENVIRONMENT, request)
    await mollifier.aclose()
    return triggered.result.run_id, triggered.result.is_cached


@pytest.mark.parametrize("is_other_held", [True, False])
async def test_a_claim_that_runs_out_in_the_middle_of_its_trigger_makes_no_second_run(
    holding: House, is_other_held: bool
) -> None:
    """Its trigger has looked the key up and not found it, when another claims it and makes a run."""
    digest = idempotency_digest("env_a", "echo", "k")
    others: list[str] = []

    class Slow(PostgresRunEngine):
        async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
            found = await super().find_by_keys_many(snapshots)
            key = holding.buffer.keyspace.of("org_a").idempotency(digest)
            assert await execute(holding.client, "DEL", key) == 1
            if not is_other_held:
                holding.settings = replace(holding.settings, enabled=False)
            others.append(await holding.trigger(idempotency_key="k"))
            holding.settings = replace(holding.settings, enabled=True)
            return found

    assert await trigger_through(Slow(holding.database), holding) == (others[0], True)
    await holding.drain()
    assert await all_ids(holding) == others


async def test_a_claimant_that_was_taken_for_dead_and_comes_back_makes_no_second_run(holding: House) -> None:
    """It has looked the key up and not found it, and nothing was heard of it for a lease, when others come with its key."""
    key = holding.buffer.keyspace.of("org_a").idempotency(idempotency_digest("env_a", "echo", "k"))
    others: list[tuple[str, bool]] = []

    class Stopped(PostgresRunEngine):
        async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
            found = await super().find_by_keys_many(snapshots)
            await execute(holding.client, "PEXPIRE", key, 30_000)
            others.extend([await holding.trigger_all(idempotency_key="k") for _ in range(2)])
            return found

    answer = await trigger_through(Stopped(holding.database), holding)

    first = others[0][0]
    assert others == [(first, False), (first, True)]
    assert answer == (first, True)
    assert (await holding.buffer.counts()).left == 0
    assert await all_ids(holding) == [first]
    assert await execute(holding.client, "GET", key) == b"doubt"


async def test_a_trigger_that_takes_longer_than_its_claim_lives_makes_no_run(holding: House) -> None:
    class Hanging(PostgresRunEngine):
        @property
        def deadline_ms(self) -> int:
            return 1

        async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
            await asyncio.Event().wait()
            raise AssertionError

    settings = replace(holding.settings, gate_deadline_ms=1, accept_deadline_ms=30)
    mollifier = Mollifier(settings, engine=Hanging(holding.database), tasks=PostgresTaskCatalog(holding.database))
    request = TriggerRequest(task_id="echo", payload=b"1", idempotency_key="k")
    with pytest.raises(EngineUnavailableError):
        await mollifier.triggers.trigger(ENVIRONMENT, request)
    await mollifier.aclose()

    assert await all_ids(holding) == []
    assert not (await holding.trigger_all(idempotency_key="k"))[1]


@pytest.mark.parametrize("is_held", [True, False])
async def test_a_key_of_a_run_that_expired_while_held_is_free_before_it_is_drained(
    holding: House, is_held: bool
) -> None:
    first = await holding.trigger(idempotency_key="k", ttl=timedelta(seconds=1))

    async def is_expired() -> bool:
        run = await holding.runs.get(ENVIRONMENT, first)
        return run is not None and run.status is RunStatus.EXPIRED

    await until(is_expired)
    if not is_held:
        await execute(holding.client, "DEL", holding.buffer.keyspace.of("org_a").tripped("env_a"))
    second, cached = await holding.trigger_all(idempotency_key="k")

    assert (second != first, cached) == (True, False)
    assert await holding.trigger_all(idempotency_key="k") == (second, True)
    await holding.drain()
    statuses = [(await holding.created(run_id)).status for run_id in (first, second)]  # pyright: ignore[reportOptionalMemberAccess]
    assert statuses == [RunStatus.EXPIRED, RunStatus.QUEUED]
    assert await holding.trigger_all(idempotency_key="k") == (second, True)


async def test_a_key_of_an_entry_that_was_evicted_is_free(holding: House) -> None:
    lost = await holding.trigger(idempotency_key="k")
    await execute(holding.client, "DEL", holding.buffer.keyspace.of("org_a").entry(lost))

    other, cached = await holding.trigger_all(idempotency_key="k")

    assert (other != lost, cached) == (True, False)
    await holding.drain()
    assert await all_ids(holding) == [other]
