"""The deadline: it measures who is asked, never how busy this process is."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
from redis.asyncio import Redis

from mollifier.backoff import Backoff
from mollifier.circuit import Circuit, State
from mollifier.deadline import Breaker, within
from mollifier.errors import BufferNotAskedError, BufferRefusedError, BufferUnavailableError
from mollifier.keys import Keyspace
from mollifier.model import GateInputs, Verdict
from mollifier.scripts import Scripts
from mollifier.server import Server, connect
from mollifier.settings import Settings
from mollifier.trip import TripEvaluator
from tests.core.support import ENV, ORG
from tests.simulation.loop import VirtualLoop

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


async def compute(turns: int, turn_s: float) -> None:
    """Compute for so long in each of so many turns of the loop, as many small requests do."""
    for _ in range(turns):
        until_s = time.perf_counter() + turn_s
        while time.perf_counter() < until_s:
            pass
        await asyncio.sleep(0)


@pytest.mark.parametrize("turn_ms", [0.1, 0.5, 1])
async def test_a_loop_that_is_busy_in_short_turns_does_not_count_against_a_healthy_server(
    turn_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No turn is long enough to be noticed by itself; an answer that has been there all the time is read some hundred turns later.

    The loop never rests. What the processor does for others meanwhile is not the thread's, and must not be the test's.
    """
    monkeypatch.setattr("mollifier.deadline.time.thread_time", time.monotonic)
    turns = int(2 * DEADLINE_MS / turn_ms)

    async def read_late() -> str:
        for _ in range(turns):
            await asyncio.sleep(0)
        return "answer"

    computing = asyncio.create_task(compute(turns, turn_ms / 1000))
    assert await asyncio.gather(*(within(DEADLINE_MS, read_late()) for _ in range(20))) == ["answer"] * 20
    await computing


async def test_who_hangs_is_given_up_in_time_by_a_loop_that_is_busy_half_of_it() -> None:
    async def compute_by_halves() -> None:
        while True:
            await compute(1, 0.001)
            await asyncio.sleep(0.001)

    computing = asyncio.create_task(compute_by_halves())
    with pytest.raises(TimeoutError):
        await within(DEADLINE_MS, hang())
    computing.cancel()


class ComputingLoop(VirtualLoop):
    """Has computed for a part of whatever time has passed."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self._part = part

    def computed_s(self) -> float:
        return self._part * self.time()


@pytest.mark.parametrize(
    ("part", "given_up_after_ms"),
    [
        pytest.param(0, 25, id="at rest"),
        # After five slices 22.5 ms have been waited; 2.5 ms later what is left is no slice any more.
        pytest.param(0.1, 27.5, id="a tenth of the time computing"),
        pytest.param(0.5, 49.6875, id="half of the time computing"),
    ],
)
def test_who_hangs_is_given_up_once_the_deadline_has_been_waited_and_not_a_whole_slice_later(
    part: float, given_up_after_ms: float
) -> None:
    loop = ComputingLoop(part)

    async def ask() -> float:
        with pytest.raises(TimeoutError):
            await within(25, hang())
        return loop.time() * 1000

    assert loop.run(ask()) == pytest.approx(given_up_after_ms)
    loop.unwind()


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

    def __init__(self, *, probing: bool = False, behind: Breaker | None = None) -> None:
        self.now_s = 1000.0
        self.asked = 0
        self.probed = 0
        self.fault: Exception | None = None
        self.circuit = Circuit(Backoff(1_000, 4_000), failures=3, monotonic=lambda: self.now_s, jitter=lambda: 0.0)
        self.breaker = Breaker(self.circuit, probe=self._probe if probing else None, behind=behind)

    async def _question(self) -> str:
        self.asked += 1
        if self.fault is not None:
            raise self.fault
        return "answer"

    async def _probe(self) -> None:
        self.probed += 1
        if self.fault is not None:
            raise self.fault

    async def ask(self, times: int = 1) -> list[str]:
        """Ask so many times; tell of each what came of it."""
        outcomes: list[str] = []
        for _ in range(times):
            try:
                outcomes.append(await self.breaker.ask(self._question))
            except BufferNotAskedError:
                outcomes.append("not asked")
            except (BufferUnavailableError, TimeoutError):
                outcomes.append("no answer")
        return outcomes

    async def open(self) -> Questions:
        self.fault = TimeoutError()
        assert await self.ask(3) == ["no answer"] * 3
        assert self.circuit.state is State.OPEN
        return self


async def settled() -> None:
    """Let a probe that was started come to its end."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_breaker_stops_asking_after_so_many_failures_in_a_row() -> None:
    questions = await Questions().open()
    assert await questions.ask(3) == ["not asked"] * 3
    assert questions.asked == 3


