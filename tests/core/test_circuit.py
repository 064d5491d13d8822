"""The circuit: when it opens, how it finds out, how it closes; by a clock that the tests set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.backoff import Backoff
from mollifier.circuit import Circuit, Question, State

CLOSED, OPEN, HALF_OPEN, RAMPING = State.CLOSED, State.OPEN, State.HALF_OPEN, State.RAMPING


class Bench:
    """A circuit, its clock, and what it told of itself."""

    def __init__(self, *, failures: int = 3, full: int = 8, jitter: float = 0.0) -> None:
        self.now_s = 1000.0
        self.jitter = jitter
        self.changes: list[State] = []
        self.circuit = Circuit(
            Backoff(200, 5_000),
            failures=failures,
            full=lambda: full,
            monotonic=lambda: self.now_s,
            jitter=lambda: self.jitter,
            on_change=self.changes.append,
        )

    @property
    def state(self) -> State:
        return self.circuit.state

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.circuit.ask().failed()

    def answer(self, number: int = 1) -> None:
        self.circuit.ask(number).answered()

    def opened(self) -> Bench:
        self.circuit.ask().failed(at_once=True)
        return self

    def wait(self) -> float:
        """Let the pause pass; return how long it was, seconds."""
        wait_s = self.circuit.wait_s()
        self.now_s += wait_s
        return round(wait_s, 3)


def test_so_many_failures_in_a_row_open_it() -> None:
    bench = Bench(failures=3)
    bench.fail(2)
    assert (bench.state, bench.circuit.room(7)) == (CLOSED, 7)
    bench.fail()
    assert (bench.state, bench.circuit.room(7)) == (OPEN, 0)


def test_an_answer_in_between_starts_the_count_anew() -> None:
    bench = Bench(failures=3)
    for _ in range(5):
        bench.fail(2)
        bench.answer()
    assert bench.state is CLOSED


def test_one_failure_that_says_enough_opens_it() -> None:
    assert Bench(failures=1000).opened().state is OPEN


def test_after_the_pause_there_is_room_for_one_question_and_for_no_other_meanwhile() -> None:
    bench = Bench().opened()
    bench.now_s += 0.199
    assert bench.circuit.room(7) == 0
    bench.now_s += 0.002
    assert bench.circuit.room(7) == 1
    bench.circuit.ask()
    assert (bench.state, bench.circuit.room(7)) == (HALF_OPEN, 0)


def test_pauses_grow_while_it_fails_and_start_anew_once_it_has_been_answered_when_closed() -> None:
    bench = Bench(full=1).opened()
    pauses = [bench.wait()]
    for _ in range(6):
        bench.fail()
        pauses.append(bench.wait())
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    bench.answer()
    assert bench.state is CLOSED
    bench.fail()
    # It had only just closed: the failures before count.
    assert bench.wait() == 5.0
    bench.answer()
    bench.answer()
    assert bench.opened().wait() == 0.2


@pytest.mark.parametrize(("jitter", "pause_s"), [(0.0, 0.2), (0.5, 0.15), (0.999, 0.1)])
def test_pauses_are_shaken_between_half_and_whole(jitter: float, pause_s: float) -> None:
    assert Bench(jitter=jitter).opened().wait() == pytest.approx(pause_s, abs=0.001)


def test_answers_let_twice_as_many_be_asked_until_as_many_are_under_way_as_may_be() -> None:
    bench = Bench(full=8).opened()
    bench.wait()
    rooms: list[int] = []
    while bench.state is not CLOSED:
        rooms.append(bench.circuit.room(100))
        questions = [bench.circuit.ask() for _ in range(rooms[-1])]
        assert bench.circuit.room(100) == 0
        for question in questions:
            question.answered()
    assert rooms == [1, 2, 4]
    assert bench.changes == [OPEN, HALF_OPEN, RAMPING, CLOSED]


def test_questions_asked_together_count_as_many() -> None:
    bench = Bench(full=100).opened()
    bench.wait()
    bench.answer()
    assert bench.circuit.room(100) == 2
    bench.answer(2)
    assert bench.circuit.room(100) == 4


def test_the_first_outcome_after_the_half_open_question_decides() -> None:
    bench = Bench(failures=3).opened()
    bench.wait()
    bench.answer()
    bench.fail()
    assert (bench.state, bench.wait()) == (OPEN, 0.4)
    bench.answer()
    bench.answer()
    bench.fail(2)
    assert bench.state is RAMPING


def test_what_was_asked_before_it_opened_tells_nothing() -> None:
    bench = Bench(failures=3)
    late = [bench.circuit.ask() for _ in range(3)]
    bench.opened()
    late[0].failed()
    assert bench.wait() == 0.2
    half_open = bench.circuit.ask()
    late[1].answered()
    assert bench.state is HALF_OPEN
    half_open.answered()
    late[2].failed(at_once=True)
    assert bench.state is RAMPING


def test_a_half_open_question_that_is_dropped_leaves_its_place_to_the_next() -> None:
    bench = Bench().opened()
    bench.wait()
    bench.circuit.ask().dropped()
    assert (bench.state, bench.circuit.room()) == (OPEN, 1)
    bench.answer()
    assert bench.state is RAMPING


def test_dropped_questions_neither_open_nor_close_it_and_take_no_room() -> None:
    bench = Bench(failures=2).opened()
    bench.wait()
    bench.answer()
    question = bench.circuit.ask(2)
    assert bench.circuit.room(9) == 0
    question.dropped()
    assert (bench.state, bench.circuit.room(9)) == (RAMPING, 2)


def test_the_first_thing_told_of_a_question_counts() -> None:
    bench = Bench(failures=1)
    question = bench.circuit.ask()
    question.answered()
    question.failed()
    question.dropped()
    assert bench.state is CLOSED


@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "fail", "away", "drop", "wait"]), st.integers(1, 5))))
def test_whatever_happens_no_more_is_under_way_than_it_lets(steps: list[tuple[str, int]]) -> None:
    bench = Bench(failures=3, full=6)
    asked: list[tuple[Question, int]] = []
    for what, number in steps:
        if what == "ask" and (room := bench.circuit.room(number)):
            assert room <= number
            asked.append((bench.circuit.ask(room), room))
        elif what == "wait":
            bench.wait()
        elif what != "ask" and asked:
            question, _ = asked.pop(number % len(asked))
            match what:
                case "answer":
                    question.answered()
                case "drop":
                    question.dropped()
                case _:
                    question.failed(at_once=what == "away")
        this_term = [count for question, count in asked if question.term == bench.circuit.term]
        match bench.state:
            case State.OPEN:
                assert this_term == []
                assert bench.circuit.wait_s() > 0 or bench.circuit.room(9) == 1
            case State.HALF_OPEN:
                assert sum(this_term) <= 1
            case State.RAMPING:
                assert sum(this_term) <= 6
            case State.CLOSED:
                assert bench.circuit.room(9) == 9
