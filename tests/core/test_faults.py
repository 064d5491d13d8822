"""Points of a process: every question to a store passes them, by name, and only where somebody has installed a hook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
from redis.asyncio import Redis

from mollifier import faults
from mollifier.buffer import Buffer
from mollifier.confirmation import ConfirmedScripts
from mollifier.engine import RunEngine
from mollifier.errors import BufferUnavailableError
from mollifier.facade import Mollifier
from mollifier.model import Environment, TriggerRequest
from mollifier.scripts import release
from mollifier.server import Server, connect
from mollifier.settings import Settings
from tests.core.engines import AnyTask, MemoryEngine
from tests.core.support import ENV, ORG, SETTINGS, execute, hold


@pytest.fixture
def passed() -> Iterator[list[str]]:
    """The points that are passed while the test runs."""
    points: list[str] = []
    faults.install(points.append)
    yield points
    faults.install(None)


async def test_a_script_has_its_points_by_hash_and_by_source(redis_client: Redis, passed: list[str]) -> None:
    await execute(redis_client, "SCRIPT", "FLUSH")
    await hold(Buffer(Server(redis_client), lambda: SETTINGS), "run")
    assert passed == ["valkey.accept.before", "valkey.accept.after"] * 2


async def test_a_command_has_its_points(redis_client: Redis, passed: list[str]) -> None:
    await Server(redis_client).run_many([("GET", "a"), ("TIME",), ("GET", "b")])
    assert passed == ["valkey.get.before", "valkey.time.before", "valkey.get.after", "valkey.time.after"]


async def test_a_question_that_has_no_answer_has_no_point_after_it(passed: list[str]) -> None:
    async with connect("unix:///nowhere/valkey.sock") as redis:
        with pytest.raises(BufferUnavailableError):
            await Server(redis).run("TIME")
    assert passed == ["valkey.time.before"]


async def test_confirmed_scripts_have_their_points(redis_client: Redis, passed: list[str]) -> None:
    settings = Settings(accept_confirm="replicas:1", accept_confirm_timeout_ms=1)
    confirmed = ConfirmedScripts(redis_client, lambda: settings)
    await confirmed.run_many([release(binding=["mollifier:{p00}:idempotency:a"], token="t")])
    assert {*passed} == {"valkey.release.before", "valkey.release.after"}


async def test_an_operation_of_the_engine_has_its_points_whatever_comes_of_it(passed: list[str]) -> None:
    engine = MemoryEngine()
    mollifier = Mollifier(Settings(), engine=cast("RunEngine", engine), tasks=AnyTask())
    environment = Environment(id=ENV, name="prod", project_id="p", org_id=ORG, org_flags={})
    request = TriggerRequest(task_id="task", payload=b"1")
    await mollifier.triggers.trigger(environment, request)
    assert passed == ["engine.create_runs.before", "engine.create_runs.after"]
    engine.fault = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        await mollifier.triggers.trigger(environment, request)
    assert passed == ["engine.create_runs.before", "engine.create_runs.after"] * 2


async def test_a_hook_sees_the_point_before_anything_is_sent(redis_client: Redis, redis_url: str) -> None:
    class Ended(BaseException):
        pass

    def end(_: str) -> None:
        raise Ended

    faults.install(end)
    try:
        with pytest.raises(Ended):
            await hold(Buffer(Server(redis_client), lambda: SETTINGS), "run")
    finally:
        faults.install(None)
    assert await execute(redis_client, "DBSIZE") == 0


def test_without_a_hook_the_engine_is_the_engine_itself() -> None:
    engine = MemoryEngine()
    assert faults.watched(engine) is engine
