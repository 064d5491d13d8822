"""The span of a drained entry: in its caller's trace, around all that is done with the entry, however that ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from opentelemetry.trace import StatusCode
from redis.asyncio import Redis

from mollifier import snapshots
from mollifier.buffer import Buffer
from mollifier.engine import CreateOutcome, Creation, RunEngine
from mollifier.errors import EngineUnavailableError, FieldError, InvalidRequestError, NonRetryableError
from mollifier.facade import Mollifier
from mollifier.model import EntryKind, Snapshot
from tests.core.engines import AnyTask, MemoryEngine
from tests.core.observed import Observed
from tests.core.support import ENV, ORG, SETTINGS, hold, until

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = (TRACE_ID, CALLER_ID)
REFUSAL = InvalidRequestError(FieldError("options.queue", "no such queue"))


class HoldingEngine(MemoryEngine):
    """Creates held runs as it creates others, and notes which spans are open while it does; `faults` says what a creation fails of."""

    def __init__(self, observed: Observed) -> None:
        super().__init__()
        self.faults: Callable[[Creation], Exception | None] = lambda _: None
        self.hangs = False
        self.seen: list[list[Any]] = []
        self._observed = observed

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        self.seen.append(self._observed.open_spans())
        if self.hangs:
            await asyncio.Event().wait()
        for creation in creations:
            if (fault := self.faults(creation)) is not None:
                raise fault
        return await self.create_runs([creation.snapshot for creation in creations])


class House:
    """A drainer's surroundings: a buffer on a real server, an engine in memory, and what was traced."""

    def __init__(self, redis: Redis) -> None:
        self.observed = Observed()
        self.engine = HoldingEngine(self.observed)
        self.mollifier = Mollifier(
            SETTINGS,
            engine=cast("RunEngine", self.engine),
            tasks=AnyTask(),
            redis=redis,
            telemetry=self.observed.telemetry,
            jitter=lambda: 0.0,
        )

    @property
    def buffer(self) -> Buffer:
        assert self.mollifier.buffer is not None
        return self.mollifier.buffer

    async def hold(self, *run_ids: str, kind: EntryKind = EntryKind.HELD) -> None:
        for run_id in run_ids:
            snapshot = Snapshot(
                run_id=run_id,
                org_id=ORG,
                env_id=ENV,
                task_id="task",
                created_at=datetime(2030, 1, 1, tzinfo=UTC),
                traceparent=f"00-{TRACE_ID}-{CALLER_ID}-01",
                tracestate="vendor=1",
            )
            await hold(self.buffer, run_id, kind=kind, payload=snapshots.encode(snapshot))

    async def drain(self) -> None:
        """Drain until nothing is left but dead letters."""
        drainer = self.mollifier.drainer()
        drainer.start()
        await until(self._is_drained)
        await drainer.stop()

    async def _is_drained(self) -> bool:
        counts = await self.buffer.counts()
        return counts.left == counts.failed


@pytest.fixture
async def house(redis_client: Redis) -> AsyncIterator[House]:
    house = House(redis_client)
    yield house
    assert house.observed.open_spans() == []
    await house.mollifier.aclose()


def parent_of(span: Any) -> tuple[str, str] | None:
    return span.parent and (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}")


def told(span: Any) -> tuple[str, int, str | None]:
    """What the span says of its entry: its name, the attempts, and the error if it has one."""
    status = span.status
    assert (status.status_code is StatusCode.ERROR) == (status.description is not None)
    assert span.attributes["mollifier.dwell_ms"] >= 0
    return span.name, span.attributes["mollifier.attempts"], status.description


@pytest.mark.parametrize("kind", EntryKind)
async def test_the_span_of_a_drained_entry_continues_the_triggers_trace_and_tells_how_long_it_was_held(
    kind: EntryKind, house: House
) -> None:
    await house.hold("run_1", kind=kind)

    await house.drain()

    (span,) = house.observed.spans()
    assert parent_of(span) == CALLER
    assert span.context.trace_state.to_header() == "vendor=1"
    assert span.attributes.keys() == {"mollifier.run_id", "mollifier.dwell_ms", "mollifier.attempts"}
    assert span.attributes["mollifier.run_id"] == "run_1"
    assert told(span) == ("mollifier.drain", 1, None)


async def test_the_runs_of_a_batch_are_created_while_the_span_of_each_is_open(house: House) -> None:
    await house.hold("run_1", "run_2")

    await house.drain()

    assert [[span.attributes["mollifier.run_id"] for span in seen] for seen in house.engine.seen] == [
        ["run_1", "run_2"]
    ]
    assert [told(span) for span in house.observed.spans()] == [("mollifier.drain", 1, None)] * 2


