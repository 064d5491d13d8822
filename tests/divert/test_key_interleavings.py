"""Any order of the steps of triggers and resets of one key, and of those who drain: it is as if each had happened at one moment.

Between two resets the key has one run, and each trigger is told of that one; after a reset the next trigger makes another. No run that a
caller was told of ends in any other way for its key.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import aclosing
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import text

from mollifier.errors import EngineUnavailableError
from mollifier.facade import Mollifier
from mollifier.model import Entry, RunStatus, TriggerRequest
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.runs import Runs
from tests.core.support import execute, expire_lease
from tests.divert.conftest import ENVIRONMENT, House
from tests.divert.turns import Turns, stepping

pytestmark = pytest.mark.leaves_keys

# A few seconds' worth; a change to how keys are bound or freed is worth some thousands.
HISTORIES = int(os.environ.get("MOLLIFIER_KEY_HISTORIES", "30"))
ENGINE_STEPS = ("create_runs", "create_held_runs", "carry_over", "find_by_keys_many", "reset_idempotency_key")
BUFFER_STEPS = (
    "claim_many",
    "accept_many",
    "release",
    "bound_run",
    "get_entry",
    "patch",
    "pop",
    "ack",
    "requeue",
)
KEYS = itertools.count()
UNFLAGGED = replace(ENVIRONMENT, org_flags={})
"""The environment as it is when its organization's flag is off: its triggers are created."""

Told = tuple[str, bool] | bool | None
"""What an operation was answered: a trigger with its run and whether that was there, a reset with whether there was one; None: nothing."""


class Operation(msgspec.Struct):
    """One trigger or reset, between the step after which it began and the one at which its answer came."""

    what: str
    started: int
    ended: float = float("inf")
    told: Told = None


class Play:
    """One key, what is done with it, and what that was answered."""

    def __init__(self, house: House, turns: Turns) -> None:
        self.house = house
        self.turns = turns
        self.key = f"key {next(KEYS)}"
        self.mollifier = Mollifier(
            lambda: house.settings, engine=self.engine(), tasks=PostgresTaskCatalog(house.database)
        )
        assert self.mollifier.buffer is not None
        self.buffer = self.mollifier.buffer
        self.handle = self.mollifier.drain_handler()
        self.history: list[Operation] = []
        stepping(self.buffer, turns, *BUFFER_STEPS)

    def engine(self) -> PostgresRunEngine:
        engine = PostgresRunEngine(self.house.database)
        stepping(engine, self.turns, *ENGINE_STEPS)
        return engine

    async def call(self, *operations: str) -> None:
        for what in operations:
            operation = Operation(what, self.turns.step)
            self.history.append(operation)
            operation.told = await (self._reset(what) if what.startswith("reset") else self._trigger(what))
            # Of one that failed nobody knows whether and when it happened.
            if operation.told is not None:
                operation.ended = self.turns.step

    async def _trigger(self, what: str) -> tuple[str, bool]:
        request = TriggerRequest(task_id="echo", payload=b"1", idempotency_key=self.key)
        environment = ENVIRONMENT if what == "held" else UNFLAGGED
        result = (await self.mollifier.triggers.trigger(environment, request)).result
        return result.run_id, result.is_cached

    async def _reset(self, what: str) -> bool | None:
        """Reset the key in a process of its own, whose engine is away when asked for the nth time: `reset, away at <n>`."""
        engine = self.engine()
        if "away" in what:
            _away_at(engine, int(what.rpartition(" ")[2]))
        runs = Runs(engine, self.buffer, lambda: self.house.settings, self.house.clock)
        try:
            return await runs.reset_idempotency_key(ENVIRONMENT, "echo", self.key)
        except EngineUnavailableError:
            return None

    async def drain(self, *, how: str) -> None:
        """Create up to two runs and settle their entries: `puts back` the first instead, or `loses its lease` of it before it creates."""
        for number in range(2):
            entry = await self.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
            if entry is None:
                continue
            if how == "loses its lease" and number == 0:
                await self._expire(entry)
            assert await self.handle([entry]) == [None]
            if how == "puts back" and number == 0:
                await self.buffer.requeue(entry, attempts=0)
            else:
                await self._settle(entry)

    async def _settle(self, entry: Entry) -> None:
        lease = entry.lease
        while await self.buffer.ack(entry) == "changed":
            current = await self.buffer.get_entry(entry.org_id, entry.run_id)
            assert current is not None
            if current.lease != lease:
                return
            assert await self.handle([current]) == [None]
            entry = current

    async def _expire(self, entry: Entry) -> None:
        await expire_lease(self.house.client, self.buffer.keyspace.of(entry.org_id), entry.run_id)
        await self.buffer.reclaim_expired()

    async def statuses(self) -> dict[str, str]:
        query = "SELECT id, status FROM runs WHERE idempotency_key = :key"
        async with self.house.database.statement() as connection:
            found = await connection.execute(text(query), {"key": self.key})
        return {row.id: row.status for row in found}


