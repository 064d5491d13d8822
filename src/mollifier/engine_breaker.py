"""4. The breaker in front of the run engine: how many entries may be taken now, by what became of those that were.

A sick engine is asked a few times a second by a whole process, however much waits for it: while the circuit is open nothing is taken out
of the buffer, half open one entry of one environment is, and ramping as many as the engine has shown to stand (`circuit.py`).

An engine that cannot be reached opens it at once. One that fails whatever it is given does so by failing batches whole, several in a
row and whosever they are. A bad entry does not: its neighbours succeed, be it in its batch or in the next one. What is wrong with an
entry that cannot be read, or holds what cannot be stored, says nothing of the engine, nor does an entry that needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from mollifier.backoff import Backoff
from mollifier.buffer import Buffer
from mollifier.circuit import Circuit, Question, State
from mollifier.errors import (
    BufferUnavailableError,
    EngineFailingError,
    EngineUnavailableError,
    NonRetryableError,
)
from mollifier.handling import Outcome
from mollifier.model import Entry
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry

_PAUSES_MS = (200, 5_000)
_FAILURES = 5
_TOLD_MS = 30_000
"""How long others believe that the engine is away after they were told last: longer than it takes to find out once more."""


class EngineBreaker:
    """The breaker of one drainer. `asks_engine` tells of an entry whether handling it asks the engine anything.

    `monotonic` returns seconds, `jitter` a number in [0, 1).
    """

    def __init__(
        self,
        buffer: Buffer,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        asks_engine: Callable[[Entry], bool],
        monotonic: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self._buffer = buffer
        self._asks_engine = asks_engine
        self._circuit = Circuit(
            Backoff(*_PAUSES_MS),
            failures=_FAILURES,
            full=lambda: settings().drain_concurrency,
            monotonic=monotonic,
            jitter=jitter,
            on_change=lambda state: telemetry.breaker_changed("engine", state),
        )
        self._told_term = 0
        self._is_told_away = False

    @property
    def term(self) -> int:
        """How many times it has opened."""
        return self._circuit.term

    def room(self, free: int) -> int:
        """Return how many entries may be taken now, of as many as there is room for here."""
        return self._circuit.room(free)

    def wait_s(self) -> float:
        """Return how long nothing may be taken yet, seconds; 0 unless it is open."""
        return self._circuit.wait_s()

    def ask(self, entries: Sequence[Entry], term: int) -> Question:
        """Take note that these entries, for which there was room in that term, are to be handled together."""
        number = len(entries)
        return self._circuit.ask(number) if term == self.term else Question(self._circuit, number, term)

    def stands(self, question: Question) -> bool:
        """Tell whether the entries may be handled still: it has not opened since they were taken."""
        return question.term == self.term

    def judge(self, question: Question, entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> None:
        """Take note of what became of entries that were handled together."""
        told = [outcome for entry, outcome in zip(entries, outcomes, strict=True) if self._asks_engine(entry)]
        if any(isinstance(one, EngineUnavailableError) and not isinstance(one, EngineFailingError) for one in told):
            question.failed(at_once=True)
        elif None in told:
            question.answered()
        elif all(isinstance(one, NonRetryableError) for one in told):
            question.dropped()
        else:
            question.failed()

    def missed(self, question: Question) -> None:
        """Take note that the engine could not be told of the failures among these entries."""
        self._circuit.failed(question.term, 0, at_once=True)

    async def tell(self) -> None:
        """Tell those who share the buffer when it has opened, and when it has closed; in vain where the buffer is away."""
        with suppress(BufferUnavailableError):
            if self._told_term != self.term:
                self._told_term, self._is_told_away = self.term, True
                await self._buffer.tell_engine_away(_TOLD_MS)
            elif self._is_told_away and self._circuit.state is State.CLOSED:
                self._is_told_away = False
                await self._buffer.tell_engine_back()
