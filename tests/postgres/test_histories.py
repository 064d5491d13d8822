"""Random histories of keys and pages against models that fit in the head."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mollifier.engine import Created, Existing
from mollifier.model import RunFilter
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.execution import Executor
from tests.postgres.support import START, Clock, execute, snapshot

histories = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Trigger(NamedTuple):
    """Trigger with one of two idempotency keys, one of two request keys, or neither."""

    key: str | None
    request: str | None
    lifetime_s: int


class Reset(NamedTuple):
    """Reset an idempotency key."""

    key: str


class Cancel(NamedTuple):
    """Cancel the newest run."""


class Fail(NamedTuple):
    """Execute the newest run, which fails."""


class Wait(NamedTuple):
    """Let time pass."""

    seconds: int


keys = st.sampled_from(["a", "b"])
steps = st.one_of(
    st.builds(Trigger, st.none() | keys, st.none() | keys, st.sampled_from([5, 1000])),
    st.builds(Reset, keys),
    st.builds(Cancel),
    st.builds(Fail),
    st.builds(Wait, st.sampled_from([1, 4, 5])),
)


class Bindings:
    """The model: which run each key is bound to, and until when."""

    def __init__(self) -> None:
        self.idempotency: dict[str, tuple[str, datetime]] = {}
        self.request: dict[str, tuple[str, datetime]] = {}

    def standing(self, step: Trigger, at: datetime) -> Existing | None:
        for by, key, bound in (
            ("request_key", step.request, self.request),
            ("idempotency_key", step.key, self.idempotency),
        ):
            if key is not None and key in bound and bound[key][1] > at:
                return Existing(bound[key][0], by=by)  # pyright: ignore[reportArgumentType]
        return None

    def bind(self, step: Trigger, run_id: str, until: datetime) -> None:
        if step.key is not None:
            self.idempotency[step.key] = (run_id, until)
        if step.request is not None:
            self.request[step.request] = (run_id, until)

    def free(self, run_id: str) -> None:
        self.idempotency = {key: bound for key, bound in self.idempotency.items() if bound[0] != run_id}


@histories
@given(history=st.lists(steps, min_size=3, max_size=25))
async def test_keys_answer_as_their_model_in_any_history(
    engine: PostgresRunEngine, database: Database, history: list[object]
) -> None:
    await execute(database, "TRUNCATE runs, procrastinate_jobs CASCADE")
    clock = Clock()
    executor = Executor(database, {}, clock=clock)
    model = Bindings()
    newest, open_runs = None, set[str]()
    for number, step in enumerate(history):
        match step:
            case Trigger(key, request, lifetime_s):
                until = clock.now + timedelta(seconds=lifetime_s)
                snap = snapshot(
                    created_at=clock.now,
                    idempotency_key=key,
                    idempotency_expires_at=until,
                    request_key=request,
                    request_key_expires_at=until,
                )
                expected = model.standing(step, clock.now)
                assert await engine.find_by_keys(snap) == expected
                (outcome,) = await engine.create_runs([snap])
                assert outcome == (expected or Created(snap.run_id))
                if expected is None:
                    model.bind(step, snap.run_id, until)
                    newest = snap.run_id
                    open_runs.add(snap.run_id)
            case Reset(key):
                bound = model.idempotency.pop(key, None)
                holder = bound[0] if bound is not None and bound[1] > clock.now else None
                assert await engine.reset_idempotency_key("env_ours", "echo", key, clock.now) == holder
            case Cancel() if newest is not None:
                await engine.cancel_run("env_ours", newest, clock.now)
                open_runs.discard(newest)
            case Fail() if newest is not None:
                await executor.execute(newest, job_id=number)
                if newest in open_runs:
                    model.free(newest)
                    open_runs.discard(newest)
            case Wait(seconds):
                clock.turn(seconds=seconds)
            case _:
                pass


@histories
@given(
    created=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([(), ("t",)])), max_size=12),
    page_size=st.integers(1, 5),
    tags=st.sampled_from([(), ("t",)]),
)
async def test_pages_show_every_run_once_forwards_and_backwards(
    engine: PostgresRunEngine,
    database: Database,
    created: list[tuple[int, tuple[str, ...]]],
    page_size: int,
    tags: tuple[str, ...],
) -> None:
    await execute(database, "TRUNCATE runs, procrastinate_jobs CASCADE")
    snaps = [snapshot(created_at=START + timedelta(seconds=moment), tags=own) for moment, own in created]
    await engine.create_runs(snaps)
    shown = [snap for snap in snaps if not tags or snap.tags]
    expected = [snap.run_id for snap in sorted(shown, key=lambda snap: (snap.created_at, snap.run_id), reverse=True)]

    page = await engine.list_runs("env_ours", RunFilter(page_size=page_size, tags=tags))
    assert page.previous is None
    forwards = [page]
    while page.next is not None:
        page = await engine.list_runs("env_ours", RunFilter(page_size=page_size, tags=tags, after=page.next))
        forwards.append(page)
    backwards = [page]
    while page.previous is not None:
        page = await engine.list_runs("env_ours", RunFilter(page_size=page_size, tags=tags, before=page.previous))
        backwards.insert(0, page)

    assert [run.id for page in forwards for run in page.runs] == expected
    assert [run.id for page in backwards for run in page.runs] == expected
    assert [page.runs for page in forwards] == [page.runs for page in backwards]
