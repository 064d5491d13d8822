"""A whole Mollifier in divert mode, on real servers, with one tenant whose every trigger is held."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from functools import cached_property

import pytest
from redis.asyncio import Redis

from mollifier.buffer import Buffer
from mollifier.embedded import EmbeddedStack, Stack
from mollifier.engine import Creation
from mollifier.facade import Mollifier
from mollifier.keys import Keyspace
from mollifier.model import Debounce, Environment, Run, TriggerRequest
from mollifier.postgres.catalog import PostgresTaskCatalog, record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.engine import PostgresRunEngine, utc_now
from mollifier.postgres.migrate import migrate_async
from mollifier.server import connect
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry
from tests.core.support import until

ENVIRONMENT = Environment(
    id="env_a", name="prod", project_id="proj_a", org_id="org_a", org_flags={"mollifierEnabled": True}
)
DEBOUNCED = Debounce(key="d", delay=timedelta(hours=1))
STRANGER = Environment(id="env_b", name="prod", project_id="proj_a", org_id="org_a", org_flags={})


class House:
    """The parts of one application, and short names for what tests do with them. A test may put another `clock` in its place."""

    def __init__(self, settings: Settings, database: Database, telemetry: Telemetry | None = None) -> None:
        self.settings = settings
        self.database = database
        self.clock: Callable[[], datetime] = utc_now
        self.engine = PostgresRunEngine(database, clock=self._now)
        self.mollifier = Mollifier(
            lambda: self.settings,
            engine=self.engine,
            tasks=PostgresTaskCatalog(database),
            telemetry=telemetry,
            clock=self._now,
        )
        self.runs = self.mollifier.runs

    @cached_property
    def client(self) -> Redis:
        """A client of the buffer's server."""
        return connect(self.settings.redis_url or "")

    def _now(self) -> datetime:
        return self.clock()

    @property
    def buffer(self) -> Buffer:
        assert self.mollifier.buffer is not None
        return self.mollifier.buffer

    async def trigger(self, environment: Environment = ENVIRONMENT, **options: object) -> str:
        return (await self.trigger_all(environment, **options))[0]

    async def trigger_all(self, environment: Environment = ENVIRONMENT, **options: object) -> tuple[str, bool]:
        triggered = await self.mollifier.triggers.trigger(environment, self.request(**options))
        return triggered.result.run_id, triggered.result.is_cached

    def request(self, **options: object) -> TriggerRequest:
        return TriggerRequest(task_id="echo", **{"payload": b'{"n":1}', **options})  # pyright: ignore[reportArgumentType] - one test's options

    async def trip(self, environment: Environment = ENVIRONMENT) -> None:
        """Have the environment's triggers held from now on."""
        keys = Keyspace(self.settings.partitions).of(environment.org_id)
        redis = connect(self.settings.redis_url or "")
        await redis.set(keys.tripped(environment.id), "1", px=600_000)
        await redis.aclose()

    async def calm(self) -> None:
        """Have the environment's triggers pass from now on."""
        keys = Keyspace(self.settings.partitions).of(ENVIRONMENT.org_id)
        redis = connect(self.settings.redis_url or "")
        await redis.delete(keys.tripped(ENVIRONMENT.id))
        await redis.aclose()

    async def drain(self) -> None:
        """Drain until the buffer holds nothing that is due."""
        drainer = self.mollifier.drainer()
        drainer.start()
        try:
            await until(self._is_drained)
        finally:
            await drainer.stop()

    async def hand_over(self) -> None:
        """Create the runs of all that is due in the one environment, without a drainer's loops."""
        while (entry := await self.buffer.pop(ENVIRONMENT.org_id, ENVIRONMENT.id)) is not None:
            assert await self.mollifier.drain_handler()([entry]) == [None]
            assert await self.buffer.ack(entry) == "held"

    async def _is_drained(self) -> bool:
        counts = await self.buffer.counts()
        return not counts.queued and not counts.draining

    async def created(self, run_id: str) -> Run | None:
        """The run as the engine has it."""
        return await self.engine.get_run(ENVIRONMENT.id, run_id)

    async def create(self, *creations: Creation) -> None:
        await self.engine.create_held_runs(creations)


@pytest.fixture
async def house(redis_url: str, database_url: str) -> AsyncIterator[House]:
    settings = Settings(
        enabled=True,
        divert=True,
        redis_url=redis_url,
        database_url=database_url,
        partitions=4,
        # What is held must not depend on how busy the machine is that runs the tests.
        gate_deadline_ms=10_000,
        accept_deadline_ms=10_000,
    )
    async with Database(database_url) as database:
        await record_tasks(database, {"echo": "mollifier.demo_tasks"})
        house = House(settings, database)
        try:
            yield house
        finally:
            await house.client.aclose()
            await house.mollifier.aclose()


@pytest.fixture
async def holding(house: House) -> House:
    """The house, its tenant tripped."""
    await house.trip()
    return house


@pytest.fixture
async def own() -> AsyncIterator[tuple[Stack, House]]:
    """A house on servers of its own, which a test may stop."""
    async with EmbeddedStack(durable=False) as stack:
        await migrate_async(stack.database_url)
        settings = Settings(
            enabled=True,
            divert=True,
            redis_url=stack.redis_url,
            database_url=stack.database_url,
            partitions=4,
            gate_deadline_ms=1_000,
            accept_deadline_ms=1_000,
        )
        async with Database(stack.database_url, deadline_s=2) as database:
            await record_tasks(database, {"echo": "mollifier.demo_tasks"})
            house = House(settings, database)
            await house.trigger()
            yield stack, house
            await house.mollifier.aclose()