async def test_every_attempt_has_a_span_and_one_that_failed_says_of_what(house: House) -> None:
    await house.hold("run_1")
    faults: list[Exception | None] = [RuntimeError("no room today"), None]
    house.engine.faults = lambda _: faults.pop(0)

    await house.drain()

    assert [told(span) for span in house.observed.spans()] == [
        ("mollifier.drain", 1, "RuntimeError: no room today"),
        ("mollifier.drain", 2, None),
    ]
    assert {parent_of(span) for span in house.observed.spans()} == {CALLER}


async def test_only_the_entry_that_is_at_fault_has_a_span_that_failed(house: House) -> None:
    await house.hold("run_1", "run_2", "run_3")

    def faults(creation: Creation) -> Exception | None:
        return REFUSAL if creation.snapshot.run_id == "run_2" and creation.ending is None else None

    house.engine.faults = faults

    await house.drain()

    errors = {
        span.attributes["mollifier.run_id"]: span.status.description
        for span in house.observed.spans()
        if span.name == "mollifier.drain"
    }
    expected = "NonRetryableError: InvalidRequestError: options.queue: no such queue"
    assert errors == {"run_1": None, "run_2": expected, "run_3": None}


async def test_an_entry_that_is_given_up_has_a_span_around_the_creation_of_its_failed_run(house: House) -> None:
    await house.hold("run_1")
    house.engine.faults = lambda creation: REFUSAL if creation.ending is None else None

    await house.drain()

    error = "NonRetryableError: InvalidRequestError: options.queue: no such queue"
    assert [told(span) for span in house.observed.spans()] == [
        ("mollifier.drain", 1, error),
        ("mollifier.give_up", 1, error),
    ]
    assert {parent_of(span) for span in house.observed.spans()} == {CALLER}
    assert [[span.name for span in seen] for seen in house.engine.seen] == [["mollifier.drain"], ["mollifier.give_up"]]
    assert house.engine.runs.keys() == {"run_1"}


async def test_a_failure_that_the_engine_is_away_to_record_says_so_in_its_span(house: House) -> None:
    await house.hold("run_1")
    outages: list[Exception] = [EngineUnavailableError("it is away")]

    def faults(creation: Creation) -> Exception | None:
        if creation.ending is None:
            return REFUSAL
        return outages.pop() if outages else None

    house.engine.faults = faults

    await house.drain()

    given_up = [span for span in house.observed.spans() if span.name == "mollifier.give_up"]
    error = "NonRetryableError: InvalidRequestError: options.queue: no such queue"
    assert [told(span)[2] for span in given_up] == ["EngineUnavailableError: it is away", error]


@pytest.mark.leaves_keys
async def test_an_entry_whose_payload_names_no_trace_has_one_of_its_own(house: House) -> None:
    await hold(house.buffer, "run_1", kind=EntryKind.HELD, payload=b"\xc1")

    await house.drain()

    failed, given_up = house.observed.spans()
    assert (failed.parent, given_up.parent) == (None, None)
    assert "is not a snapshot" in (told(failed)[2] or "")
    assert (await house.buffer.counts()).failed == 1


async def test_the_span_of_an_entry_whose_handler_hangs_ends_when_the_drainer_is_stopped(house: House) -> None:
    await house.hold("run_1")
    house.engine.hangs = True
    drainer = house.mollifier.drainer()
    drainer.start()

    async def hangs() -> bool:
        return bool(house.engine.seen)

    await until(hangs)
    await drainer.stop(timeout_ms=0)

    (span,) = house.observed.spans()
    assert told(span) == ("mollifier.drain", 1, "CancelledError: ")
    house.engine.hangs = False
    entry = await house.buffer.get_entry(ORG, "run_1")
    assert entry is not None
    assert await house.buffer.requeue(entry) == "held"
    await house.drain()


@pytest.mark.leaves_keys
async def test_a_handler_of_somebody_elses_is_given_entries_of_which_nothing_is_read(house: House) -> None:
    await hold(house.buffer, "run_1", payload=b"theirs")

    async def refuse(entries: Sequence[Any]) -> Sequence[BaseException | None]:
        return [NonRetryableError("not mine")] * len(entries)

    drainer = house.mollifier.drainer(refuse)
    drainer.start()

    async def has_failed() -> bool:
        return (await house.buffer.counts()).failed == 1

    await until(has_failed)
    await drainer.stop()
    assert house.observed.spans() == []
