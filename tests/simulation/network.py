"""The way from processes to a server: every message takes a while, and some never arrive, or their answers do not.

A message that has left arrives whatever becomes of its sender: a dead process's last words are heard. What arrives at a server that is
stopped is done when it goes on, however long its sender has given up by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from tests.simulation.loop import VirtualLoop

Part = Callable[[], Any]
"""Something that a message has done at the server at one moment; the last part's result is the answer."""


class Cut(Exception):  # noqa: N818 - it is what happened, and no error of anybody's
    """The connection broke; whether the message arrived, the other side knows. `unsent`: there was no connection to be had."""

    def __init__(self, what: str, *, unsent: bool = False) -> None:
        super().__init__(what)
        self.unsent = unsent


class Silence(Exception):  # noqa: N818 - as above
    """No answer came for as long as one waits for answers."""


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How messages fare: latencies are seconds one way, the rest are probabilities."""

    latency_s: tuple[float, float]
    lost: float = 0.0
    answer_lost: float = 0.0
    silent: float = 0.5
    slow: float = 0.0
    slow_s: tuple[float, float] = (0.01, 1.0)
    split: float = 0.0

    @property
    def is_rough(self) -> bool:
        """True when messages or answers may be lost, or take long."""
        return bool(self.lost or self.answer_lost or self.slow)


class Link:
    """One server's connections. `down`: it refuses; `stopped`: it takes messages and does nothing with them yet."""

    def __init__(self, loop: VirtualLoop, chance: Random, weather: Weather, patience_s: float) -> None:
        self._loop = loop
        self._chance = chance
        self.weather = weather
        self._patience_s = patience_s
        self._life = 0
        self._kept: list[tuple[asyncio.Future[Any], Sequence[Part], int, int, bool]] = []
        self.down = False
        self.stopped = False
        self._reachable_since_s = 0.0

    @property
    def reachable_since_s(self) -> float | None:
        """Since when every message has arrived and been answered in no time; None while that is not so."""
        return None if self.down or self.stopped or self.weather.is_rough else self._reachable_since_s

    def clear(self, weather: Weather) -> None:
        """Have the weather change for the better. Who waits for an answer that was lost before does so to the end of its patience."""
        if self.weather.is_rough:
            self._reachable_since_s = self._loop.time() + self._patience_s + 2 * self.weather.slow_s[1]
        self.weather = weather

    async def ask(self, *parts: Part) -> Any:
        """Have the parts done, one after another; return the answer. Raises Cut or Silence, and what the last part raises."""
        answer = self._loop.create_future()
        chance, weather = self._chance, self.weather
        fate = chance.random()
        if fate < weather.lost:
            self._break(answer)
        else:
            is_answered = fate >= weather.lost + weather.answer_lost
            self._loop.outside(self._latency_s(), self._arrive, answer, parts, 0, self._life, is_answered)
        return await answer

    def split(self, number: int) -> int:
        """Return before which of so many commands the way is interrupted, 0 for none."""
        if number < 2 or self._chance.random() >= self.weather.split:
            return 0
        return 1 + int(self._chance.random() * (number - 1))

    def fall(self) -> None:
        """Have the server die, with every connection to it."""
        self.down = True
        self.stopped = False
        self._life += 1
        for answer, *_ in self._kept:
            _end(answer, Cut("the server died"))
        self._kept.clear()

    def rise(self) -> None:
        self._reached_again(self.down)
        self.down = False

    def stop(self) -> None:
        self.stopped = not self.down

    def resume(self) -> None:
        """Have a stopped server do what has come up."""
        self._reached_again(self.stopped)
        self.stopped = False
        kept, self._kept = self._kept, []
        for message in kept:
            self._loop.outside(0.0, self._arrive, *message)

    def _arrive(
        self,
        answer: asyncio.Future[Any],
        parts: Sequence[Part],
        place: int,
        life: int,
        is_answered: bool,
    ) -> None:
        if self.down or life != self._life:
            # Who asks one that is down already finds nobody to connect to.
            _end(answer, Cut("the server is away", unsent=life == self._life and place == 0))
        elif self.stopped:
            self._kept.append((answer, parts, place, life, is_answered))
            self._loop.outside(self._patience_s, _end, answer, Silence("no answer"))
        elif place + 1 < len(parts):
            parts[place]()
            self._loop.outside(self._latency_s(), self._arrive, answer, parts, place + 1, life, is_answered)
        else:
            self._finish(answer, parts[place], is_answered)

    def _finish(self, answer: asyncio.Future[Any], part: Part, is_answered: bool) -> None:
        try:
            result, error = part(), None
        except Exception as raised:  # noqa: BLE001 - what the server raises is its answer
            result, error = None, raised
        if not is_answered:
            self._break(answer)
        elif error is not None:
            self._loop.outside(self._latency_s(), _end, answer, error)
        else:
            self._loop.outside(self._latency_s(), _give, answer, result)

    def _break(self, answer: asyncio.Future[Any]) -> None:
        if self._chance.random() < self.weather.silent:
            self._loop.outside(self._patience_s, _end, answer, Silence("no answer"))
        else:
            self._loop.outside(self._latency_s(), _end, answer, Cut("the connection broke"))

    def _reached_again(self, was_away: bool) -> None:
        if was_away:
            self._reachable_since_s = max(self._reachable_since_s, self._loop.time())

    def _latency_s(self) -> float:
        chance, weather = self._chance, self.weather
        low, high = weather.slow_s if weather.slow and chance.random() < weather.slow else weather.latency_s
        return low + (high - low) * chance.random()


def _give(answer: asyncio.Future[Any], result: Any) -> None:
    if not answer.done():
        answer.set_result(result)


def _end(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
