"""Lists of runs of which some are held, and are created while somebody turns the pages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mollifier import listing, snapshots
from mollifier.buffer import Acceptance, Accepted, Buffer, HeldPlace
from mollifier.cursors import as_us, from_us
from mollifier.errors import MalformedEntryError
from mollifier.keys import Keyspace
from mollifier.model import Entry, EntryKind, Environment, Run, RunFilter, RunPage, RunProgress, RunStatus, Snapshot
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.runs import Runs
from mollifier.server import Server, connect
from tests.core.support import execute
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
Meddle = Callable[[], Coroutine[Any, Any, None]]

_environments = itertools.count()
_runs = itertools.count()


async def listed(house: House, *statuses: RunStatus) -> list[str]:
    page = await house.runs.list(ENVIRONMENT, RunFilter(statuses=statuses))
    return [run.id for run in page.runs]


async def test_a_held_run_that_was_cancelled_is_listed_as_cancelled_only(holding: House) -> None:
    cancelled, queued = await holding.trigger(), await holding.trigger()

    await holding.runs.cancel(ENVIRONMENT, cancelled)

    assert await listed(holding, RunStatus.QUEUED) == [queued]
    assert await listed(holding, RunStatus.CANCELED) == [cancelled]
    await holding.drain()
    assert await listed(holding, RunStatus.QUEUED) == [queued]
    assert await listed(holding, RunStatus.CANCELED) == [cancelled]


# --- a place of one's own ------------------------------------------------------------------------------------------


def another_environment() -> Environment:
    return replace(ENVIRONMENT, id=f"env_{next(_environments)}")


def snapshot(environment: Environment, moment_us: int, **fields: Any) -> Snapshot:
    """A trigger so many microseconds after noon; ids do not come in the order of the moments."""
    number = next(_runs)
    return Snapshot(
        run_id=f"run_{number * 7919 % 10_000:04}_{number}",
        org_id=environment.org_id,
        env_id=environment.id,
        task_id="echo",
        created_at=NOON + timedelta(microseconds=moment_us),
        **fields,
    )


async def hold(house: House, held: Sequence[Snapshot]) -> None:
    entries = [
        Acceptance(
            run_id=snap.run_id,
            env_id=snap.env_id,
            org_id=snap.org_id,
            payload=snapshots.encode(snap),
            kind=EntryKind.HELD,
            created_us=as_us(snap.created_at),
        )
        for snap in held
    ]
    assert all(isinstance(outcome, Accepted) for outcome in await house.buffer.accept_many(entries))


async def drain(house: House, environment: Environment, number: int) -> list[str]:
    """Create the runs of so many entries and settle them; return their ids."""
    drained: list[str] = []
    for _ in range(number):
        entry = await house.buffer.pop(environment.org_id, environment.id)
        if entry is not None:
            assert await house.mollifier.drain_handler()([entry]) == [None]
            assert await house.buffer.ack(entry) == "held"
            drained.append(entry.run_id)
    return drained


def newest_first(made: Sequence[Snapshot]) -> list[str]:
    return [snap.run_id for snap in sorted(made, key=lambda snap: (snap.created_at, snap.run_id), reverse=True)]


async def turn_pages(runs: Runs, environment: Environment, query: RunFilter, between: Meddle) -> list[RunPage]:
    """Read every page from the newest on."""
    pages = [await runs.list(environment, query)]
    while pages[-1].next is not None:
        await between()
        pages.append(await runs.list(environment, replace(query, after=pages[-1].next)))
        assert len(pages) < 100
    return pages


async def turn_back(runs: Runs, environment: Environment, query: RunFilter, last: RunPage) -> list[RunPage]:
    """Read every page from before the last one up to the newest."""
    pages = [last]
    while pages[-1].previous is not None:
        pages.append(await runs.list(environment, replace(query, before=pages[-1].previous)))
        assert len(pages) < 100
    return pages


def ids(pages: Sequence[RunPage]) -> list[str]:
    return [run.id for page in pages for run in page.runs]


class MeddlingEngine(PostgresRunEngine):
    """Lets something happen before it answers."""

    meddle: Meddle

    async def list_runs(self, env_id: str, query: RunFilter) -> RunPage:
        await self.meddle()
        return await super().list_runs(env_id, query)

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        await self.meddle()
        return await super().get_progress(env_id, run_ids)


class MeddlingBuffer(Buffer):
    """Lets something happen before it answers."""

    meddle: Meddle
    entries_read = 0

    async def held_places(self, *args: Any, **options: Any) -> list[HeldPlace]:
        await self.meddle()
        return await super().held_places(*args, **options)

    async def get_entries(self, org_id: str, run_ids: Sequence[str]) -> list[Entry | MalformedEntryError | None]:
        await self.meddle()
        self.entries_read += len(run_ids)
        return await super().get_entries(org_id, run_ids)


class Meddled:
    """The house's lists, with somebody draining at any moment: `steps` says how many entries, each time there is an occasion."""

    def __init__(self, house: House, environment: Environment, steps: Sequence[int] = ()) -> None:
        self._house = house
        self._environment = environment
        self._steps = iter(steps)
        self._redis = connect(house.settings.redis_url or "")
        self.cancels = False
        self.cancelled: set[str] = set()
        engine = MeddlingEngine(house.database)
        engine.meddle = self.step
        self.buffer = MeddlingBuffer(Server(self._redis), lambda: house.settings)
        self.buffer.meddle = self.step
        self.runs = Runs(engine, self.buffer, lambda: house.settings, house.clock)

    async def step(self) -> None:
        drained = await drain(self._house, self._environment, next(self._steps, 0))
        if self.cancels:
            for run_id in drained:
                await self._house.engine.cancel_run(self._environment.id, run_id, self._house.clock())
            self.cancelled.update(drained)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()


