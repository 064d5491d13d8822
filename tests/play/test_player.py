"""The open loop: when calls leave, whatever the system does with them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.play.player import READ_AHEAD_CALLS, Player


class Timed(NamedTuple):
    number: int
    at_s: float


class Clock:
    """A clock that only sleeping moves; each sleep lasts as asked and `late_s` longer."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.now_s += seconds + self.late_s
        await asyncio.sleep(0)


Left = list[tuple[int, float]]


async def play(
    times: list[float], clock: Clock, answer: Callable[[], Awaitable[None]] | None = None
) -> tuple[Left, Player[Timed]]:
    left: Left = []

    async def send(call: Timed) -> None:
        left.append((call.number, clock() - 100.0))
        if answer is not None:
            await answer()

    player = Player[Timed](send, clock=clock, sleep=clock.sleep)
    await player.play(Timed(number, at_s) for number, at_s in enumerate(times))
    return left, player


ascending = st.lists(st.floats(0, 60, allow_nan=False), max_size=40).map(sorted)


@given(ascending, st.floats(0, 3))
def test_calls_leave_in_order_and_never_before_their_time(times: list[float], late_s: float) -> None:
    left, player = asyncio.run(play(times, Clock(late_s)))
    assert [number for number, _ in left] == list(range(len(times)))
    assert all(at_s >= due_s - 1e-9 for (_, at_s), due_s in zip(left, times, strict=True))
    assert all(lag_s >= -1e-9 for lag_s in player.lags_s)


@given(ascending)
def test_calls_leave_at_their_very_time_when_sleep_is_exact(times: list[float]) -> None:
    left, player = asyncio.run(play(times, Clock()))
    assert [at_s for _, at_s in left] == pytest.approx(times)
    assert list(player.lags_s) == pytest.approx([0.0] * len(times))


async def test_a_late_start_is_caught_up_at_once_and_told() -> None:
    left, player = await play([0.0, 1.0, 1.5, 9.0], Clock(late_s=2.0))
    assert [at_s for _, at_s in left] == pytest.approx([0.0, 3.0, 3.0, 11.0])
    assert list(player.lags_s) == pytest.approx([0.0, 2.0, 1.5, 2.0])


async def test_no_call_waits_for_the_answer_of_another() -> None:
    all_left = asyncio.Event()
    clock = Clock()
    waiting = 0

    async def answer() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 50:
            all_left.set()
        await all_left.wait()

    left, _ = await play([n / 10 for n in range(50)], clock, answer)
    assert len(left) == 50


async def test_calls_are_made_ahead_but_not_all_at_once() -> None:
    clock, made = Clock(), 0

    async def send(call: Timed) -> None:
        assert made <= call.number + READ_AHEAD_CALLS + 1

    def source() -> Iterator[Timed]:
        nonlocal made
        for number in range(READ_AHEAD_CALLS * 2):
            made += 1
            yield Timed(number, number / 1000)

    await Player[Timed](send, clock=clock, sleep=clock.sleep).play(source())
    assert made == READ_AHEAD_CALLS * 2


async def test_cancelling_the_play_cancels_the_calls_in_flight() -> None:
    started, cancelled = asyncio.Event(), set[int]()

    async def send(call: Timed) -> None:
        if call.number == 1:
            started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.add(call.number)
            raise

    playing = asyncio.create_task(Player[Timed](send).play([Timed(0, 0.0), Timed(1, 0.0)]))
    await started.wait()
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert cancelled == {0, 1}
