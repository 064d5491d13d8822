"""A trigger, its drain and its execution are one trace, whether the caller has one or it begins with the request."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from mollifier.facade import Mollifier
from mollifier.model import TriggerRequest
from mollifier.postgres.catalog import PostgresTaskCatalog
from mollifier.postgres.execution import Executor
from tests.core.observed import Observed
from tests.core.support import until
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize("traceparent", [None, f"00-{TRACE_ID}-b7ad6b7169203331-01"])
async def test_a_held_runs_trigger_drain_and_execution_are_one_trace(holding: House, traceparent: str | None) -> None:
    observed = Observed()
    mollifier = Mollifier(
        holding.settings,
        engine=holding.engine,
        tasks=PostgresTaskCatalog(holding.database),
        telemetry=observed.telemetry,
    )

    with observed.telemetry.span("request", traceparent=traceparent):
        request = TriggerRequest(task_id="echo", payload=b"1", traceparent=traceparent)
        triggered = await mollifier.triggers.trigger(ENVIRONMENT, request)
    run_id = triggered.result.run_id
    drainer = mollifier.drainer()
    drainer.start()

    async def is_created() -> bool:
        return await holding.created(run_id) is not None and (await holding.buffer.counts()).left == 0

    await until(is_created)
    await drainer.stop()
    executor = Executor(
        holding.database,
        {"echo": repr},
        clock=lambda: datetime.now(UTC),
        tracer_provider=observed.tracer_provider,
    )
    await executor.execute(run_id, job_id=1)
    await mollifier.aclose()

    spans = {span.name: span for span in observed.spans()}
    assert {"request", "mollifier.buffer.accept", "mollifier.drain"} < spans.keys()
    assert len({span.context.trace_id for span in spans.values()}) == 1
    drained, executed = spans["mollifier.drain"], observed.spans()[-1]
    assert executed.name not in {"request", "mollifier.drain"}
    for span in (drained, executed):
        parent = f"{span.parent.span_id:016x}"
        assert parent == ("b7ad6b7169203331" if traceparent else f"{spans['request'].context.span_id:016x}")
    assert drained.attributes["mollifier.dwell_ms"] >= 0
    assert drained.attributes["mollifier.attempts"] == 1


async def test_a_trigger_that_is_not_traced_has_no_trace(holding: House) -> None:
    run_id = await holding.trigger()
    run = await holding.runs.get(ENVIRONMENT, run_id)
    assert run is not None
    assert run.snapshot.traceparent is None
    await holding.drain()