made = st.lists(
    st.tuples(
        st.integers(0, 3) | st.sampled_from([999, 1000, 1001, 2000]),
        st.booleans(),
        st.sampled_from(["a", "b"]),
    ),
    max_size=14,
)
"""Of each run the microsecond, whether it is held, and its tag."""
steps = st.lists(st.integers(0, 3), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=made, steps=steps, page_size=st.integers(1, 4), tag=st.none() | st.just("a"), cancels=st.booleans())
async def test_pages_show_every_run_once_while_runs_are_created_between_and_during_them(
    house: House, *, plan: list[tuple[int, bool, str]], steps: list[int], page_size: int, tag: str | None, cancels: bool
) -> None:
    environment = another_environment()
    all_made = [(snapshot(environment, moment_us, tags=(label,)), is_held) for moment_us, is_held, label in plan]
    await house.engine.create_runs([snap for snap, is_held in all_made if not is_held])
    await hold(house, [snap for snap, is_held in all_made if is_held])
    shown = newest_first([snap for snap, _ in all_made if tag is None or tag in snap.tags])
    query = RunFilter(page_size=page_size, tags=(tag,) if tag else (), statuses=(RunStatus.QUEUED,) if cancels else ())

    async with Meddled(house, environment, steps) as meddled:
        meddled.cancels = cancels
        pages = await turn_pages(meddled.runs, environment, query, meddled.step)

        seen = ids(pages)
        assert len(seen) == len(set(seen))
        # What was cancelled on the way was shown or not, as it was when the page came to it; everything else is there, in order.
        assert [run_id for run_id in seen if run_id not in meddled.cancelled] == [
            run_id for run_id in shown if run_id not in meddled.cancelled
        ]
        assert set(seen) <= set(shown)
        back = await turn_back(meddled.runs, environment, query, pages[-1])
        assert [run_id for run_id in ids(back[::-1]) if run_id not in meddled.cancelled] == [
            run_id for run_id in seen if run_id not in meddled.cancelled
        ]
    await drain(house, environment, len(plan))


async def test_a_filter_finds_what_lies_deep_among_the_held(house: House) -> None:
    environment = another_environment()
    snaps = [snapshot(environment, number, tags=("rare",) if number in (0, 300) else ()) for number in range(600)]
    await hold(house, snaps)

    page = await house.runs.list(environment, RunFilter(tags=("rare",)))

    assert [run.id for run in page.runs] == [snaps[300].run_id, snaps[0].run_id]
    assert page.next is None


async def test_a_page_reads_no_more_entries_than_it_needs(house: House) -> None:
    environment = another_environment()
    await hold(house, [snapshot(environment, number) for number in range(200)])

    async with Meddled(house, environment) as meddled:
        await meddled.runs.list(environment, RunFilter(page_size=10))

    assert meddled.buffer.entries_read == 11


