"""Triggers that come together: each is treated as if it had come alone, for one question to each store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from mollifier.admission import Triggered
from mollifier.buffer import Acceptance, Buffer
from mollifier.errors import BufferUnavailableError, EngineUnavailableError, FieldError, InvalidRequestError
from mollifier.facade import Mollifier
from mollifier.model import Snapshot, TriggerRequest
from mollifier.telemetry import EVENTS_LOGGER
from tests.core.engines import MemoryEngine
from tests.core.support import state_of
from tests.core.test_trigger import FLAGGED, PLAIN, TIGHT, WATCHED, mollifier_of

LOOSE = msgspec.structs.replace(TIGHT, trip_threshold=2)
DIVERT = msgspec.structs.replace(LOOSE, divert=True)
FIVE = [PLAIN] * 5
Events = Callable[[], list[tuple[str, str]]]
IDS = [f"run_{number}" for number in range(1, 6)]


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Events:
    """Return what asks for the events that have been emitted, by name and run."""
    caplog.set_level(logging.INFO, EVENTS_LOGGER)

    def emitted() -> list[tuple[str, str]]:
        records = [record for record in caplog.records if record.name == EVENTS_LOGGER]
        return [(record.getMessage(), record.__dict__["fields"]["run_id"]) for record in records]

    return emitted


def ids_of(triggered: Sequence[Triggered]) -> list[str]:
    return [one.result.run_id for one in triggered]


def tell(triggered: Sequence[Triggered]) -> None:
    for one in triggered:
        for emit in one.after_answer:
            emit()


def buffer_of(mollifier: Mollifier) -> Buffer:
    assert mollifier.buffer is not None
    return mollifier.buffer


async def in_buffer(mollifier: Mollifier) -> list[str]:
    """Return those of the five runs that are in the buffer."""
    found = await buffer_of(mollifier).get_entries(FLAGGED.org_id, IDS)
    return [run_id for run_id, entry in zip(IDS, found, strict=True) if entry is not None]


async def test_switched_off_they_are_created_in_one_call_and_nothing_else_happens(
    redis_client: Redis, engine: MemoryEngine
) -> None:
    mollifier = mollifier_of(redis_client, engine, msgspec.structs.replace(LOOSE, enabled=False))
    triggered = await mollifier.triggers.trigger_many(FLAGGED, FIVE)
    assert ids_of(triggered) == list(engine.runs) == IDS
    assert engine.calls == 1
    assert await state_of(redis_client) == {}


async def test_no_triggers_are_no_question(redis_client: Redis, engine: MemoryEngine) -> None:
    assert await mollifier_of(redis_client, engine, DIVERT).triggers.trigger_many(FLAGGED, []) == []
    assert (engine.calls, await state_of(redis_client)) == (0, {})


async def test_in_monitor_mode_those_above_the_threshold_are_buffered_too_and_all_created(
    redis_client: Redis, engine: MemoryEngine, events: Events
) -> None:
    mollifier = mollifier_of(redis_client, engine, LOOSE)
    triggered = await mollifier.triggers.trigger_many(FLAGGED, FIVE)
    assert ids_of(triggered) == list(engine.runs) == IDS
    assert engine.calls == 1
    assert await in_buffer(mollifier) == IDS[2:]
    assert events() == []
    tell(triggered)
    assert events() == [("mollifier.buffered", run_id) for run_id in IDS[2:]]


async def test_in_shadow_mode_those_above_the_threshold_are_told(
    redis_client: Redis, engine: MemoryEngine, events: Events
) -> None:
    mollifier = mollifier_of(redis_client, engine, msgspec.structs.replace(LOOSE, shadow_mode=True))
    triggered = await mollifier.triggers.trigger_many(WATCHED, FIVE)
    assert list(engine.runs) == IDS
    tell(triggered)
    assert events() == [("mollifier.would_mollify", run_id) for run_id in IDS[2:]]


@pytest.mark.leaves_keys
async def test_in_divert_mode_those_above_the_threshold_are_held_instead(
    redis_client: Redis, engine: MemoryEngine, events: Events
) -> None:
    mollifier = mollifier_of(redis_client, engine, DIVERT)
    triggered = await mollifier.triggers.trigger_many(FLAGGED, FIVE)
    assert ids_of(triggered) == IDS
    assert list(engine.runs) == IDS[:2]
    assert await in_buffer(mollifier) == IDS[2:]
    tell(triggered)
    assert events() == [("mollifier.buffered", run_id) for run_id in IDS[2:]]


@pytest.mark.parametrize("settings", [LOOSE, DIVERT], ids=["monitor", "divert"])
async def test_those_that_share_a_key_are_one_run_and_count_once(
    redis_client: Redis, engine: MemoryEngine, settings: Any
) -> None:
    mollifier = mollifier_of(redis_client, engine, settings)
    keys = ["a", "b", "a", "b", "a"]
    requests = [TriggerRequest(task_id="task", idempotency_key=key) for key in keys]
    triggered = await mollifier.triggers.trigger_many(FLAGGED, requests)
    assert ids_of(triggered) == ["run_1", "run_2", "run_1", "run_2", "run_1"]
    assert [one.result.is_cached for one in triggered] == [False, False, True, True, True]
    assert list(engine.runs) == ["run_1", "run_2"]


async def test_one_that_a_key_answers_already_answers_for_all_that_share_it(
    redis_client: Redis, engine: MemoryEngine
) -> None:
    mollifier = mollifier_of(redis_client, engine, LOOSE)
    keyed, asked_again = (
        TriggerRequest(task_id="task", idempotency_key="k"),
        TriggerRequest(task_id="task", request_key="r"),
    )
    await mollifier.triggers.trigger_many(FLAGGED, [keyed, asked_again])
    triggered = await mollifier.triggers.trigger_many(FLAGGED, [PLAIN, keyed, asked_again, keyed])
    assert ids_of(triggered) == ["run_3", "run_1", "run_2", "run_1"]
    assert [one.result.is_cached for one in triggered] == [False, True, False, True]


async def test_one_whose_other_key_was_taken_meanwhile_does_not_answer_for_those_that_share_its_first(
    redis_client: Redis, engine: MemoryEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mollifier = mollifier_of(redis_client, engine, LOOSE)
    await mollifier.triggers.trigger_many(FLAGGED, [TriggerRequest(task_id="task", request_key="r")])

    async def look_too_early(snapshots: Sequence[Snapshot]) -> list[None]:
        return [None] * len(snapshots)

    monkeypatch.setattr(engine, "find_by_keys_many", look_too_early)
    both = TriggerRequest(task_id="task", request_key="r", idempotency_key="k")
    keyed = TriggerRequest(task_id="task", idempotency_key="k")
    triggered = await mollifier.triggers.trigger_many(FLAGGED, [both, keyed, keyed])
    assert ids_of(triggered) == ["run_1", "run_3", "run_3"]
    assert [one.result.is_cached for one in triggered] == [False, False, True]
    assert engine.runs["run_3"].idempotency_key == "k"


async def test_a_run_is_called_what_its_request_says(redis_client: Redis, engine: MemoryEngine) -> None:
    mollifier = mollifier_of(redis_client, engine, LOOSE)
    named = msgspec.structs.replace(PLAIN, run_id="run_named")
    assert ids_of(await mollifier.triggers.trigger_many(FLAGGED, [named, PLAIN])) == ["run_named", "run_1"]
    assert ids_of(await mollifier.triggers.trigger_many(FLAGGED, [named])) == ["run_named"]
    assert list(engine.runs) == ["run_named", "run_1"]


async def test_every_unknown_parent_is_named(redis_client: Redis, engine: MemoryEngine) -> None:
    mollifier = mollifier_of(redis_client, engine, DIVERT)
    orphan = TriggerRequest(task_id="task", parent_run_id="run_of_nobody")
    with pytest.raises(InvalidRequestError) as caught:
        await mollifier.triggers.trigger_many(FLAGGED, [PLAIN, orphan, PLAIN, orphan])
    fields = [error.field for error in caught.value.errors]
    assert fields == ["items[1].options.parentRunId", "items[3].options.parentRunId"]
    assert (engine.runs, await state_of(redis_client)) == ({}, {})


# --- faults --------------------------------------------------------------------------------------------------------


async def test_those_that_the_buffer_does_not_take_are_created(
    redis_client: Redis, engine: MemoryEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mollifier = mollifier_of(redis_client, engine, DIVERT)

    async def refuse(entries: Sequence[Acceptance]) -> list[Any]:
        return [BufferUnavailableError("full")] * len(entries)

    monkeypatch.setattr(buffer_of(mollifier), "accept_many", refuse)
    assert ids_of(await mollifier.triggers.trigger_many(FLAGGED, FIVE)) == IDS
    assert sorted(engine.runs) == IDS


async def test_what_the_engine_refuses_for_its_own_sake_leaves_nothing_held(
    redis_client: Redis, engine: MemoryEngine
) -> None:
    mollifier = mollifier_of(redis_client, engine, DIVERT)
    engine.fault = InvalidRequestError(FieldError("body", "cannot be stored"))
    with pytest.raises(InvalidRequestError):
        await mollifier.triggers.trigger_many(FLAGGED, FIVE)
    assert await in_buffer(mollifier) == []


async def test_without_an_engine_none_is_held_when_one_needs_a_synchronous_answer(
    redis_client: Redis, engine: MemoryEngine
) -> None:
    mollifier = mollifier_of(redis_client, engine, DIVERT)
    engine.fault = EngineUnavailableError("gone")
    waiting = msgspec.structs.replace(PLAIN, resume_parent_on_completion=True)
    with pytest.raises(EngineUnavailableError):
        await mollifier.triggers.trigger_many(FLAGGED, [*FIVE[:4], waiting])
    assert await in_buffer(mollifier) == []


@pytest.mark.leaves_keys
async def test_what_is_held_is_told_even_when_others_of_the_call_find_no_store(
    redis_client: Redis, engine: MemoryEngine, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    mollifier = mollifier_of(redis_client, engine, DIVERT)
    engine.fault = EngineUnavailableError("gone")
    accept_many = buffer_of(mollifier).accept_many

    async def take_half(entries: Sequence[Acceptance]) -> list[Any]:
        return [*await accept_many(entries[:2]), *[BufferUnavailableError("full")] * (len(entries) - 2)]

    monkeypatch.setattr(buffer_of(mollifier), "accept_many", take_half)
    with pytest.raises(EngineUnavailableError):
        await mollifier.triggers.trigger_many(FLAGGED, FIVE)
    assert await in_buffer(mollifier) == IDS[:2]
    assert events() == [("mollifier.buffered", run_id) for run_id in IDS[:2]]


async def test_copies_are_told_even_when_the_engine_takes_no_run(
    redis_client: Redis, engine: MemoryEngine, events: Events
) -> None:
    mollifier = mollifier_of(redis_client, engine, LOOSE)
    engine.fault = EngineUnavailableError("gone")
    with pytest.raises(EngineUnavailableError):
        await mollifier.triggers.trigger_many(FLAGGED, FIVE)
    assert events() == [("mollifier.buffered", run_id) for run_id in IDS[2:]]
