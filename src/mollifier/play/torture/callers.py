"""The callers of a torture: they send orders to whichever API process answers, and note what they are told.

A caller behaves as a client library does. Where nobody listens the next process is tried, as a load balancer would; a named request is
sent again until it is answered, under the same name; any other is sent once, and one without an answer stays unknown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple

import aiohttp
import msgspec

from mollifier.model import Tenant
from mollifier.play.client import Marker
from mollifier.play.run_api import Reply, RunApi
from mollifier.play.torture.ledger import Ledger
from mollifier.play.torture.orders import Order, Then, Want, payload_of
from mollifier.request import REQUEST_KEY

TASK = "echo"
CALL_TIMEOUT_S = 45.0
# Longer than the claim of an API process that died with it lives.
PERSISTENCE_S = 100.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 3.0
_DELAY = "2s"


class Answered(NamedTuple):
    """One answer. `reached` is False when nobody listened: then no call was made at all. Without an answer `status` is 0."""

    status: int
    body: bytes
    reached: bool = True

    @property
    def is_final(self) -> bool:
        """Whether sending it again would be answered the same."""
        return self.reached and self.status not in (0, HTTPStatus.TOO_MANY_REQUESTS) and self.status < 500  # noqa: PLR2004 - 5xx


class Callers:
    """Sends the orders of one torture. `ledger` has what came of them."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        api_urls: Sequence[str],
        tenants: Sequence[Tenant],
        marker: Marker,
        *,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = http
        self._urls = api_urls
        self._tenants = tenants
        self._marker = marker
        self._seed = seed
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._runs = RunApi(http, api_urls)
        self.ledger = Ledger()

    async def send_all(self, orders: Iterator[Order], until: asyncio.Event) -> None:
        """Send each order at its time until told to stop; return when the last of them has come to an end."""
        started_s = self._clock()
        async with asyncio.TaskGroup() as under_way:
            for order in orders:
                wait_s = started_s + order.at_s - self._clock()
                if wait_s > 0:
                    await self._sleep(wait_s)
                if until.is_set():
                    return
                under_way.create_task(self.send(order))

    async def send(self, order: Order) -> None:
        """Send one order, and do with its run what is to be done then."""
        ledger = self.ledger
        ledger.offer(order)
        path, body, headers = self._request(order)
        answered = await self._persist(order, path, body, headers)
        match answered.status:
            case HTTPStatus.OK:
                run_id = "" if order.want is Want.BATCH else _id_of(answered.body)
                ledger.accept(order, run_id)
                await self._follow(order, run_id)
            case 0 if answered.reached:
                ledger.unknown += order.calls
            case status if status in range(400, 500):
                ledger.rejected += order.calls
                ledger.complain(f"{status}: {_said(answered.body)}")
            case status:
                ledger.errors += order.calls
                ledger.complain(f"{status or 'nobody listens'}: {_said(answered.body)}")

    # --- sending ---------------------------------------------------------------------------------------------------

    def _request(self, order: Order) -> tuple[str, bytes, dict[str, str]]:
        headers = {"Authorization": f"Bearer {self._tenants[order.tenant].api_key}", "Content-Type": "application/json"}
        if order.want in (Want.NAMED, Want.BATCH):
            headers[REQUEST_KEY] = f"request-{order.number}"
        if order.want is Want.BATCH:
            items = [
                b'{"task":"%b",%b' % (TASK.encode(), self._trigger(order, order.trial + place)[1:])
                for place in range(order.calls)
            ]
            return "/api/v2/tasks/batch", b'{"items":[%b]}' % b",".join(items), headers
        return f"/api/v1/tasks/{TASK}/trigger", self._trigger(order, order.trial), headers

    def _trigger(self, order: Order, trial: int) -> bytes:
        options: dict[str, Any] = {"tags": [self._marker.tag(trial)]}
        if order.want is Want.SHARED:
            options["idempotencyKey"] = f"key-{trial}"
        if order.want is Want.DELAYED:
            options["delay"] = _DELAY
        return b'{"payload":%b,"options":%b}' % (payload_of(self._seed, trial), msgspec.json.encode(options))

    async def _persist(self, order: Order, path: str, body: bytes, headers: dict[str, str]) -> Answered:
        """Send it, again for as long as it pays: a named request until it is answered, any other until somebody listens."""
        give_up_s = self._clock() + PERSISTENCE_S
        pause_s = _FIRST_PAUSE_S
        while True:
            answered = await self._try_each(order, path, body, headers)
            may_be_repeated = order.want in (Want.NAMED, Want.BATCH) or not answered.reached
            if answered.is_final or not may_be_repeated or self._clock() > give_up_s:
                return answered
            self.ledger.retries += 1
            await self._sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    async def _try_each(self, order: Order, path: str, body: bytes, headers: dict[str, str]) -> Answered:
        """Send it to the API processes in turn, until one is there to take it."""
        answered = Answered(0, b"", reached=False)
        for place in range(len(self._urls)):
            url = self._urls[(order.number + place) % len(self._urls)]
            answered = await self._post(url + path, body, headers)
            if answered.reached:
                return answered
        return answered

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> Answered:
        try:
            async with self._http.post(url, data=body, headers=headers) as response:
                return Answered(response.status, await response.read())
        except aiohttp.ClientConnectorError as error:
            return Answered(0, str(error).encode(), reached=False)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return Answered(0, f"{type(error).__name__}: {error}".encode())

    # --- afterwards ------------------------------------------------------------------------------------------------

    async def _follow(self, order: Order, run_id: str) -> None:
        """Read, tag or cancel the run, wherever it is by now."""
        tenant = self._tenants[order.tenant]
        match order.then:
            case Then.NOTHING:
                pass
            case Then.READ:
                self._expect("reading", await self._runs.get(tenant, run_id))
            case Then.TAG:
                tag = f"tagged-{order.number}"
                if self._expect("tagging", await self._runs.add_tag(tenant, run_id, tag)):
                    self.ledger.tags[run_id] = tag
            case Then.CANCEL:
                if self._expect("cancelling", await self._runs.cancel(tenant, run_id)):
                    self.ledger.cancelled_at[run_id] = self._now()

    def _expect(self, what: str, reply: Reply) -> bool:
        """Note a reply that should not be: the id of an accepted run works everywhere at once."""
        if not reply.is_ok:
            self.ledger.refused_changes += 1
            self.ledger.complain(f"{what} an accepted run: {reply.status}: {_said(reply.body)}")
        return reply.is_ok


class _Answer(msgspec.Struct):
    id: str


class _Problem(msgspec.Struct):
    error: str = ""


def _id_of(body: bytes) -> str:
    return msgspec.json.decode(body, type=_Answer).id


def _said(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Problem).error[:200]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode(errors="replace")