async def test_a_span_of_time_keeps_the_buffer_from_being_read_outside_it(house: House) -> None:
    environment = another_environment()
    snaps = [snapshot(environment, number) for number in range(100)]
    await hold(house, snaps)
    query = RunFilter(
        created_from=snaps[10].created_at, created_to=snaps[12].created_at, statuses=(RunStatus.QUEUED,), page_size=2
    )

    async with Meddled(house, environment) as meddled:
        pages = await turn_pages(meddled.runs, environment, query, meddled.step)

    assert ids(pages) == newest_first(snaps[10:13])
    assert meddled.buffer.entries_read < 10


async def test_a_search_that_reads_very_much_leads_on_from_where_it_was(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_READ_MAX", 40)
    monkeypatch.setattr(listing, "_CHUNK_MAX", 10)
    environment = another_environment()
    snaps = [snapshot(environment, number, tags=("rare",) if number in (3, 90) else ()) for number in range(100)]
    created = [snapshot(environment, number, tags=("rare",)) for number in (1, 80, 200)]
    await hold(house, snaps)
    await house.engine.create_runs(created)
    query = RunFilter(tags=("rare",))

    async def nothing() -> None:
        pass

    pages = await turn_pages(house.runs, environment, query, nothing)
    assert ids(pages) == newest_first([snaps[3], snaps[90], *created])
    assert len(pages) > 1
    back = await turn_back(house.runs, environment, query, pages[-1])
    assert ids(back[::-1]) == ids(pages)


async def test_entries_that_cannot_be_read_break_no_list_and_hide_nothing(house: House) -> None:
    environment = another_environment()
    snaps = [snapshot(environment, number) for number in range(8)]
    await hold(house, snaps)
    keys = Keyspace(house.settings.partitions).of(environment.org_id)
    redis = connect(house.settings.redis_url or "")
    await execute(redis, "HSET", keys.entry(snaps[1].run_id), "accepted_ms", "soon")
    await execute(redis, "HSET", keys.entry(snaps[2].run_id), "payload", b"\xc1")
    await execute(redis, "HSET", keys.entry(snaps[3].run_id), "patches", "1", "patch:0", b"\xc1")
    await execute(redis, "DEL", keys.entry(snaps[4].run_id))
    await execute(redis, "SET", keys.entry(snaps[4].run_id), "no hash")
    await execute(redis, "HDEL", keys.entry(snaps[5].run_id), "payload")
    await execute(redis, "HSET", keys.entry(snaps[6].run_id), "state", "LOST")
    await redis.aclose()

    async def nothing() -> None:
        pass

    pages = await turn_pages(house.runs, environment, RunFilter(page_size=1), nothing)

    assert ids(pages) == newest_first([snaps[0], snaps[7]])


async def test_a_list_carries_no_payloads_whichever_store_a_run_is_in(house: House) -> None:
    environment = another_environment()
    heavy = {"payload": b'"x"', "context": b"1", "metadata": b"{}"}
    held, created = snapshot(environment, 1, **heavy), snapshot(environment, 0, **heavy)
    await hold(house, [held])
    await house.engine.create_runs([created])

    page = await house.runs.list(environment, RunFilter())

    light = {"payload": b"", "context": None}
    assert [run.snapshot for run in page.runs] == [replace(held, **light), replace(created, **light)]


# --- merging, without a store --------------------------------------------------------------------------------------


def as_run(environment: Environment, moment_us: int) -> Run:
    snap = snapshot(environment, moment_us)
    return Run(snapshot=snap, status=RunStatus.QUEUED, updated_at=snap.created_at)


def test_a_page_that_is_exactly_full_with_held_runs_is_the_last() -> None:
    runs = [as_run(ENVIRONMENT, number) for number in (2, 1)]

    page = listing.merge(RunPage(runs=()), listing.HeldRuns(tuple(runs)), RunFilter(page_size=2))

    assert (page.runs, page.next, page.previous) == (tuple(runs), None, None)


@given(st.integers(-(2**52), 2**52))
def test_moments_and_microseconds_are_the_same(moment_us: int) -> None:
    assert as_us(from_us(moment_us)) == moment_us
