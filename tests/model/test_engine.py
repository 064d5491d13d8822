"""The run engine in memory, which the simulation runs on, does what every run engine must."""

# ruff: noqa: F403
# pyright: reportWildcardImportFromLibrary=false
import pytest

from tests.engine_conformance import *
from tests.model.engine import MemoryRunEngine
from tests.postgres.support import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock: Clock) -> MemoryRunEngine:
    return MemoryRunEngine(clock)
