"""Mollifier in one object: what building it does and does not do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import cast

import pytest
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.engine import RunEngine
from mollifier.facade import Mollifier
from mollifier.settings import Settings
from tests.core.engines import AnyTask, MemoryEngine
from tests.core.support import execute


def built(settings: Settings, redis: Redis | None = None) -> Mollifier:
    return Mollifier(settings, engine=cast("RunEngine", MemoryEngine()), tasks=AnyTask(), redis=redis)


async def test_building_it_opens_no_connection(redis_client: Redis, redis_url: str) -> None:
    async def opened() -> int:
        return (await execute(redis_client, "INFO", "stats"))["total_connections_received"]

    before = await opened()
    mollifier = built(Settings(enabled=True, redis_url=redis_url))
    assert await opened() == before
    await mollifier.aclose()


def test_without_a_server_there_is_no_buffer_and_nothing_to_drain() -> None:
    mollifier = built(Settings())
    assert mollifier.buffer is None

    with pytest.raises(ValueError, match="MOLLIFIER_REDIS_URL"):
        mollifier.drainer()


async def test_a_client_that_was_brought_is_left_open(redis_client: Redis) -> None:
    mollifier = built(Settings(enabled=True), redis_client)
    await mollifier.aclose()
    assert await execute(redis_client, "PING")


async def test_closing_it_closes_the_connections_it_opened(redis_client: Redis, redis_url: str) -> None:
    async def connected() -> int:
        return (await execute(redis_client, "INFO", "clients"))["connected_clients"]

    before = await connected()
    mollifier = built(Settings(redis_url=redis_url))
    assert mollifier.buffer is not None
    await mollifier.buffer.ping()
    assert await connected() == before + 1
    await mollifier.aclose()
    while await connected() > before:
        pass


moments = st.datetimes(datetime(2020, 1, 1), datetime(2500, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the zone is drawn
