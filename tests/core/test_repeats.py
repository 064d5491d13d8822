"""Messages that repeat: the first is told at once, the others are told of once a second, and none goes uncounted."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.repeats import EVERY_S, RepeatedLog


class Timers:
    """A clock that is turned by hand, and the timers that it sets off."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._numbers = itertools.count()
        self._set: list[tuple[float, int, Callable[[], None]]] = []

    def clock(self) -> float:
        return self.now_s

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._set, (self.now_s + delay_s, next(self._numbers), call))

    def turn(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._set and self._set[0][0] <= end_s:
            self.now_s, _, call = heapq.heappop(self._set)
            call()
        self.now_s = end_s


class Lines(logging.Handler):
    """What was logged: the clock's time, the event, its fields."""

    def __init__(self, timers: Timers) -> None:
        super().__init__()
        self._timers = timers
        self.lines: list[tuple[float, str, dict[str, Any]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((self._timers.now_s, record.getMessage(), record.__dict__["fields"]))

    @property
    def fields(self) -> list[dict[str, Any]]:
        return [fields for _, _, fields in self.lines]


def never(delay_s: float, call: Callable[[], None]) -> None:
    """A timer of a loop that is too busy to see to it."""


class Bench:
    """A log with its clock, and what comes out of it."""

    def __init__(self, *, late: bool = False) -> None:
        self.timers = Timers()
        self.heard = Lines(self.timers)
        logger = logging.Logger("bench")  # noqa: LOG001 - one that no other test shares
        logger.addHandler(self.heard)
        self.log = RepeatedLog(logger, monotonic=self.timers.clock, later=never if late else self.timers.later)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_first_is_told_at_once_and_the_rest_in_one_line_with_the_latest_error(bench: Bench) -> None:
    for number in range(1000):
        bench.log.tell("failed", "gate", part="gate", error=f"number {number}")
    assert bench.heard.fields == [{"part": "gate", "error": "number 0", "times": 1}]
    bench.timers.turn(EVERY_S)
    assert bench.heard.fields[1:] == [{"part": "gate", "error": "number 999", "times": 999}]


def test_what_happened_once_is_told_once(bench: Bench) -> None:
    bench.log.tell("failed", error="a")
    bench.timers.turn(100)
    assert len(bench.heard.lines) == 1
    bench.log.tell("failed", error="b")
    assert bench.heard.fields[1:] == [{"error": "b", "times": 1}]


def test_one_kind_does_not_silence_another(bench: Bench) -> None:
    for kind in ("gate", "buffer", "gate"):
        bench.log.tell("failed", kind, part=kind)
    bench.log.tell("drained", "gate", part="gate")
    assert [(event, fields["part"]) for _, event, fields in bench.heard.lines] == [
        ("failed", "gate"),
        ("failed", "buffer"),
        ("drained", "gate"),
    ]


def test_what_was_only_counted_is_told_before_the_end(bench: Bench) -> None:
    for _ in range(5):
        bench.log.tell("failed")
    bench.log.flush()
    assert [fields["times"] for fields in bench.heard.fields] == [1, 4]


def test_without_a_loop_the_next_message_tells_of_those_before_it() -> None:
    bench = Bench(late=True)
    for _ in range(5):
        bench.log.tell("failed")
    bench.timers.turn(EVERY_S)
    bench.log.tell("failed")
    assert [fields["times"] for fields in bench.heard.fields] == [1, 5]


async def test_on_a_loop_the_rest_is_told_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    log = RepeatedLog(logging.getLogger("repeats"))
    for _ in range(7):
        log.tell("failed")
    async with asyncio.timeout(30):
        while len(caplog.records) < 2:
            await asyncio.sleep(0.05)
    assert [record.__dict__["fields"]["times"] for record in caplog.records] == [1, 6]


STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0.0, 0.001, 0.3, 0.999, 1.0, 1.7])), max_size=60)


@given(steps=STEPS, late=st.booleans())
def test_in_any_history_the_lines_add_up_and_there_is_one_a_second_of_each_kind(
    steps: list[tuple[str, float]], late: bool
) -> None:
    bench = Bench(late=late)
    for kind, pause_s in steps:
        bench.log.tell("failed", kind, kind=kind)
        bench.timers.turn(pause_s)
    times = {kind: [at_s for at_s, _, fields in bench.heard.lines if fields["kind"] == kind] for kind in "ab"}
    assert all(
        after - before >= EVERY_S - 1e-9 for told in times.values() for before, after in itertools.pairwise(told)
    )
    bench.log.flush()
    told = Counter[str]()
    for fields in bench.heard.fields:
        told[fields["kind"]] += fields["times"]
    assert told == Counter(kind for kind, _ in steps)
