"""Mollifier in one object: the flow's parts built from settings and joined to an application's run engine."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from redis.asyncio import Redis

from mollifier import faults, ids
from mollifier.admission import Admission
from mollifier.batches import Batches
from mollifier.bounded import BoundedServer
from mollifier.breakers import Breakers, read_deadline_ms
from mollifier.buffer import Buffer
from mollifier.claims import Claims
from mollifier.drain_spans import traced, traced_giving_up
from mollifier.drainer import Drainer
from mollifier.engine import RunEngine, TaskCatalog
from mollifier.flags import FlagResolver
from mollifier.gate import Gate
from mollifier.handling import Handler
from mollifier.keys import Keyspace
from mollifier.materialise import Materialiser, by_kind
from mollifier.model import Entry, EntryKind
from mollifier.monitor import audit_handler
from mollifier.rate_limit import RateLimiter
from mollifier.refuge import Refuge
from mollifier.runs import Runs
from mollifier.scripts import Scripts
from mollifier.server import Server, connect
from mollifier.settings import Settings, variable
from mollifier.sweeper import Sweeper
from mollifier.telemetry import Telemetry
from mollifier.trigger import TriggerService
from mollifier.trip import TripEvaluator

log = logging.getLogger(__name__)


class Mollifier:
    """The parts, ready to use; building it opens no connection.

    `settings` is one struct, or a function that returns the current one. `global_flags` returns the global flag rows as last read.
    The client made here answers bytes, retries nothing and is closed by `aclose`; one that is passed in must answer bytes too.
    `clock` returns the current moment in UTC, `monotonic` seconds, `jitter` a number in [0, 1).
    """

    def __init__(
        self,
        settings: Settings | Callable[[], Settings],
        *,
        engine: RunEngine,
        tasks: TaskCatalog,
        global_flags: Callable[[], Mapping[str, Any]] = dict,
        redis: Redis | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        new_run_id: Callable[[datetime], str] = ids.run_id,
        new_token: Callable[[], str] = ids.token,
    ) -> None:
        current = settings() if callable(settings) else settings
        self.settings: Callable[[], Settings] = settings if callable(settings) else lambda: current
        self.telemetry = telemetry or Telemetry()
        self._monotonic = monotonic
        self._jitter = jitter
        self._new_token = new_token
        engine = faults.watched(engine)
        self._own_redis = connect(current.redis_url) if redis is None and current.redis_url else None
        client = redis or self._own_redis
        server = Server(client) if client is not None else None
        if current.enabled and server is None:
            _warn_without_server()
        self.buffer = Buffer(server, self.settings) if server else None
        self._breakers = Breakers(self.buffer, self.settings, self.telemetry, monotonic=monotonic, jitter=jitter)
        evaluator = TripEvaluator(Scripts(server), Keyspace(current.partitions), self.settings) if server else None
        self.rate_limiter = (
            RateLimiter(
                Scripts(server),
                Keyspace(current.partitions),
                self.settings,
                self.telemetry,
                breaker=self._breakers.server,
            )
            if server
            else None
        )
        self.gate = Gate(
            enabled=lambda: self.settings().enabled,
            shadow_mode=lambda: self.settings().shadow_mode,
            flag=FlagResolver(global_flags),
            evaluator=evaluator,
            recorder=self.telemetry,
            deadline_ms=lambda: self.settings().gate_deadline_ms,
            breaker=self._breakers.server,
        )
        self.runs = Runs(engine, self._bounded(server), self.settings, clock)
        self._materialiser = Materialiser(engine, self.telemetry, clock)
        refuge = Refuge(engine, self.telemetry, monotonic=monotonic, jitter=jitter)
        self._claims = self._claims_of(engine, refuge)
        self.triggers = TriggerService(
            admission=Admission(
                settings=self.settings,
                gate=self.gate,
                buffer=self.buffer,
                engine=engine,
                telemetry=self.telemetry,
                refuge=refuge,
                runs=self.runs,
                breaker=self._breakers.accepts,
            ),
            claims=self._claims,
            engine=engine,
            refuge=refuge,
            runs=self.runs,
            tasks=tasks,
            telemetry=self.telemetry,
            clock=clock,
            new_run_id=new_run_id,
        )
        self.batches = Batches(engine=engine, triggers=self.triggers, runs=self.runs, clock=clock)

    def _bounded(self, server: Server | None) -> Buffer | None:
        """Return the buffer for those who read and change held runs while their caller waits."""
        if server is None:
            return None
        bounded = BoundedServer(server, self._breakers.reads, lambda: read_deadline_ms(self.settings()))
        return Buffer(bounded, self.settings)

    def _claims_of(self, engine: RunEngine, refuge: Refuge) -> Claims | None:
        if self.buffer is None:
            return None
        return Claims(
            self.buffer,
            self.settings,
            self.telemetry,
            refuge=refuge,
            engine_deadline_ms=engine.deadline_ms,
            breaker=self._breakers.claims,
            new_token=self._new_token,
        )

    def drainer(self, handler: Handler | None = None) -> Drainer:
        """Return a drainer of this buffer: audit copies are compared, held entries become runs; or what the given handler does.

        Raises ValueError when no buffer is configured.
        """
        if self.buffer is None:
            raise ValueError(f"nothing to drain: set {variable('redis_url')}")
        return Drainer(
            self.buffer,
            handler or self.drain_handler(),
            self.settings,
            self.telemetry,
            give_up=None if handler else traced_giving_up(self._materialiser.give_up, self.telemetry),
            asks_engine=(lambda _: True) if handler else _is_held,
            jitter=self._jitter,
            monotonic=self._monotonic,
        )

    def sweeper(self) -> Sweeper:
        """Return a sweeper of this buffer, to run beside a drainer. Raises ValueError when no buffer is configured."""
        if self.buffer is None:
            raise ValueError(f"nothing to sweep: set {variable('redis_url')}")
        return Sweeper(self.buffer, self.settings, self.telemetry, monotonic=self._monotonic, new_token=self._new_token)

    def drain_handler(self) -> Handler:
        """Return what a drainer does with entries, in a span of its caller's trace for each."""
        handler = by_kind(audit=audit_handler(self.telemetry), held=self._materialiser.handle)
        return traced(handler, self.telemetry)

    async def aclose(self) -> None:
        """Close the connections that were opened here, and log what was only counted so far."""
        self.telemetry.flush()
        self._breakers.close()
        if self._claims is not None:
            self._claims.close()
        if self._own_redis is not None:
            await self._own_redis.aclose()


def _is_held(entry: Entry) -> bool:
    # An audit copy's run exists: the engine has nothing to do with it.
    return entry.kind is EntryKind.HELD


@cache
def _warn_without_server() -> None:
    log.warning(
        "mollifier.no_buffer",
        extra={
            "fields": {
                "detail": f"{variable('enabled')} is on but no server is configured, so every trigger passes through; "
                f"set {variable('redis_url')} to a Valkey or Redis of Mollifier's own"
            }
        },
    )
