"""A circuit: whether somebody who has failed is to be asked now, and how many at a time. Pure code: no I/O, its clock is passed in.

The problem. Whoever is asked may be away, hang, or fail at whatever he is asked. To go on asking costs each asker the wait for an answer
that does not come, and costs somebody who is overloaded the very strength that he needs to recover.

What is done here is Nygard's circuit breaker ("Release It!"), with a slow start at the end:

      closed  --- so many failures in a row, or one that says enough --->  open
        ^                                                                   |  ^
        |                                                       a pause has |  |  failure: a longer pause
        | as many as ever were answered                          passed     v  |
     ramping  <------------------------- an answer ----------------------  half open: one question
        |
        +------------------------------- failure ------------------------> open, a longer pause

The pauses grow from each opening to the next and are shaken, so that processes that failed together do not come back together; they
start anew once a closed circuit has had an answer. Ramping, one answer lets two be asked, these let four, as TCP starts slowly
(Jacobson, "Congestion Avoidance and Control"): somebody who has just recovered is not thrown down again by all that has waited.

The first outcome after the half-open question decides alone: until then the circuit is on trial. A failure opens it, an answer wipes
the slate. What was asked before the circuit opened tells nothing of now, whenever it comes back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from enum import StrEnum

from mollifier.backoff import Backoff


class State(StrEnum):
    """Whether questions are asked: all, none, one, or more and more."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    RAMPING = "ramping"


class Question:
    """What has been asked, until it is known what came of it; the first thing that is told of it counts."""

    __slots__ = ("_circuit", "_is_told", "_number", "term")

    def __init__(self, circuit: Circuit, number: int, term: int) -> None:
        self._circuit = circuit
        self._number = number
        self._is_told = False
        self.term = term

    def answered(self) -> None:
        """Tell that there was an answer."""
        self._tell(self._circuit.answered)

    def failed(self, *, at_once: bool = False) -> None:
        """Tell that there was none; `at_once`: that is enough to open the circuit."""
        self._tell(lambda term, number: self._circuit.failed(term, number, at_once=at_once))

    def dropped(self) -> None:
        """Tell that nobody will know: it was given up, or said nothing of who was asked."""
        self._tell(self._circuit.dropped)

    def _tell(self, what: Callable[[int, int], None]) -> None:
        if not self._is_told:
            self._is_told = True
            what(self.term, self._number)


class Circuit:
    """The state between an asker and somebody who may fail.

    So many `failures` in a row open it, for the next of `pauses` or down to half of it. `full` returns how many may be under way at once when
    nothing is wrong: the end of the ramp. `monotonic` returns seconds, `jitter` a number in [0, 1); `on_change` is told each new state.
    """

    def __init__(
        self,
        pauses: Backoff,
        *,
        failures: int = 5,
        full: Callable[[], int] = lambda: 1,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        on_change: Callable[[State], None] = lambda _: None,
    ) -> None:
        self._pauses = pauses
        self._failures_max = failures
        self._full = full
        self._monotonic = monotonic
        self._jitter = jitter
        self._on_change = on_change
        self._state = State.CLOSED
        self._failures = 0
        self._on_trial = False
        self._opened_until_s = 0.0
        # Questions belong to the term in which they were asked; how many of this one's are under way, and how many may be.
        self._term = 0
        self._under_way = 0
        self._level = 0

    @property
    def state(self) -> State:
        """Whether questions are asked now."""
        return self._state

    @property
    def on_trial(self) -> bool:
        """True after the half-open question was answered, until it is known what came of one that was asked since."""
        return self._on_trial

    @property
    def term(self) -> int:
        """How many times it has opened."""
        return self._term

    def wait_s(self) -> float:
        """Return how long nothing may be asked yet; 0 unless it is open."""
        return max(0.0, self._opened_until_s - self._monotonic()) if self._state is State.OPEN else 0.0

    def room(self, free: int = 1) -> int:
        """Return how many questions may be asked now, of as many as the asker could."""
        match self._state:
            case State.CLOSED:
                return free
            case State.OPEN:
                return 0 if self.wait_s() else min(free, 1)
            case State.HALF_OPEN:
                return 0
            case State.RAMPING:
                return max(0, min(free, self._level - self._under_way))

    def ask(self, number: int = 1) -> Question:
        """Take note that so many questions, as many as there is room for, are asked together: they have one outcome."""
        if self._state is State.OPEN:
            self._become(State.HALF_OPEN)
        self._under_way += number
        return Question(self, number, self._term)

    def answered(self, term: int, number: int) -> None:
        """Take note of an answer to what was asked in that term."""
        if term != self._term:
            return
        self._under_way -= number
        self._failures = 0
        self._on_trial = self._state is State.HALF_OPEN
        if self._state is State.CLOSED:
            self._pauses.reset()
            return
        if self._state is State.HALF_OPEN:
            self._level = 1
        self._level += number
        self._become(State.CLOSED if self._level >= self._full() else State.RAMPING)

    def failed(self, term: int, number: int, *, at_once: bool = False) -> None:
        """Take note that what was asked in that term had no answer."""
        if term != self._term:
            return
        self._under_way -= number
        self._failures += 1
        if at_once or self._on_trial or self._state is State.HALF_OPEN or self._failures >= self._failures_max:
            self._on_trial = False
            self._term += 1
            self._under_way = 0
            pause_ms = self._pauses.next_ms() * (1 - self._jitter() / 2)
            self._opened_until_s = self._monotonic() + pause_ms / 1000
            self._become(State.OPEN)

    def dropped(self, term: int, number: int) -> None:
        """Take note that nothing will be known of what was asked in that term: another question may take its place."""
        if term != self._term:
            return
        self._under_way -= number
        if self._state is State.HALF_OPEN:
            self._become(State.OPEN)

    def _become(self, state: State) -> None:
        if state is not self._state:
            self._state = state
            self._on_change(state)
