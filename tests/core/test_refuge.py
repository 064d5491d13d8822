"""The refuge: an engine that gives no answers is not asked for what can do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from mollifier.engine import RunEngine
from mollifier.errors import EngineNotAskedError, EngineUnavailableError
from mollifier.model import RunProgress
from mollifier.refuge import Refuge
from mollifier.telemetry import Telemetry


class AwayEngine:
    """Gives no answers to looks."""

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        raise EngineUnavailableError(f"no answer about {run_ids} of {env_id}")


async def test_looks_that_have_no_answer_open_the_circuit() -> None:
    engine = cast("RunEngine", AwayEngine())
    refuge = Refuge(engine, Telemetry(), monotonic=lambda: 0.0, jitter=lambda: 0.0)

    for _ in range(5):
        with pytest.raises(EngineUnavailableError, match="no answer about"):
            await refuge.get_progress("env", ["run"])

    with pytest.raises(EngineNotAskedError):
        await refuge.get_progress("env", ["run"])
    with pytest.raises(EngineNotAskedError):
        await refuge.create_runs([])
