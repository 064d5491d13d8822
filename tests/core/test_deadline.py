"""The deadline: it measures who is asked, never how busy this process is."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from redis.asyncio import Redis

from mollifier.deadline import Breaker, within
from mollifier.errors import BufferUnavailableError
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


# --- the breaker ---------------------------------------------------------------------------------------------------


class Questions:
    """Questions to somebody who answers or not, asked through a breaker with a clock that the test sets."""

    def __init__(self, *, failures: int = 3) -> None:
        self.now_s = 1000.0
        self.asked = 0
        self.answers = True
        self._breaker = Breaker(failures=failures, open_s=1.0, monotonic=lambda: self.now_s)

    async def _question(self) -> str:
        self.asked += 1
        if not self.answers:
            raise TimeoutError
        return "answer"

    async def ask(self, times: int = 1) -> list[str]:
        """Ask so many times; tell of each what came of it."""
        outcomes: list[str] = []
        for _ in range(times):
            try:
                outcomes.append(await self._breaker.ask(self._question))
            except TimeoutError:
                outcomes.append("no answer")
            except BufferUnavailableError:
                outcomes.append("not asked")
        return outcomes


async def test_a_breaker_stops_asking_after_so_many_failures_in_a_row() -> None:
    questions = Questions(failures=3)
    questions.answers = False
    assert await questions.ask(6) == ["no answer"] * 3 + ["not asked"] * 3
    assert questions.asked == 3


async def test_an_answer_in_between_keeps_a_breaker_closed() -> None:
    questions = Questions(failures=3)
    for answers in (False, False, True, False, False, True):
        questions.answers = answers
        await questions.ask()
    assert questions.asked == 6


async def test_an_open_breaker_lets_one_question_through_at_a_time() -> None:
    questions = Questions(failures=1)
    questions.answers = False
    await questions.ask()
    questions.now_s += 1.0
    assert await questions.ask(3) == ["no answer", "not asked", "not asked"]
    questions.now_s += 0.9
    assert await questions.ask() == ["not asked"]
    questions.now_s += 0.1
    assert await questions.ask() == ["no answer"]


async def test_an_answer_closes_an_open_breaker() -> None:
    questions = Questions(failures=1)
    questions.answers = False
    await questions.ask(2)
    questions.answers = True
    assert await questions.ask() == ["not asked"]
    questions.now_s += 1.0
    assert await questions.ask(5) == ["answer"] * 5


async def test_while_one_question_finds_out_the_others_do_not_wait_for_it() -> None:
    now_s = 1000.0
    breaker = Breaker(failures=1, open_s=1.0, monotonic=lambda: now_s)

    async def fail() -> str:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await breaker.ask(fail)
    now_s += 1.0
    finding_out = asyncio.create_task(breaker.ask(hang))
    await asyncio.sleep(0)
    with pytest.raises(BufferUnavailableError):
        await breaker.ask(answer)
    finding_out.cancel()
    await asyncio.wait((finding_out,))
    now_s += 1.0
    assert await breaker.ask(answer) == "answer"


async def test_a_lagging_loop_opens_no_breaker(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        evaluator = TripEvaluator(Scripts(Server(redis)), Keyspace(4), lambda: SETTINGS)
        inputs = GateInputs(org_id=ORG, env_id=ENV)
        breaker = Breaker(failures=1, open_s=3600)
        stop = asyncio.Event()
        blocking = asyncio.create_task(block_the_loop(0.02, stop))
        try:
            for count in range(1, 6):
                verdict = await breaker.ask(lambda: within(DEADLINE_MS, evaluator.evaluate(inputs)))
                assert verdict == Verdict(tripped=False, count=count)
        finally:
            stop.set()
            await blocking
