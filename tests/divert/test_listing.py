"""Lists of runs of which some are held."""

from mollifier.model import RunFilter, RunStatus
from tests.divert.conftest import ENVIRONMENT, House


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
