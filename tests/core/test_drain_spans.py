"""The span of a drained entry: in its caller's trace, wherever the entry goes from the buffer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from mollifier import snapshots
from mollifier.engine import CreateOutcome, Creation, RunEngine
from mollifier.facade import Mollifier
from mollifier.model import EntryKind, Snapshot
from tests.core.engines import AnyTask, MemoryEngine
from tests.core.observed import Observed
from tests.core.support import ENV, ORG, SETTINGS, hold, until

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class HoldingEngine(MemoryEngine):
    """Creates held runs as it creates others."""

    async def create_held_runs(self, creations: Sequence[Creation]) -> Sequence[CreateOutcome]:
        return await self.create_runs([creation.snapshot for creation in creations])


@pytest.mark.parametrize("kind", [EntryKind.AUDIT, EntryKind.HELD])
async def test_the_span_of_a_drained_entry_continues_the_triggers_trace_and_tells_how_long_it_was_held(
    kind: EntryKind, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    observed = Observed()
    mollifier = Mollifier(
        SETTINGS,
        engine=cast("RunEngine", HoldingEngine()),
        tasks=AnyTask(),
        redis=redis_client,
        telemetry=observed.telemetry,
    )
    buffer = mollifier.buffer
    assert buffer is not None
    snapshot = Snapshot(
        run_id="run_1",
        org_id=ORG,
        env_id=ENV,
        task_id="task",
        created_at=datetime(2030, 1, 1, tzinfo=UTC),
        traceparent=f"00-{TRACE_ID}-{CALLER_ID}-01",
    )
    await hold(buffer, "run_1", kind=kind, payload=snapshots.encode(snapshot))

    async def is_drained() -> bool:
        return (await buffer.counts()).left == 0

    drainer = mollifier.drainer()
    drainer.start()
    await until(is_drained)
    await drainer.stop()

    (span,) = observed.spans()
    assert span.name == "mollifier.drain"
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, CALLER_ID)
    (told,) = [fields_of(record) for record in caplog.records if record.message == "mollifier.drained"]
    assert dict(span.attributes) == {"mollifier.run_id": "run_1", "mollifier.dwell_ms": told["dwell_ms"]}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = record.__dict__["fields"]
    return fields