async def test_an_answer_in_between_keeps_a_breaker_closed() -> None:
    questions = Questions()
    for fault in (TimeoutError(), TimeoutError(), None) * 3:
        questions.fault = fault
        await questions.ask()
    assert questions.asked == 9


async def test_an_error_that_the_server_answered_is_an_answer() -> None:
    questions = Questions()
    questions.fault = BufferRefusedError("OOM")
    assert await questions.ask(20) == ["no answer"] * 20
    questions.fault = BufferUnavailableError("gone")
    assert await questions.ask(4) == ["no answer"] * 3 + ["not asked"]


async def test_an_answer_that_is_none_counts_as_a_failure_and_is_returned() -> None:
    questions = Questions()
    outcomes = [await questions.breaker.ask(answer, is_answer=lambda _: False) for _ in range(3)]
    assert outcomes == ["answer"] * 3
    assert await questions.ask() == ["not asked"]


async def test_without_a_probe_an_open_breaker_has_one_question_find_out() -> None:
    questions = await Questions().open()
    questions.now_s += 1.0
    assert await questions.ask(3) == ["no answer", "not asked", "not asked"]
    questions.now_s += 1.0
    assert await questions.ask() == ["not asked"]
    questions.now_s += 1.0
    questions.fault = None
    assert await questions.ask(5) == ["answer"] * 5


async def test_while_one_question_finds_out_the_others_do_not_wait_for_it() -> None:
    questions = await Questions().open()
    questions.now_s += 1.0
    finding_out = asyncio.create_task(questions.breaker.ask(hang))
    await asyncio.sleep(0)
    assert await questions.ask() == ["not asked"]
    # Cancelled, it has found out nothing: the next one does.
    finding_out.cancel()
    await asyncio.wait((finding_out,))
    questions.fault = None
    assert await questions.ask() == ["answer"]


async def test_with_a_probe_no_question_finds_out() -> None:
    questions = await Questions(probing=True).open()
    assert await questions.ask(5) == ["not asked"] * 5
    await settled()
    assert questions.probed == 0
    questions.now_s += 1.0
    assert await questions.ask(5) == ["not asked"] * 5
    await settled()
    assert await questions.ask(5) == ["not asked"] * 5
    await settled()
    assert (questions.asked, questions.probed) == (3, 1)
    questions.now_s += 2.0
    questions.fault = None
    assert await questions.ask() == ["not asked"]
    await settled()
    assert await questions.ask(3) == ["answer"] * 3
    assert questions.probed == 2


async def test_where_the_probe_is_answered_and_the_next_question_is_not_the_pause_is_a_longer_one() -> None:
    questions = await Questions(probing=True).open()
    questions.now_s += 1.0
    questions.fault = None
    await questions.ask()
    await settled()
    questions.fault = TimeoutError()
    assert await questions.ask(2) == ["no answer", "not asked"]
    assert questions.circuit.wait_s() == 2.0


async def test_a_probe_that_hangs_ends_with_its_breaker() -> None:
    questions = Questions()
    questions.breaker = Breaker(questions.circuit, probe=hang)
    await questions.open()
    questions.now_s += 1.0
    await questions.ask()
    (probe,) = [task for task in asyncio.all_tasks() if task.get_name() == "mollifier-probe"]
    questions.breaker.close()
    await asyncio.wait((probe,))
    assert probe.cancelled()


async def test_a_breaker_behind_another_refuses_what_that_one_does_and_has_it_find_out() -> None:
    front = Questions(probing=True)
    questions = Questions(probing=True, behind=front.breaker)
    await front.open()
    assert await questions.ask() == ["not asked"]
    front.now_s += 1.0
    front.fault = None
    assert await questions.ask() == ["not asked"]
    await settled()
    assert await questions.ask() == ["answer"]
    assert (front.probed, questions.probed) == (1, 0)


async def test_a_lagging_loop_opens_no_breaker(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        evaluator = TripEvaluator(Scripts(Server(redis)), Keyspace(4), lambda: SETTINGS)
        inputs = GateInputs(org_id=ORG, env_id=ENV)
        breaker = Breaker(Circuit(Backoff(3_600_000), failures=1))
        stop = asyncio.Event()
        blocking = asyncio.create_task(block_the_loop(0.02, stop))
        try:
            for count in range(1, 6):
                verdict = await breaker.ask(lambda: within(DEADLINE_MS, evaluator.evaluate(inputs)))
                assert verdict == Verdict(tripped=False, count=count)
        finally:
            stop.set()
            await blocking
