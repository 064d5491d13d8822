"""From a command to the configured servers: settings, a database, an event loop. Heavy imports happen here, when a command runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from mollifier.cli.output import tell_warnings

if TYPE_CHECKING:
    from mollifier.buffer import Buffer
    from mollifier.postgres.database import Database
    from mollifier.postgres.flags import GlobalFlags
    from mollifier.postgres.tenants import Tenants
    from mollifier.settings import Settings

T = TypeVar("T")


def load_settings() -> Settings:
    """Return the settings of this process's environment, telling what looks misspelt in it. Raises SettingsError."""
    from mollifier import config

    with tell_warnings():
        return config.load()


def database_url() -> str:
    """Return the URL of the configured database. Raises SettingsError when there is none."""
    from mollifier.errors import SettingsError
    from mollifier.settings import variable

    url = load_settings().database_url
    if url is None:
        detail = "is not set. Set it to your database, as in postgresql://user:password@host/name; for a try-out use `mollifier dev`"
        raise SettingsError(variable("database_url"), detail)
    return url


def with_database(operation: Callable[[Database], Awaitable[T]]) -> T:
    """Run one operation on the configured database."""
    from mollifier.postgres.database import Database

    async def run() -> T:
        async with Database(database_url(), pool_size=1) as database:
            return await operation(database)

    return asyncio.run(run())


def with_tenants(operation: Callable[[Tenants], Awaitable[T]]) -> T:
    """Run one operation on the tenants of the configured database."""
    from mollifier.postgres.tenants import Tenants

    return with_database(lambda database: operation(Tenants(database)))


def with_global_flags(operation: Callable[[GlobalFlags], Awaitable[T]]) -> T:
    """Run one operation on the global flags of the configured database."""
    from mollifier.postgres.flags import GlobalFlags

    return with_database(lambda database: operation(GlobalFlags(database)))


def with_buffer(operation: Callable[[Buffer], Awaitable[T]]) -> T:
    """Run one operation on the configured buffer. Raises SettingsError when there is none, or when it was made with other partitions."""
    from mollifier.buffer import Buffer
    from mollifier.errors import SettingsError
    from mollifier.server import Server, connect
    from mollifier.settings import variable

    settings = load_settings()
    url = settings.redis_url
    if url is None:
        detail = "is not set. Set it to the Valkey or Redis that holds the buffer, as in redis://buffer:6379"
        raise SettingsError(variable("redis_url"), detail)

    async def run() -> T:
        async with connect(url) as redis:
            buffer = Buffer(Server(redis), lambda: settings)
            await buffer.check_layout()
            return await operation(buffer)

    return asyncio.run(run())
