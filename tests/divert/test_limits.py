"""Limits hold for a run wherever it is."""

from __future__ import annotations

import pytest

from mollifier.errors import InvalidRequestError
from mollifier.metadata import METADATA_BYTES_MAX
from mollifier.model import MetadataOperation
from tests.divert.conftest import ENVIRONMENT, House

pytestmark = pytest.mark.leaves_keys


@pytest.mark.parametrize("where", ["held", "created"])
async def test_metadata_stops_growing_at_the_limit(holding: House, where: str) -> None:
    run_id = await holding.trigger(metadata=b"{}")
    if where == "created":
        await holding.drain()
    text = b'"%s"' % (b"x" * (METADATA_BYTES_MAX // 3))
    appending = [MetadataOperation(type="append", key="log", value=text)]
    for _ in range(2):
        await holding.runs.change_metadata(ENVIRONMENT, run_id, appending)
    before = await holding.runs.get(ENVIRONMENT, run_id)

    with pytest.raises(InvalidRequestError, match="operations"):
        await holding.runs.change_metadata(ENVIRONMENT, run_id, appending)

    after = await holding.runs.get(ENVIRONMENT, run_id)
    assert after == before
    await holding.drain()
    created = await holding.created(run_id)
    assert created is not None
    assert before is not None
    assert created.snapshot.metadata == before.snapshot.metadata
