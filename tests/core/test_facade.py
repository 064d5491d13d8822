"""Mollifier in one object: what building it does and does not do."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier import facade
from mollifier.engine import RunEngine
from mollifier.facade import Mollifier, run_id
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

    async def handler(entries: object) -> list[None]:
        return []

    with pytest.raises(ValueError, match="MOLLIFIER_REDIS_URL"):
        mollifier.drainer(handler)


def test_enabled_without_a_server_it_warns_once_per_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    facade._warn_without_server.cache_clear()  # pyright: ignore[reportPrivateUsage] - other tests may have warned already
    for _ in range(3):
        built(Settings(enabled=True))
    (record,) = caplog.records
    assert "MOLLIFIER_REDIS_URL" in record.__dict__["fields"]["detail"]


def test_switched_off_without_a_server_it_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    facade._warn_without_server.cache_clear()  # pyright: ignore[reportPrivateUsage] - as above
    built(Settings())
    assert caplog.records == []


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


@given(moments)
def test_a_run_id_has_one_form(moment: datetime) -> None:
    assert re.fullmatch(r"run_[0-9a-z]{25}", run_id(moment))


@given(moments, st.timedeltas(timedelta(milliseconds=1), timedelta(days=365)))
def test_ids_made_later_sort_later(moment: datetime, later: timedelta) -> None:
    assert run_id(moment) < run_id(moment + later)


def test_ids_of_one_moment_differ() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    assert len({run_id(moment) for _ in range(10_000)}) == 10_000
