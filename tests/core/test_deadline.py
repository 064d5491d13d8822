"""The deadline: it measures who is asked, never how busy this process is."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from redis.asyncio import Redis

from mollifier.deadline import within
from mollifier.keys import Keyspace
from mollifier.model import GateInputs, Verdict
from mollifier.scripts import Scripts
from mollifier.server import Server, connect
from mollifier.settings import Settings
from mollifier.trip import TripEvaluator
from tests.core.support import ENV, ORG

SETTINGS = Settings(trip_window_ms=60_000, trip_threshold=1_000_000)
DEADLINE_MS = SETTINGS.gate_deadline_ms


async def answer() -> str:
    return "answer"


async def hang() -> str:
    await asyncio.Event().wait()
    raise AssertionError


async def test_an_answer_in_time_is_returned() -> None:
    assert await within(1000, answer()) == "answer"


async def test_an_error_is_the_callers() -> None:
    async def fail() -> str:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await within(1000, fail())


async def test_no_answer_is_a_timeout() -> None:
    with pytest.raises(TimeoutError, match="20 ms"):
        await within(20, hang())


async def test_an_operation_cancelled_from_inside_is_no_answer() -> None:
    async def be_cancelled() -> str:
        raise asyncio.CancelledError

    with pytest.raises(TimeoutError):
        await within(1000, be_cancelled())


async def test_a_cancelled_caller_cancels_the_operation() -> None:
    ended = asyncio.Event()

    async def hang_until_cancelled() -> str:
        try:
            return await hang()
        finally:
            ended.set()

    waiting = asyncio.create_task(within(60_000, hang_until_cancelled()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(ended.wait(), 5)


async def block_the_loop(block_s: float, stop: asyncio.Event) -> None:
    """Take the whole of every turn of the loop, as a process does that has too much to do."""
    while not stop.is_set():
        time.sleep(block_s)
        await asyncio.sleep(0)


@pytest.fixture
def evaluator(redis_client: Redis) -> TripEvaluator:
    return TripEvaluator(Scripts(Server(redis_client)), Keyspace(4), lambda: SETTINGS)


@pytest.mark.parametrize("warm", [True, False], ids=["open connection", "no connection yet"])
@pytest.mark.parametrize("block_ms", [4, 30])
async def test_a_loop_that_lags_at_every_turn_does_not_count_against_a_healthy_server(
    redis_url: str, block_ms: int, warm: bool
) -> None:
    async with connect(redis_url) as redis:
        evaluator = TripEvaluator(Scripts(Server(redis)), Keyspace(4), lambda: SETTINGS)
        if warm:
            await evaluator.evaluate(GateInputs(org_id=ORG, env_id=ENV))
        stop = asyncio.Event()
        blocking = asyncio.create_task(block_the_loop(block_ms / 1000, stop))
        try:
            verdict = await within(DEADLINE_MS, evaluator.evaluate(GateInputs(org_id=ORG, env_id=ENV)))
        finally:
            stop.set()
            await blocking
    assert verdict == Verdict(tripped=False, count=2 if warm else 1)


async def test_who_hangs_is_given_up_even_when_the_loop_never_rests() -> None:
    stop = asyncio.Event()
    blocking = asyncio.create_task(block_the_loop(0.003, stop))
    try:
        with pytest.raises(TimeoutError):
            await within(DEADLINE_MS, hang())
    finally:
        stop.set()
        await blocking


async def test_an_operation_that_was_given_up_may_fail_later_without_complaint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = asyncio.Event()

    async def fail_when_cancelled() -> str:
        try:
            return await hang()
        except asyncio.CancelledError:
            failed.set()
            raise ValueError("too late for anybody") from None

    with pytest.raises(TimeoutError):
        await within(5, fail_when_cancelled())
    await asyncio.wait_for(failed.wait(), 5)
    await asyncio.sleep(0)
    gc.collect()
    assert caplog.records == []


UNLOADED_SERVER_MS = 250
"""Far above what a server needs that shares its machine with this test run, far below what these calls take this loop in all."""


async def test_many_calls_at_once_all_get_their_answer_from_a_healthy_server(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        evaluator = TripEvaluator(Scripts(Server(redis)), Keyspace(4), lambda: SETTINGS)
        inputs = GateInputs(org_id=ORG, env_id=ENV)
        verdicts = await asyncio.gather(
            *(within(UNLOADED_SERVER_MS, evaluator.evaluate(inputs)) for _ in range(1000)), return_exceptions=True
        )
    missed = [verdict for verdict in verdicts if isinstance(verdict, BaseException)]
    assert missed == []