def _away_at(engine: PostgresRunEngine, nth: int) -> None:
    """Have the engine be away for its nth call."""
    calls = itertools.count(1)

    def losing(method: Callable[..., Any]) -> Callable[..., Any]:
        async def asked(*args: Any, **options: Any) -> Any:
            if next(calls) == nth:
                raise EngineUnavailableError("away", unsent=True)
            return await method(*args, **options)

        return asked

    for name in ENGINE_STEPS:
        setattr(engine, name, losing(getattr(engine, name)))


def is_sequence(history: Sequence[Operation]) -> bool:
    """Return whether the operations can have happened one after the other, each between its start and its end, with these answers.

    By search (Wing and Gong, "Testing and Verifying Concurrent Objects"): whichever operation began before the first of the others
    ended may be the next one. One without an answer may have happened, at any time after its start, or not.
    """
    dead: set[tuple[frozenset[int], str | None]] = set()
    rivals = [_has_rival(history, index) for index in range(len(history))]

    def goes_on(left: frozenset[int], bound: str | None) -> bool:
        if all(history[index].told is None for index in left):
            return True
        if (left, bound) in dead:
            return False
        for index in left:
            others = left - {index}
            if all(history[index].started < history[other].ended for other in others):
                for after in _follows(history[index], bound, rivals[index]):
                    if goes_on(others, after):
                        return True
        dead.add((left, bound))
        return False

    return goes_on(frozenset(range(len(history))), None)


def _has_rival(history: Sequence[Operation], index: int) -> bool:
    """Return whether another reset was under way at the same moment: more than one may find that the key was held."""
    one = history[index]
    others = (other for other in history if other is not one and other.what.startswith("reset"))
    return any(other.started < one.ended and one.started < other.ended for other in others)


def _follows(operation: Operation, bound: str | None, has_rival: bool) -> Sequence[str | None]:
    """Return what the key may be bound to after the operation, given what it was bound to before it; nothing if its answer denies that."""
    match operation.told:
        case (run_id, is_cached):
            return [run_id] if (bound == run_id if is_cached else bound is None) else []
        case bool(held):
            return [None] if held == (bound is not None) or (held and has_rival) else []
        case None:
            return [None]


CALLS = st.lists(
    st.sampled_from(["held", "held", "created", "reset", "reset", *(f"reset, away at {nth}" for nth in (1, 2, 3))]),
    min_size=1,
    max_size=3,
)
DRAINERS = st.lists(st.sampled_from(["settles", "puts back", "loses its lease"]), min_size=1, max_size=2)


@settings(
    max_examples=HISTORIES,
    deadline=None,
    # A schedule is short as drawn; making it shorter still costs minutes on real servers.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(callers=st.lists(CALLS, min_size=2, max_size=3), drainers=DRAINERS, seed=st.integers(0, 2**32))
async def test_triggers_and_resets_of_a_key_happen_one_after_the_other_in_any_order_of_steps(
    holding: House, callers: Sequence[Sequence[str]], drainers: Sequence[str], seed: int
) -> None:
    # An example that hypothesis breaks off leaves its entry under a lease.
    await execute(holding.client, "FLUSHALL")
    await holding.trip()
    turns = Turns(Random(seed).choice)
    play = Play(holding, turns)

    async with aclosing(play.mollifier):
        await turns.play({"first": play.call("held")})
        actors = {f"caller {number}": play.call(*calls) for number, calls in enumerate(callers)}
        actors |= {f"drainer {number}": play.drain(how=how) for number, how in enumerate(drainers)}
        await turns.play(actors)
        await turns.play({"last": play.call("held")})
        await holding.hand_over()
        await turns.play({"very last": play.call("held")})

    assert is_sequence(play.history), "\n".join(map(str, play.history))
    told = {operation.told[0] for operation in play.history if isinstance(operation.told, tuple)}
    assert await play.statuses() == dict.fromkeys(told, RunStatus.QUEUED)
