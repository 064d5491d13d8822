"""Fixtures of the core's tests."""

import pytest
from hypothesis import settings
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.keys import PartitionKeys
from mollifier.server import Server
from tests.core.support import ORG, SETTINGS

# How long an example takes says more of the machine than of the code.
settings.register_profile("core", deadline=None)
settings.load_profile("core")


@pytest.fixture
def buffer(redis_client: Redis) -> Buffer:
    return Buffer(Server(redis_client), lambda: SETTINGS)


@pytest.fixture
def keys(buffer: Buffer) -> PartitionKeys:
    """The keys of the partition that tests put their organization in."""
    return buffer.keyspace.of(ORG)
