"""What a trigger costs its caller, over HTTP, while the buffer's server is down, frozen, slow or cut off, and the breaker has opened."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import msgspec

from benchmarks.report import Figure, Report, median, percentile
from benchmarks.stage import PAYLOAD
from mollifier.embedded import EmbeddedStack, Stack
from mollifier.model import Tenant
from mollifier.play.proxy import HOST, LOSE, Fate, Proxy
from mollifier.postgres.catalog import record_tasks
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import migrate_async
from mollifier.postgres.tenants import Tenants

TASK = "send-invoice"
ROUNDS = 400
KINDS = ("plain", "keyed", "batch")
"""A trigger, one with an idempotency key, and a batch of triggers that all have one."""
BATCH = 20
SLOW_S = 0.1
OPEN, CLOSED = (f'mollifier_breaker_state{{breaker="buffer"}} {value}' for value in ("2.0", "0.0"))

_numbers = itertools.count()


class Stage(msgspec.Struct, frozen=True):
    """What is measured: the servers, and an API in a process of its own that reaches the buffer's one through a proxy."""

    stack: Stack
    proxy: Proxy
    http: aiohttp.ClientSession
    tenant: Tenant
    url: str
    off_url: str
    """An API on the same database with Mollifier switched off."""


Fault = Callable[[Stage], AbstractAsyncContextManager[None]]
Latencies = dict[tuple[str, str], list[float]]


async def measure(_redis_url: str, scale: float) -> Report:
    """Trigger in turns where Mollifier is on and where it is off: with a healthy server, then in each outage once the breaker is open."""
    rounds = max(50, int(ROUNDS * scale))
    figures: list[Figure] = []
    async with _staged() as stage:
        await _latencies(stage, 30)
        figures += _figures("healthy", await _latencies(stage, rounds))
        for fault in (down, frozen, slow, partitioned):
            async with fault(stage):
                worst_ms = await _until_open(stage)
                figures.append(Figure(f"{fault.__name__}: until_it_opens_worst_ms", worst_ms))
                figures += _figures(fault.__name__, await _latencies(stage, rounds), wanted="under 30")
            figures.append(Figure(f"{fault.__name__}: until_it_closes_s", await _until_closed(stage)))
    return Report(
        "outage",
        "what does a trigger cost its caller while the buffer's server does not answer, once the breaker has opened?",
        tuple(figures),
    )


def _figures(name: str, taken: Latencies, wanted: str = "") -> list[Figure]:
    figures: list[Figure] = []
    for kind in KINDS:
        on, off = taken[kind, "on"], taken[kind, "off"]
        figures += [
            Figure(f"{name}, {kind}: p50_ms", median(on)),
            Figure(f"{name}, {kind}: p99_ms", percentile(on, 99)),
            Figure(f"{name}, {kind}: off_p99_ms", percentile(off, 99)),
            Figure(f"{name}, {kind}: added_p99_ms", percentile(on, 99) - percentile(off, 99), wanted),
        ]
    return figures


async def _latencies(stage: Stage, rounds: int) -> Latencies:
    """Return how long calls took, milliseconds, by kind and API; they take turns, so that all meet the same machine."""
    taken: Latencies = {(kind, api): [] for kind in KINDS for api in ("on", "off")}
    for number in range(rounds):
        for kind in KINDS:
            # A batch costs several times as much: there are fewer of them.
            if kind != "batch" or number % 4 == 0:
                for api, url in (("off", stage.off_url), ("on", stage.url)):
                    taken[kind, api].append(await _call(stage, url, kind))
    return taken


async def _call(stage: Stage, url: str, kind: str) -> float:
    """Trigger; return how long the answer took, milliseconds."""
    path, body = f"/api/v1/tasks/{TASK}/trigger", _item(keyed=kind == "keyed")
    if kind == "batch":
        path, body = "/api/v2/tasks/batch", b'{"items":[' + b",".join(_item(keyed=True) for _ in range(BATCH)) + b"]}"
    headers = {"Authorization": f"Bearer {stage.tenant.api_key}", "Content-Type": "application/json"}
    started_s = time.perf_counter()
    async with stage.http.post(url + path, data=body, headers=headers) as answer:
        await answer.read()
        answer.raise_for_status()
    return (time.perf_counter() - started_s) * 1000


def _item(*, keyed: bool) -> bytes:
    options = b'"options":{"idempotencyKey":"k%d"},' % next(_numbers) if keyed else b""
    return b'{"task":"%s",%s"payload":%s}' % (TASK.encode(), options, PAYLOAD)


async def _breaker_is(stage: Stage, state: str) -> bool:
    async with stage.http.get(f"{stage.url}/metrics") as answer:
        return state in await answer.text()


async def _until_open(stage: Stage) -> float:
    """Trigger until the breaker has opened; return how long the slowest took, milliseconds."""
    taken_ms = [0.0]
    while not await _breaker_is(stage, OPEN):
        taken_ms.append(await _call(stage, stage.url, "keyed"))
    return max(taken_ms)


async def _until_closed(stage: Stage) -> float:
    """Trigger until the breaker has closed and the gate has been answered; return how long that took, seconds."""
    started_s = time.perf_counter()
    while not await _breaker_is(stage, CLOSED):
        await _call(stage, stage.url, "plain")
    ended_s = time.perf_counter()
    await _latencies(stage, 10)
    return ended_s - started_s


# --- outages -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def down(stage: Stage) -> AsyncGenerator[None]:
    """Nobody listens."""
    await stage.stack.stop("valkey", kill=True)
    yield
    await stage.stack.start("valkey")


@asynccontextmanager
async def frozen(stage: Stage) -> AsyncGenerator[None]:
    """It is there and does nothing (SIGSTOP)."""
    pid = stage.stack.valkey_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def slow(stage: Stage) -> AsyncGenerator[None]:
    """It answers, later than the gate waits and sooner than an accept or a claim would give up."""
    stage.proxy.misbehave(requests=Fate(delay_s=SLOW_S))
    yield
    stage.proxy.behave()


@asynccontextmanager
async def partitioned(stage: Stage) -> AsyncGenerator[None]:
    """Connections are taken, and what is sent on them is lost."""
    stage.proxy.misbehave(requests=LOSE, replies=LOSE)
    yield
    stage.proxy.behave()


# --- the stage -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _staged() -> AsyncGenerator[Stage]:
    async with (
        EmbeddedStack() as stack,
        Proxy(Path(urlsplit(stack.redis_url).path)) as proxy,
        Database(stack.database_url) as database,
        aiohttp.ClientSession() as http,
    ):
        await migrate_async(stack.database_url)
        await record_tasks(database, {TASK: "benchmarks"})
        tenants = Tenants(database)
        tenant = await tenants.create_tenant("enrolled")
        await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
        off = {"MOLLIFIER_DATABASE_URL": stack.database_url}
        on = {"MOLLIFIER_ENABLED": "1", "MOLLIFIER_DIVERT": "1", "MOLLIFIER_REDIS_URL": f"redis://{HOST}:{proxy.port}"}
        async with _serving(off | on) as url, _serving(off) as off_url:
            yield Stage(stack, proxy, http, tenant, url, off_url)


@asynccontextmanager
async def _serving(variables: Mapping[str, str]) -> AsyncGenerator[str]:
    """Serve the API in a process of its own; yields its URL."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOLLIFIER_")}
    serve = (sys.executable, "-m", "mollifier", "serve", "--port", "0", "--json")
    process = await asyncio.create_subprocess_exec(
        *serve, env={**environment, **variables}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield json.loads(await process.stdout.readline())["url"]
    finally:
        process.terminate()
        await process.wait()
