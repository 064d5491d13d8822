"""Looks at every step, every answer and the end, with every sentence of the specification; the first contradiction ends the seed."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mollifier.buffer import Ready
from mollifier.model import Decision, GateInputs
from tests.simulation.facts import Facts
from tests.simulation.history import Call, Step
from tests.simulation.invariants import (
    SENTENCES,
    ADrainerIsBounded,
    ADrainerStopsInTime,
    NothingDiesOfAFault,
    NothingIsRepairedThatIsWhole,
    OrganizationsTakeTurns,
    Sentence,
    TheGateDecidesByItsTable,
)

if TYPE_CHECKING:
    from tests.simulation.process import Process
    from tests.simulation.world import World


class Violation(AssertionError):  # noqa: N818 - what is wrong is not this program
    """A sentence of the specification does not hold."""

    def __init__(self, sentence: Sentence, complaint: str) -> None:
        said = " ".join((sentence.__doc__ or "").split())
        super().__init__(f"{type(sentence).__name__}: {complaint}\n  {said}")
        self.sentence = type(sentence).__name__
        self.complaint = complaint


class Watch:
    """The sentences, asked about one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.facts = Facts(world.plan, world.keyspace, world.buffer, world.engine, world.history)
        self._sentences = {kind: kind(self.facts) for kind in SENTENCES}
        self._of_step: defaultdict[str, list[Sentence]] = defaultdict(list)
        everywhere = [one for one in self._sentences.values() if overrides(one, "after_step") and not one.steps]
        for what in {what for kind in SENTENCES for what in kind.steps}:
            some = [one for one in self._sentences.values() if what in one.steps and overrides(one, "after_step")]
            self._of_step[what] = [*some, *everywhere]
        self._everywhere = everywhere
        self._of_answer = [one for one in self._sentences.values() if overrides(one, "after_answer")]
        self._turns = self._the(OrganizationsTakeTurns)
        self._bounded = self._the(ADrainerIsBounded)
        self._table = self._the(TheGateDecidesByItsTable)
        self._faults = self._the(NothingDiesOfAFault)
        self._sweeper = self._the(NothingIsRepairedThatIsWhole)
        self._stopping = self._the(ADrainerStopsInTime)

    def _the(self, kind: type[Any]) -> Any:
        return self._sentences[kind]

    def step(self, step: Step) -> None:
        self.facts.meet(step)
        for sentence in self._of_step.get(step.what, self._everywhere):
            self._hold(sentence, sentence.after_step(step))
        if step.what == "pop":
            self._popping(step)
        self.facts.absorb(step)

    def _popping(self, step: Step) -> None:
        process = next((one for one in self._world.workers if one.name == step.by and one.drainer), None)
        if process is not None and process.drainer is not None:
            number = process.drainer.in_flight
            self._hold(self._bounded, self._bounded.in_flight(process.name, number, process.settings, step))

    def asked(self, call: Call) -> None:
        self.facts.asks(call)

    def answered(self, call: Call) -> None:
        self.facts.told(call)
        for sentence in self._of_answer:
            self._hold(sentence, sentence.after_answer(call))

    def decided(self, call: Call | None, inputs: GateInputs, decision: Decision) -> None:
        if call is not None and decision.reason is not None:
            call.mollified += 1
        self._hold(self._table, self._table.decided(inputs, decision))

    def faulted(self, process: str, operation: str, error: BaseException) -> None:
        self._hold(self._faults, self._faults.faulted(process, operation, error))

    def repaired(self, process: str, kind: str) -> None:
        self._hold(self._sweeper, self._sweeper.repaired(process, kind))

    def ended(self, process: Process, ending: asyncio.Task[Any]) -> None:
        self._hold(self._stopping, self._stopping.ended(process.name, is_done=ending.done()))

    def planning(self, process: Process) -> None:
        """Look at the plan of each tick of a process's drainer from now on."""
        drainer: Any = process.drainer
        plan: Callable[..., Sequence[tuple[Ready, int]]] = drainer._rotation.plan

        def planned(ready: Mapping[str, Sequence[str]], *, capacity: int, **limits: Any) -> Any:
            shares = plan(ready, capacity=capacity, **limits)
            self._hold(self._turns, self._turns.planned(process.name, ready, capacity, shares))
            return shares

        drainer._rotation.plan = planned

    def is_draining(self) -> bool:
        """True while the buffer has something that is to leave it."""
        sets = self._world.buffer.store.sets
        return any(":queue:" in key or ":waiting:" in key or key.endswith(":draining") for key in sets)

    def rest(self) -> None:
        for sentence in self._sentences.values():
            self._hold(sentence, sentence.at_rest())

    def _hold(self, sentence: Sentence, complaints: Iterable[str]) -> None:
        for complaint in complaints:
            loop = self._world.loop
            loop.failure = loop.failure or Violation(sentence, complaint)


def overrides(sentence: Sentence, name: str) -> bool:
    return getattr(type(sentence), name) is not getattr(Sentence, name)
