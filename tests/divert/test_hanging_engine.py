"""An engine that hangs: triggers that can be held are, and soon wait for nothing; the others go on waiting for it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from mollifier import refuge
from mollifier._guard.server import children_of
from mollifier.embedded import Stack
from mollifier.errors import EngineUnavailableError, FieldError, InvalidRequestError
from mollifier.model import RunFilter
from tests.core.support import until
from tests.divert.conftest import DEBOUNCED, ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


class Hanging:
    """Counts how often the engine of a house is asked to create, and leaves it without an answer."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self._monkeypatch = monkeypatch
        self._house = house

    @asynccontextmanager
    async def hangs(self, deadline_ms: int = 20) -> AsyncGenerator[None]:
        async def hang(*_: Any) -> None:
            self.asked += 1
            await asyncio.Event().wait()

        with self._monkeypatch.context() as hanging:
            hanging.setattr(refuge, "CREATE_DEADLINE_MS", deadline_ms)
            hanging.setattr(self._house.engine, "create_runs", hang)
            yield


async def test_triggers_are_held_and_after_a_few_only_one_now_and_then_asks_the_engine(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Hanging(house, monkeypatch)
    async with engine.hangs():
        keys = [f"k{number}" if number % 3 else None for number in range(60)]
        run_ids = [await house.trigger(idempotency_key=key) for key in keys]

    assert (await house.buffer.counts()).left == len(run_ids)
    assert 5 <= engine.asked < 20
    await house.drain()
    created = await asyncio.gather(*(house.created(run_id) for run_id in run_ids))
    assert None not in created


async def test_what_the_buffer_cannot_take_while_the_engine_is_left_alone_is_created_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Hanging(house, monkeypatch)
    async with engine.hangs():
        held = [await house.trigger() for _ in range(10)]
    house.settings = replace(house.settings, held_max_entries=len(held))

    run_ids = [await house.trigger() for _ in range(3)]

    assert None not in await asyncio.gather(*(house.created(run_id) for run_id in run_ids))
    assert (await house.buffer.counts()).left == len(held)
    await house.drain()


async def test_a_creation_that_was_given_up_and_happened_all_the_same_is_the_one_run(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = house.engine.create_runs

    async def create_and_hang(snapshots: Sequence[Any]) -> None:
        await create(snapshots)
        await asyncio.Event().wait()

    with monkeypatch.context() as hanging:
        hanging.setattr(refuge, "CREATE_DEADLINE_MS", 300)
        hanging.setattr(house.engine, "create_runs", create_and_hang)
        run_id = await house.trigger(idempotency_key="k")
    assert await house.trigger_all(idempotency_key="k") == (run_id, True)
    await house.drain()

    assert [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs] == [run_id]


async def test_triggers_that_cannot_be_held_wait_for_the_engine_and_are_asked_for_whatever_others_met(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Hanging(house, monkeypatch)
    unenrolled = replace(ENVIRONMENT, org_flags={"mollifierEnabled": False})
    async with engine.hangs():
        for _ in range(10):
            await house.trigger()
        before = engine.asked
        waiting = [
            asyncio.create_task(house.trigger(unenrolled)),
            asyncio.create_task(house.trigger(debounce=DEBOUNCED)),
        ]

        async def are_asked_for() -> bool:
            return engine.asked == before + 2

        await until(are_asked_for)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await house.drain()


async def test_an_error_of_a_triggers_own_is_an_answer(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> None:
        raise InvalidRequestError(FieldError("payload", "no"))

    with monkeypatch.context() as refusing:
        refusing.setattr(house.engine, "create_runs", refuse)
        for _ in range(20):
            with pytest.raises(InvalidRequestError):
                await house.trigger()

    run_id = await house.trigger()
    assert await house.created(run_id) is not None


async def test_once_the_engine_answers_again_runs_are_created_directly_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise EngineUnavailableError("gone", unsent=True)

    with monkeypatch.context() as failing:
        failing.setattr(house.engine, "create_runs", fail)
        for _ in range(10):
            await house.trigger()

    async def is_created_directly() -> bool:
        return await house.created(await house.trigger()) is not None

    await until(is_created_directly)
    await house.drain()


async def test_a_frozen_postgres_keeps_no_trigger_waiting_that_can_be_held(
    own: tuple[Stack, House], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, house = own
    before = [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs]
    monkeypatch.setattr(refuge, "CREATE_DEADLINE_MS", 100)
    assert stack.postgres_pid is not None
    frozen = [stack.postgres_pid, *children_of(stack.postgres_pid)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        held = [await house.trigger() for _ in range(20)]
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)

    await house.drain()
    listed = [run.id for run in (await house.runs.list(ENVIRONMENT, RunFilter())).runs]
    assert sorted(listed) == sorted([*before, *held])
