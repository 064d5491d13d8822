"""The run engine as one process reaches it: tables in memory at the end of a way on which messages are lost.

A statement that commits by itself is done when it arrives, however long its sender has given it up. A transaction is done when its commit
arrives, which its sender sends only while it still waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from mollifier.engine import CreateOutcome, Creation, Ending, Existing
from mollifier.errors import EngineUnavailableError, FieldError, InvalidRequestError
from mollifier.model import (
    MetadataOperation,
    Run,
    RunFilter,
    RunPage,
    RunProgress,
    RunStatus,
    Snapshot,
)
from mollifier.patches import Patch
from tests.model.batch_table import BatchTable
from tests.model.engine import MemoryRunEngine
from tests.model.runs import RunTable
from tests.simulation.history import History, Step, current_call
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Cut, Link, Part, Silence
from tests.simulation.server import START_US

T = TypeVar("T")

POISON = b"poison"
"""The payload of a run that the engine can never hold, not even as failed."""
STUBBORN = b"stubborn"
"""The payload of a run whose creation always fails, though it could be recorded as failed."""
FLAKY = b"flaky"
"""The payload of a run whose creation fails at first."""
_FLAKES = 2
_HANDOVERS = {"create_held_runs", "carry_over"}


class EngineServer:
    """The tables, at the moments at which requests arrive; tells of every change."""

    def __init__(self, loop: VirtualLoop, link: Link, on_step: Callable[[Step], None]) -> None:
        self.link = link
        self.runs = RunTable()
        self.batches = BatchTable()
        self._loop = loop
        self._on_step = on_step
        self._flakes: dict[str, int] = {}

    def do(self, by: str, what: str, runs: Sequence[str], args: Mapping[str, Any], operation: Callable[[], T]) -> T:
        """Carry out one transaction of one process."""
        reply: Any = None
        try:
            reply = operation()
        except Exception as error:
            reply = error
            raise
        finally:
            at_us = START_US + int(self._loop.time() * 1_000_000)
            self._on_step(Step(0, at_us, by, what, args, reply, tuple(runs)))
        return reply

    def create(self, creations: Sequence[Creation], now: datetime) -> Sequence[CreateOutcome]:
        """Create runs, all or none, unless one of them is of a kind that the engine refuses."""
        for creation in creations:
            self._refuse(creation)
        return self.runs.create(creations, now)

    def _refuse(self, creation: Creation) -> None:
        snapshot = creation.snapshot
        if snapshot.payload == POISON:
            raise InvalidRequestError(FieldError("body", "holds a value that cannot be stored"))
        if creation.ending is not None and creation.ending.status is RunStatus.SYSTEM_FAILURE:
            return
        flakes = self._flakes.get(snapshot.run_id, 0)
        if snapshot.payload == STUBBORN or (snapshot.payload == FLAKY and flakes < _FLAKES):
            self._flakes[snapshot.run_id] = flakes + 1
            raise RuntimeError("the row cannot be written now")


class SimulatedEngine(MemoryRunEngine):
    """Implements `RunEngine` for one process, over its way to the engine's server."""

    def __init__(
        self, server: EngineServer, process: str, clock: Callable[[], datetime], history: History, deadline_ms: int
    ) -> None:
        super().__init__(clock, server.runs, server.batches)
        self.deadline_ms = deadline_ms
        self._server = server
        self._process = process
        self._history = history

    # --- creating --------------------------------------------------------------------------------------------------

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[CreateOutcome]:
        creations = [Creation(snapshot=snapshot) for snapshot in snapshots]
        return await self._create("create_runs", creations, is_transaction=len(creations) > 1)

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        return await self._create("create_held_runs", creations, is_transaction=True)

    async def _create(
        self, what: str, creations: Sequence[Creation], *, is_transaction: bool
    ) -> Sequence[CreateOutcome]:
        runs = [creation.snapshot.run_id for creation in creations]
        args = {"creations": creations, "ended": [_ended(creation.ending) for creation in creations]}
        now = self.clock()
        before = [lambda: None] if is_transaction else []
        return await self._ask(what, runs, args, lambda: self._server.create(creations, now), before=before)

    async def carry_over(self, env_id: str, run_id: str, changes: Sequence[Patch]) -> Run | None:
        args = {"changes": len(changes)}
        return await self._change(
            "carry_over", run_id, args, lambda now: self.runs.carry_over(env_id, run_id, changes, now)
        )

    # --- reading ---------------------------------------------------------------------------------------------------

    async def find_by_keys(self, snapshot: Snapshot) -> Existing | None:
        return (await self.find_by_keys_many([snapshot]))[0]

    async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
        return await self._read(lambda now: [self.runs.find(snapshot) for snapshot in snapshots])

    async def get_run(self, env_id: str, run_id: str) -> Run | None:
        return await self._read(lambda now: self.runs.get(env_id, run_id, now))

    async def get_runs(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, Run]:
        return await self._read(lambda now: self.runs.get_many(env_id, run_ids, now))

    async def get_children(self, env_id: str, run_id: str, limit: int) -> Sequence[str]:
        return await self._read(lambda now: self.runs.children(env_id, run_id)[:limit])

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        return await self._read(lambda now: self.runs.progress(env_id, run_ids, now))

    async def list_runs(self, env_id: str, query: RunFilter) -> RunPage:
        return await self._read(lambda now: self.runs.page(env_id, query, now))

    # --- changing --------------------------------------------------------------------------------------------------

    async def cancel_run(self, env_id: str, run_id: str, at: datetime) -> Run | None:
        return await self._change("cancel_run", run_id, {}, lambda now: self.runs.cancel(env_id, run_id, at, now))

    async def add_tags(self, env_id: str, run_id: str, tags: Sequence[str]) -> Run | None:
        return await self._change("add_tags", run_id, {}, lambda now: self.runs.add_tags(env_id, run_id, tags, now))

    async def change_metadata(self, env_id: str, run_id: str, operations: Sequence[MetadataOperation]) -> Run | None:
        return await self._change(
            "change_metadata", run_id, {}, lambda now: self.runs.change_metadata(env_id, run_id, operations, now)
        )

    async def reschedule_run(self, env_id: str, run_id: str, delay: timedelta | datetime, at: datetime) -> Run | None:
        return await self._change(
            "reschedule_run", run_id, {}, lambda now: self.runs.reschedule(env_id, run_id, delay, at, now)
        )

    async def reset_idempotency_key(
        self, env_id: str, task_id: str, key: str, at: datetime, *, run_id: str | None = None
    ) -> str | None:
        args = {"env_id": env_id, "key": key}
        return await self._ask("reset_key", [], args, lambda: self.runs.reset(env_id, task_id, key, at, run_id))

    # --- the way ---------------------------------------------------------------------------------------------------

    async def _change(
        self, what: str, run_id: str, args: Mapping[str, Any], operation: Callable[[datetime], Run | None]
    ) -> Run | None:
        """Change a run in a transaction: it reads the run first, and without one has nothing to commit."""
        now = self.clock()
        found: list[bool] = []

        def commit() -> Run | None:
            return operation(now) if found[0] else None

        first = [lambda: found.append(run_id in self.runs.rows)]
        return await self._ask(what, [run_id], args, commit, before=first)

    def _later(self, operation: Callable[[datetime], T]) -> Callable[[], T]:
        """Have an operation use the clock as it is when it is asked for."""
        now = self.clock()
        return lambda: operation(now)

    async def _read(self, operation: Callable[[datetime], T]) -> T:
        return await self._reach(self._later(operation))

    async def _ask(
        self,
        what: str,
        runs: Sequence[str],
        args: Mapping[str, Any],
        operation: Callable[[], T],
        *,
        before: Sequence[Part] = (),
    ) -> T:
        try:
            return await self._reach(lambda: self._server.do(self._process, what, runs, args, operation), before=before)
        except EngineUnavailableError:
            raise
        except Exception:
            if what in _HANDOVERS and len(runs) == 1:
                self._history.failures[runs[0]] += 1
            raise

    async def _reach(self, part: Callable[[], T], *, before: Sequence[Part] = ()) -> T:
        """Have what comes before the commit done, in a round trip each, then the commit, if whoever asks still waits for it."""
        call, link, loop = current_call.get(), self._server.link, asyncio.get_running_loop()
        began_s = loop.time()
        is_sent = False
        try:
            async with asyncio.timeout(self.deadline_ms / 1000):
                for one in before:
                    await link.ask(one)
                    is_sent = True
                return await link.ask(part)
        except (Cut, Silence, TimeoutError) as error:
            if call is not None:
                call.engine_faults += 1
            unsent = isinstance(error, Cut) and error.unsent and not is_sent
            raise EngineUnavailableError(f"the engine cannot be reached: {error}", unsent=unsent) from error
        finally:
            if call is not None:
                call.engine_s += loop.time() - began_s


def _ended(ending: Ending | None) -> str:
    return "" if ending is None else ending.status.value
