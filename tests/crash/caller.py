"""A caller of the API whose process dies under it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
from redis.asyncio import Redis

from mollifier.facade import Mollifier
from mollifier.keys import idempotency_digest, request_digest
from mollifier.model import Environment, Tenant
from tests.core.support import execute
from tests.crash.books import Book, Promise
from tests.crash.ground import ADMIN_TOKEN, TASK, Ground, environment_of, free_claims, payload, trip
from tests.crash.processes import TIMEOUT_S

_OK = 200
_UNAVAILABLE = 503


class Caller:
    """Calls the process that is to die; from the call on that got no answer, another one, with the same keys."""

    def __init__(
        self,
        ground: Ground,
        *,
        client: httpx.AsyncClient,
        urls: Sequence[str],
        tenant: Tenant,
        house: tuple[Mollifier, Redis],
        name: str,
    ) -> None:
        self.ground = ground
        self.tenant = tenant
        self.environment: Environment = environment_of(tenant)
        self.mollifier, self._redis = house
        self.name = name
        self.book = Book(name)
        self.went_without_answer = 0
        self._client = client
        self._urls = list(urls)
        self._digests: set[str] = set()

    # --- calling ---------------------------------------------------------------------------------------------------

    async def call(
        self, method: str, path: str, body: Any = None, *, request_key: str | None = None
    ) -> tuple[int, Any]:
        """Call until there is an answer; return its status and its body."""
        kind = "application/x-ndjson" if isinstance(body, bytes) else "application/json"
        key = ADMIN_TOKEN if path.startswith("/admin/") else self.tenant.api_key
        headers = {"Authorization": f"Bearer {key}", "Content-Type": kind}
        if request_key is not None:
            headers["x-trigger-request-idempotency-key"] = request_key
            self._digests.add(request_digest(self.tenant.env_id, request_key))
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    response = await self._client.request(
                        method, self._urls[0] + path, content=content, headers=headers
                    )
                    if response.status_code != _UNAVAILABLE:
                        return response.status_code, response.json()
                except httpx.TransportError:
                    pass
                await self._give_up_on(self._urls[0])

    async def trigger(self, mark: str, request: str = "", **options: Any) -> str:
        """Trigger a run and return its id; `mark` tells it from this caller's others, `request` a second call from the first."""
        path = f"/api/v1/tasks/{TASK}/trigger"
        body = self.item(mark, **options)
        _, answer = await self.ok("POST", path, body, request_key=f"{self.book.marker(mark)}-request{request}")
        self.of(mark).answers.add(answer["id"])
        return answer["id"]

    def item(self, mark: str, **options: Any) -> dict[str, Any]:
        """Return one trigger as it stands in a body."""
        marker = self.book.marker(mark)
        if (key := options.get("idempotencyKey")) is not None:
            self._digests.add(idempotency_digest(self.tenant.env_id, TASK, key))
        tags = [marker, *options.pop("tags", [])]
        return {"payload": payload(self.ground, marker), "options": {"tags": tags, **options}}

    async def ok(self, method: str, path: str, body: Any = None, *, request_key: str | None = None) -> tuple[int, Any]:
        """Call, and complain of any answer but 200."""
        status, answer = await self.call(method, path, body, request_key=request_key)
        if status != _OK:
            raise AssertionError(f"{self.name}: {method} {path} was answered {status}: {answer}")
        return status, answer

    def of(self, mark: str) -> Promise:
        """Return what is promised of the run with this mark."""
        return self.book.of(mark)

    async def trip(self) -> None:
        """Have this caller's triggers held from now on."""
        await trip(self.mollifier, self._redis, self.environment)

    async def calm(self) -> None:
        """Have them pass from now on."""
        assert self.mollifier.buffer is not None
        keys = self.mollifier.buffer.keyspace.of(self.environment.org_id)
        await execute(self._redis, "DEL", keys.tripped(self.environment.id))

    async def _give_up_on(self, url: str) -> None:
        """Call it no more, where there is another. What it has claimed comes free: that takes a minute, for which no test is to wait."""
        self.went_without_answer += 1
        if len(self._urls) > 1:
            self._urls.remove(url)
        else:
            await asyncio.sleep(0.02)
        eternal = await free_claims(self.mollifier, self._redis, self.environment, self._digests)
        self.book.complaints += [f"{key}: a claim for ever" for key in eternal]
