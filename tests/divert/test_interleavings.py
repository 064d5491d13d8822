"""Any order of a drainer's, a caller's and a reader's steps: what was answered shows at once and for good, and nothing is overwritten."""

from __future__ import annotations

from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from mollifier import handover
from mollifier.facade import Mollifier
from mollifier.model import MetadataOperation, Run, RunStatus
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.runs import Runs
from tests.core.support import execute, expire_lease
from tests.divert.conftest import ENVIRONMENT, House
from tests.divert.turns import Turns, stepping

pytestmark = pytest.mark.leaves_keys

FIRST = datetime(2999, 1, 1, tzinfo=UTC)
INCREMENT = MetadataOperation(type="increment", key="n", value=b"1")
ENGINE_STEPS = (
    "create_held_runs",
    "carry_over",
    "get_run",
    "cancel_run",
    "add_tags",
    "change_metadata",
    "reschedule_run",
)
BUFFER_STEPS = ("get_entry", "patch", "mark", "pop", "ack", "requeue")


class Play:
    """One held run, and what its callers were told, with the steps between which they were."""

    def __init__(self, house: House, turns: Turns) -> None:
        self.house = house
        self.turns = turns
        self.engine = engine = PostgresRunEngine(house.database)
        self.mollifier = Mollifier(house.settings, engine=engine, tasks=PostgresTaskCatalog(house.database))
        assert self.mollifier.buffer is not None
        self.buffer = self.mollifier.buffer
        self.handle = self.mollifier.drain_handler()
        self.run_id = ""
        self.answered: list[tuple[int, str, Any]] = []
        self.reads: list[tuple[int, int, Run]] = []
        stepping(engine, turns, *ENGINE_STEPS)
        stepping(self.buffer, turns, *BUFFER_STEPS)

    def runs_of_a_process(self) -> Runs:
        """Return what changes runs in a process of its own: in one process, changes of one run wait for each other."""
        return Runs(self.engine, self.buffer, lambda: self.house.settings, self.house.clock)

    async def drain(self, *, lives: bool) -> None:
        """Pop what there is, create its run and settle it; one that does not live puts it back instead, its creation done."""
        entry = await self.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
        if entry is None:
            return
        await self.handle([entry])
        if not lives:
            await self.buffer.requeue(entry, attempts=0)
            return
        while await self.buffer.ack(entry) == "changed":
            current = await self.buffer.get_entry(entry.org_id, entry.run_id)
            assert current is not None
            if current.lease != entry.lease:
                return
            await self.handle([current])
            entry = current

    async def drain_after_losing_the_lease(self) -> None:
        """Create the run long after another drainer has been given its entry."""
        entry = await self.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)
        if entry is None:
            return
        await self._expire()
        await self.handle([entry])
        await self.buffer.ack(entry)

    async def _expire(self) -> None:
        keys = self.buffer.keyspace.of(ENVIRONMENT.org_id)
        redis = self.house.client
        if await execute(redis, "ZSCORE", keys.draining, self.run_id) is not None:
            await expire_lease(redis, keys, self.run_id)
            await self.buffer.reclaim_expired()

    async def change(self, tag: str) -> None:
        runs = self.runs_of_a_process()
        assert await runs.add_tags(ENVIRONMENT, self.run_id, [tag]) is not None
        self.answered.append((self.turns.step, "tag", tag))
        assert await runs.change_metadata(ENVIRONMENT, self.run_id, [INCREMENT]) is not None
        self.answered.append((self.turns.step, "count", 1))

    async def move(self) -> None:
        runs = self.runs_of_a_process()
        for days in (1, 2, 3):
            until = FIRST + timedelta(days=days)
            assert await runs.reschedule(ENVIRONMENT, self.run_id, until) is not None
            self.answered.append((self.turns.step, "until", until))

    async def cancel(self) -> None:
        run = await self.runs_of_a_process().cancel(ENVIRONMENT, self.run_id)
        assert run is not None
        assert run.status is RunStatus.CANCELED
        self.answered.append((self.turns.step, "cancelled", True))

    async def read(self) -> None:
        for _ in range(4):
            started = self.turns.step
            run = await self.mollifier.runs.get(ENVIRONMENT, self.run_id)
            assert run is not None, "a run that was accepted is not there"
            self.reads.append((started, self.turns.step, run))

    def check(self, started: int, run: Run) -> None:
        """What was answered before a read began is in what it read."""
        before = [(what, value) for step, what, value in self.answered if step <= started]
        assert {value for what, value in before if what == "tag"} <= set(run.snapshot.tags)
        assert sum(what == "count" for what, _ in before) <= count_of(run)
        moments = [value for what, value in before if what == "until"]
        if moments:
            assert run.snapshot.delayed_until is not None
            assert run.snapshot.delayed_until >= moments[-1]
        if ("cancelled", True) in before:
            assert run.status is RunStatus.CANCELED


def count_of(run: Run) -> int:
    return msgspec.json.decode(run.snapshot.metadata or b"{}").get("n", 0)


def seen(run: Run) -> tuple[Any, ...]:
    """What only grows."""
    cancelled = run.status is RunStatus.CANCELED
    return len(run.snapshot.tags), count_of(run), run.snapshot.delayed_until or FIRST, cancelled


@pytest.mark.parametrize("drainers", ["one", "two, the first puts it back", "two, the first loses its lease"])
@settings(
    max_examples=40,
    deadline=None,
    # A schedule is short as drawn; making it shorter still costs minutes on real servers.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(many=st.sampled_from([1, 2, handover.CHANGES_MANY]), data=st.data())
async def test_what_was_answered_shows_in_every_later_read_in_any_order_of_steps(
    *, holding: House, monkeypatch: pytest.MonkeyPatch, drainers: str, many: int, data: st.DataObject
) -> None:
    # An example that hypothesis breaks off leaves its entry under a lease.
    await execute(holding.client, "FLUSHALL")
    await holding.trip()
    monkeypatch.setattr(handover, "CHANGES_MANY", many)
    turns = Turns(lambda waiting: data.draw(st.sampled_from(waiting)))
    play = Play(holding, turns)
    cancels = data.draw(st.booleans())
    play.run_id = await holding.trigger(delay=timedelta(hours=1))
    actors = {"tags": play.change("a"), "reader": play.read(), "drainer": play.drain(lives=drainers == "one")}
    if cancels:
        actors["caller"] = play.cancel()
    else:
        actors |= {"moves": play.move(), "more tags": play.change("b")}
    if "lease" in drainers:
        actors["drainer"].close()
        actors["drainer"] = play.drain_after_losing_the_lease()
    if "two" in drainers:
        actors["next drainer"] = play.drain(lives=True)

    async with aclosing(play.mollifier):
        await turns.play(actors)

    for started, _, run in play.reads:
        play.check(started, run)
    for (_, ended, earlier), (started, _, later) in zip(play.reads, play.reads[1:], strict=False):
        assert ended <= started
        assert all(a <= b for a, b in zip(seen(earlier), seen(later), strict=True))
    await holding.drain()
    final = await holding.created(play.run_id)
    assert final is not None
    play.check(turns.step, final)
    assert count_of(final) == sum(what == "count" for _, what, _ in play.answered)
    assert await jobs_of(holding, play.run_id) == 0


async def jobs_of(house: House, run_id: str) -> int:
    query = "SELECT count(*) FROM procrastinate_jobs WHERE args->>'run_id' = :id"
    async with house.database.statement() as connection:
        return (await connection.execute(text(query), {"id": run_id})).scalar_one()
