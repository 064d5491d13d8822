"""What a diverted trigger costs its caller, against one that is created directly, through the real HTTP API."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

import aiohttp
import msgspec
from redis.asyncio import Redis

from benchmarks.database import TASK, House, house
from benchmarks.report import Figure, Report, median, percentile
from benchmarks.stage import PAYLOAD
from mollifier.embedded import Stack
from mollifier.http.server import ApiServer
from mollifier.keys import Keyspace
from mollifier.model import Tenant
from mollifier.play.outage import processes_of, signal_all
from mollifier.postgres.tenants import Tenants
from mollifier.server import connect

CALLS = 400
SLOW_CALLS = 100
FROZEN_S = 6.0
"""Longer than any answer of the database is kept (authentication: 4 s)."""
BODY = b'{"payload":' + PAYLOAD + b"}"
HELD_MS = 600_000


async def measure(_redis_url: str, scale: float) -> Report:
    """Call a direct and a diverted environment in turns; then freeze the database and go on calling the diverted one for a while."""
    calls = max(50, int(CALLS * scale))
    async with house() as parts:
        tenants = Tenants(parts.database)
        direct, diverted = await tenants.create_tenant("direct"), await tenants.create_tenant("diverted")
        await tenants.set_flags(diverted.org_id, {"mollifierEnabled": True})
        async with (
            _serving(parts) as url,
            aiohttp.ClientSession() as http,
            connect(parts.stack.redis_url) as redis,
        ):
            await _trip(redis, parts, diverted)
            await _latencies_ms(http, url, (direct, diverted), 50)
            direct_ms, diverted_ms = await _latencies_ms(http, url, (direct, diverted), calls)
            with _frozen(parts.stack):
                until_s = time.perf_counter() + FROZEN_S
                frozen_ms: list[float] = []
                while time.perf_counter() < until_s:
                    frozen_ms += (await _latencies_ms(http, url, (diverted,), SLOW_CALLS))[0]
    return Report(
        "diverting",
        "what does a diverted trigger cost its caller, over HTTP?",
        (
            Figure("direct_ms", median(direct_ms)),
            Figure("diverted_ms", median(diverted_ms)),
            Figure("ratio_to_direct", median(diverted_ms) / median(direct_ms), "at most 1"),
            Figure("diverted_while_the_database_is_frozen_ms", median(frozen_ms)),
            Figure("diverted_while_the_database_is_frozen_p99_ms", percentile(frozen_ms, 99)),
            Figure("ratio_frozen_to_idle", median(frozen_ms) / median(diverted_ms), "about 1"),
        ),
    )


@contextmanager
def _frozen(stack: Stack) -> Generator[None]:
    """Stop every process of Postgres for the time being: connections stay, and nothing answers on them. Linux only."""
    pids = processes_of(stack)
    try:
        signal_all(pids, signal.SIGSTOP)
        yield
    finally:
        signal_all(pids, signal.SIGCONT)


@asynccontextmanager
async def _serving(parts: House) -> AsyncGenerator[str]:
    """Serve the API in this process; yields its URL."""
    server = ApiServer(parts.settings)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(server.run_until_stopped(ready.set_result))
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield server.url
    finally:
        server.should_exit = True
        await serving


async def _trip(redis: Redis, parts: House, tenant: Tenant) -> None:
    keys = Keyspace(parts.settings.partitions).of(tenant.org_id)
    await redis.set(keys.tripped(tenant.env_id), "1", px=HELD_MS)


async def _latencies_ms(
    http: aiohttp.ClientSession, url: str, tenants: tuple[Tenant, ...], calls: int
) -> list[list[float]]:
    """Return the latencies of calls made one after another, the tenants in turns."""
    latencies_ms: list[list[float]] = [[] for _ in tenants]
    for _ in range(calls):
        for tenant, own in zip(tenants, latencies_ms, strict=True):
            headers = {"Authorization": f"Bearer {tenant.api_key}", "Content-Type": "application/json"}
            started_s = time.perf_counter()
            async with http.post(f"{url}/api/v1/tasks/{TASK}/trigger", data=BODY, headers=headers) as answer:
                msgspec.json.decode(await answer.read())
                answer.raise_for_status()
            own.append((time.perf_counter() - started_s) * 1000)
            await asyncio.sleep(0)
    return latencies_ms
