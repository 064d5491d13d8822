"""One seed, played: processes, servers, callers and faults on one virtual clock, with every invariant looked at after every step."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from random import Random
from typing import Any

from msgspec.structs import replace

from mollifier.facade import Mollifier
from mollifier.flags import ORG_FLAG
from mollifier.keys import Keyspace
from mollifier.model import Decision, GateInputs, RunStatus
from mollifier.settings import Settings
from tests.model.scripts import ScriptModel
from tests.simulation.callers import Callers
from tests.simulation.engine import EngineServer, SimulatedEngine
from tests.simulation.history import Call, History, Step
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Link
from tests.simulation.plan import CALM, Fault, Plan, plan_of
from tests.simulation.process import Process, made_of
from tests.simulation.server import BufferServer, Client
from tests.simulation.telemetry import Told
from tests.simulation.watch import Violation, Watch

_LOOK_S = 0.05
_REST_WITHIN_S = 300.0
"""A change that nobody can write anywhere is tried for a minute and a half, and the lease runs out, before its entry is given up."""
_UNWIND_S = 0.55
"""How long beyond its deadline a process may take to put its things away."""


class World:
    """Everything that one seed needs. `model` and `facade` are replaced where a bug is planted."""

    def __init__(
        self, plan: Plan, *, model: type[ScriptModel] = ScriptModel, facade: type[Mollifier] = Mollifier
    ) -> None:
        self.plan = plan
        order = Random(f"order {plan.seed}")
        self.loop = VirtualLoop(order.randrange if plan.shuffles else None)
        self.chance = Random(f"world {plan.seed}")
        self.history = History()
        self.keyspace = Keyspace(plan.settings.partitions)
        self.buffer = BufferServer(
            self.loop,
            self._link(plan.buffer_weather, "buffer"),
            model=model,
            chance=self.chance,
            unconfirmed=plan.unconfirmed,
            on_step=self._stepped,
        )
        self.engine = EngineServer(self.loop, self._link(plan.engine_weather, "engine"), self._stepped)
        self.watch = Watch(self)
        self._facade = facade
        self._global_flags: dict[str, Any] = {ORG_FLAG: plan.global_flag}
        self._processes: list[Process] = []
        self._callers = Callers(self)
        self._by_step = {(fault.of, fault.at_step): fault for fault in plan.faults if fault.at_step is not None}
        self._made = Counter[str]()

    # --- playing ---------------------------------------------------------------------------------------------------

    def play(self) -> None:
        """Play the seed. Raises Violation at the first step after which a sentence of the specification does not hold."""
        try:
            self.loop.run(self._play())
        finally:
            self._unwind()

    async def _play(self) -> None:
        plan = self.plan
        for place in range(plan.apis + plan.workers):
            self._processes.append(self._started(place, plan.settings))
        asking = asyncio.gather(*self._callers.tasks(plan.asks))
        faults = [asyncio.create_task(self._strike(fault)) for fault in plan.faults if fault.at_step is None]
        executing = asyncio.create_task(self._execute())
        await asyncio.sleep(plan.ends_s)
        for fault in faults:
            fault.cancel()
        self._by_step.clear()
        self._heal()
        await asking
        await self._rest()
        executing.cancel()
        self.watch.rest()

    async def _rest(self) -> None:
        """Wait until everything that was held is drained."""
        until_s = self.loop.time() + _REST_WITHIN_S
        while self.loop.time() < until_s and self.watch.is_draining():
            await asyncio.sleep(_LOOK_S)

    def _unwind(self) -> None:
        self.loop.failure = None
        for link in (self.buffer.link, self.engine.link):
            link.fall()
        for process in self.watch.facts.processes:
            self.loop.thaw(process)
        self.loop.unwind()

    # --- what processes are made of --------------------------------------------------------------------------------

    def _link(self, weather: Any, name: str) -> Link:
        chance = Random(f"{name} {self.plan.seed}")
        return Link(self.loop, chance, weather, self.plan.patience_s)

    def _started(self, place: int, settings: Settings, life: int = 1) -> Process:
        plan = self.plan
        kind = "api" if place < plan.apis else "worker"
        name = f"{kind}{place}" + (f".{life}" if life > 1 else "")

        def make(process: Process) -> Mollifier:
            engine = SimulatedEngine(self.engine, name, process.clock, self.history, plan.engine_deadline_ms)
            told = Told(name, on_decided=self._decided, on_fault=self._faulted, on_repair=self._repaired)
            client = Client(self.buffer, name)
            return made_of(
                self._facade,
                process,
                client=client,
                engine=engine,
                told=told,
                global_flags=lambda: self._global_flags,
                reclaim_portion=plan.reclaim_portion,
            )

        process = Process(
            name,
            self.loop,
            settings=settings,
            skew_us=plan.skews_us[place],
            seed=plan.seed * 1000 + place * 20 + life,
            make=make,
            on_made=self.watch.facts.made,
        )
        self.watch.facts.processes.append(process)
        if kind == "worker":
            process.drain(sweeps=plan.sweeps)
            self.watch.planning(process)
        return process

    def api(self, number: int) -> Process:
        """Return the API process that a caller meets."""
        return self._processes[number % self.plan.apis]

    @property
    def workers(self) -> list[Process]:
        return self._processes[self.plan.apis :]

    @property
    def now(self) -> datetime:
        """The true moment."""
        return self.watch.facts.now

    # --- what happens ----------------------------------------------------------------------------------------------

    def _stepped(self, step: Step) -> None:
        history = self.history
        history.steps += 1
        step.number = history.steps
        history.note(self.loop.time(), f"{step.number:>4}", step)
        self.watch.step(step)
        kinds = [step.by.rstrip(".0123456789"), *(["pop"] if step.what == "pop" and step.runs else [])]
        for kind in kinds:
            self._made[kind] += 1
            fault: Fault | None = self._by_step.pop((kind, self._made[kind]), None)  # pyright: ignore[reportArgumentType] - one of them
            place = next((i for i, process in enumerate(self._processes) if process.name == step.by), None)
            if fault is not None and place is not None:
                self._befall(fault, place)

    def _decided(self, call: Call | None, inputs: GateInputs, decision: Decision) -> None:
        self.watch.decided(call, inputs, decision)

    def _faulted(self, process: str, operation: str, error: BaseException) -> None:
        self.history.note(self.loop.time(), f"fault at {process}: {operation}", error)
        self.watch.faulted(process, operation, error)

    def _repaired(self, process: str, kind: str) -> None:
        self.history.note(self.loop.time(), f"repair by {process}:", kind)
        self.watch.repaired(process, kind)

    def answered(self, call: Call) -> None:
        """Take note of what a caller was told."""
        self.history.note(self.loop.time(), "told", call)
        self.watch.answered(call)

    async def _execute(self) -> None:
        """Do what workers do beside draining: queue what is due, expire what is over, execute some of the rest."""
        chance = Random(f"execute {self.plan.seed}")
        table = self.engine.runs
        ends = [RunStatus.COMPLETED, RunStatus.COMPLETED, RunStatus.FAILED]
        while True:
            await asyncio.sleep(chance.uniform(0.02, 0.15))
            if self.engine.link.down or self.engine.link.stopped:
                continue
            table.advance(self.now)
            for run_id, row in list(table.rows.items()):
                if chance.random() >= self.plan.executes * 0.2:
                    continue
                match row["status"]:
                    case RunStatus.QUEUED.value if table.start(run_id, self.now):
                        self._stepped(Step(0, self.buffer.now_us, "executor", "start", {}, None, (run_id,)))
                    case RunStatus.EXECUTING.value:
                        table.finish(run_id, chance.choice(ends), self.now)
                        self._stepped(Step(0, self.buffer.now_us, "executor", "finish", {}, row["status"], (run_id,)))
                    case _:
                        pass

    # --- what goes wrong -------------------------------------------------------------------------------------------

    async def _strike(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        self._befall(fault, fault.target % len(self._processes))

    def _befall(self, fault: Fault, place: int) -> None:
        process = self._processes[place]
        self.history.note(self.loop.time(), fault.kind, f"({process.name}) for {fault.lasts_s} s")
        buffer, engine = self.buffer, self.engine
        match fault.kind:
            case "buffer dies":
                buffer.fall()
                self._later(fault, buffer.link.rise)
            case "buffer stops":
                buffer.link.stop()
                self._later(fault, buffer.link.resume)
            case "buffer is full":
                buffer.full = True
                self._later(fault, self._make_room)
            case "engine dies":
                engine.link.fall()
                self._later(fault, engine.link.rise)
            case "engine stops":
                engine.link.stop()
                self._later(fault, engine.link.resume)
            case "process dies":
                process.kill()
                self._later(fault, self._restart, place, process)
            case "process ends":
                self._end(fault, place, process)
            case "process stops":
                process.stop()
                self._later(fault, process.go_on)
            case "an entry is spoilt":
                self._spoil()
            case "the flag flips":
                self._global_flags = {ORG_FLAG: not self._global_flags[ORG_FLAG]}
            case "settings change":
                process.settings = self.plan.changed_settings

    def _end(self, fault: Fault, place: int, process: Process) -> None:
        """Have a process stop as it does on SIGTERM, for as long as it is given, and another take its place."""
        stops, ending = process.stops, process.end(int(fault.lasts_s * 1000))

        def gone() -> None:
            if ending is not None and process.stops == stops and not process.is_dead:
                self.watch.ended(process, ending)
            process.kill()
            self._restart(place, process)

        self.loop.outside(fault.lasts_s + _UNWIND_S, gone)

    def _later(self, fault: Fault, callback: Any, *args: Any) -> None:
        self.loop.outside(fault.lasts_s, callback, *args)

    def _make_room(self) -> None:
        self.buffer.full = False

    def _restart(self, place: int, dead: Process) -> None:
        if self._processes[place] is dead:
            life = 1 + sum(
                process.name.split(".")[0] == dead.name.split(".")[0] for process in self.watch.facts.processes
            )
            self._processes[place] = self._started(place, dead.settings, life)
            self.history.note(self.loop.time(), "starts", self._processes[place].name)

    def _spoil(self) -> None:
        """Make the payload of a queued entry something that nobody can read."""
        hashes = self.buffer.store.hashes
        queued = [key for key, fields in hashes.items() if ":entry:" in key and fields["state"] == b"QUEUED"]
        if queued:
            key = queued[int(self.chance.random() * len(queued))]
            hashes[key]["payload"] = b"\xc1"
            run_id = key.rsplit(":", 1)[-1]
            self.watch.facts.spoilt.add(run_id)
            self.history.note(self.loop.time(), "spoilt", run_id)

    def _heal(self) -> None:
        """Put everything right: the rest is up to the system."""
        self.history.note(self.loop.time(), "all is well from here on")
        for link, weather in ((self.buffer.link, CALM), (self.engine.link, replace(CALM, latency_s=(0.0005, 0.004)))):
            link.clear(weather)
            link.rise()
            link.resume()
        self._make_room()
        for place, process in enumerate(self._processes):
            if process.is_dead:
                self._restart(place, process)
            elif process.frozen:
                process.go_on()


@contextmanager
def quiet() -> Generator[None]:
    """Keep the flow's log lines, thousands of expected faults, out of the way."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def play(
    seed: int, *, model: type[ScriptModel] = ScriptModel, facade: type[Mollifier] = Mollifier
) -> tuple[World, Violation | None]:
    """Play one seed; return its world and what was violated, if anything was."""
    world = World(plan_of(seed), model=model, facade=facade)
    with quiet():
        try:
            world.play()
        except Violation as violation:
            return world, violation
    return world, None
