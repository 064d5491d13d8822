"""The run API as a caller uses it: read a run, tag it, cancel it. A 503 says to come again, and so it does for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from itertools import cycle
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp

from mollifier.model import Tenant

PATIENCE_S = 30.0
_PAUSE_S = 0.5


class Reply(NamedTuple):
    """What a call was answered; status 0 where there was no answer, with the reason as its body."""

    status: int
    body: bytes

    @property
    def is_ok(self) -> bool:
        """Whether the call did what it was to do."""
        return self.status == HTTPStatus.OK


class RunApi:
    """Calls the replicas in turn, each call with the key of the tenant whose run it is. Never raises for an answer."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        api_urls: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = http
        self._urls = cycle(api_urls)
        self._clock = clock
        self._sleep = sleep

    async def get(self, tenant: Tenant, run_id: str) -> Reply:
        """Read the run."""
        return await self._call(tenant, "GET", f"/api/v3/runs/{quote(run_id)}")

    async def add_tag(self, tenant: Tenant, run_id: str, tag: str) -> Reply:
        """Add a tag to the run."""
        return await self._call(tenant, "POST", f"/api/v1/runs/{quote(run_id)}/tags", {"tags": [tag]})

    async def cancel(self, tenant: Tenant, run_id: str) -> Reply:
        """Cancel the run."""
        return await self._call(tenant, "POST", f"/api/v2/runs/{quote(run_id)}/cancel", {})

    async def _call(self, tenant: Tenant, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        """Call, again for as long as neither store can answer: each of these calls may be repeated without harm."""
        headers = {"Authorization": f"Bearer {tenant.api_key}"}
        give_up_s = self._clock() + PATIENCE_S
        while True:
            try:
                async with self._http.request(method, next(self._urls) + path, json=body, headers=headers) as response:
                    reply = Reply(response.status, await response.read())
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                reply = Reply(0, f"{type(error).__name__}: {error}".encode())
            if reply.status not in (0, HTTPStatus.SERVICE_UNAVAILABLE) or self._clock() >= give_up_s:
                return reply
            await self._sleep(_PAUSE_S)
