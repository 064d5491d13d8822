"""A Mollifier in divert mode before a real Postgres, for the benchmarks that need one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec

from mollifier.embedded import EmbeddedStack, Stack
from mollifier.facade import Mollifier
from mollifier.postgres.catalog import PostgresTaskCatalog, record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine
from mollifier.postgres.migrate import migrate_async
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry

TASK = "send-invoice"


class House(msgspec.Struct, frozen=True):
    """The parts that are measured."""

    stack: Stack
    settings: Settings
    database: Database
    engine: PostgresRunEngine
    mollifier: Mollifier


@asynccontextmanager
async def house(*, enabled: bool = True, telemetry: Telemetry | None = None) -> AsyncGenerator[House]:
    """Start servers that keep what they are told (fsync, append-only file), and a Mollifier that never passes a trigger by mistake."""
    async with EmbeddedStack(durable=True) as stack:
        await migrate_async(stack.database_url)
        settings = Settings(
            enabled=enabled,
            divert=True,
            redis_url=stack.redis_url,
            database_url=stack.database_url,
            gate_deadline_ms=5_000,
            accept_deadline_ms=5_000,
        )
        async with Database(stack.database_url) as database:
            await record_tasks(database, {TASK: "benchmarks"})
            engine = PostgresRunEngine(database)
            mollifier = Mollifier(settings, engine=engine, tasks=PostgresTaskCatalog(database), telemetry=telemetry)
            try:
                yield House(stack, settings, database, engine, mollifier)
            finally:
                await mollifier.aclose()
