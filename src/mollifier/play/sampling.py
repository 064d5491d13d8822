"""A sample of the runs that are held while a play goes on: read, tagged and cancelled as their callers may, and looked up afterwards.

Every one is read, every second one tagged, every third one cancelled, through the public run API. Once the system has come to rest,
Postgres must show each of these changes, and no run that was cancelled while it was held may ever have been executed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import aiohttp
import msgspec

from mollifier.model import RunStatus, Tenant
from mollifier.play.client import Call, Marker
from mollifier.play.evidence import EvidenceError, read_held_runs
from mollifier.play.run_api import Reply, RunApi
from mollifier.play.runs import RunRow, read_runs
from mollifier.postgres.database import Database

SAMPLE_MAX = 80
SAMPLE_AT_ONCE = 6
TURN_S = 0.05
TAG_EVERY = 2
CANCEL_EVERY = 3
_FIRST_ALLOWANCE = 20
_ENVIRONMENTS_AT_ONCE = 4
_CALLS_KEPT = 20_000

HeldIn = Callable[[str], Awaitable[Sequence[str]]]
"""Names the runs that an environment has in the buffer."""


class SampleFigures(NamedTuple):
    """What became of the sample; `too_late` are cancellations of runs that had been created and started before the answer."""

    sampled: int
    retrieved: int
    tagged: int
    cancelled: int
    too_late: int
    faults: tuple[str, ...]


class Sampled(msgspec.Struct):
    """One run of the sample. `read_at` and `cancelled_at` are when the answers had arrived; `tag` is the one that was added."""

    run_id: str
    read_at: datetime
    was_held: bool
    tag: str | None = None
    cancelled_at: datetime | None = None


class Sampler:
    """Takes the sample, spread over a play of `span_s` seconds. `clock` counts seconds, `now` is the moment in UTC."""

    def __init__(
        self,
        tenants: Sequence[Tenant],
        marker: Marker,
        *,
        span_s: float,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._waiting = deque(tenants)
        self._marker = marker
        self._span_s = span_s
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._sent: dict[int, Call] = {}
        self._seen: set[str] = set()
        self._sample: list[Sampled] = []
        self._faults: list[str] = []
        self._taken = 0
        self._unread = 0

    def sent(self, call: Call) -> None:
        """Remember what the call sent, to compare its run with; the latest calls are kept."""
        self._sent[call.number] = call
        while len(self._sent) > _CALLS_KEPT:
            del self._sent[next(iter(self._sent))]

    @asynccontextmanager
    async def sampling(
        self, http: aiohttp.ClientSession, api_urls: Sequence[str], admin_token: str, task_id: str
    ) -> AsyncGenerator[None]:
        """Take the sample while the block runs. What is under way at its end is finished: a change without its answer proves nothing."""
        ends = asyncio.Event()
        api = RunApi(http, api_urls)
        held = partial(read_held_runs, http, api_urls[0], admin_token)

        async def take() -> None:
            started_s = self._clock()
            while not ends.is_set():
                # Asked of a system whose database may be away just now: nobody is sampled then.
                with suppress(EvidenceError):
                    await self._turn(held, api, task_id, self._clock() - started_s)
                await self._sleep(TURN_S)

        taking = asyncio.create_task(take())
        try:
            yield
        except BaseException:
            taking.cancel()
            raise
        finally:
            ends.set()
            with suppress(asyncio.CancelledError):
                await taking

    async def figures(self, database: Database) -> SampleFigures:
        """Compare the sample with the runs in the database: call it once every held run has been created."""
        rows = await read_runs(database, [each.run_id for each in self._sample])
        return judge(self._sample, rows, self._faults, unread=self._unread)

    async def _turn(self, held: HeldIn, api: RunApi, task_id: str, elapsed_s: float) -> None:
        share = elapsed_s / self._span_s if self._span_s > 0 else 1.0
        room = min(SAMPLE_MAX, max(_FIRST_ALLOWANCE, int(SAMPLE_MAX * share))) - self._taken
        for tenant in islice(tuple(self._waiting), _ENVIRONMENTS_AT_ONCE):
            if room <= 0:
                return
            self._waiting.rotate(-1)
            # The newest are held the longest from here on.
            fresh = [run_id for run_id in await held(tenant.env_id) if run_id not in self._seen][
                -min(room, SAMPLE_AT_ONCE) :
            ]
            self._seen.update(fresh)
            room -= len(fresh)
            await asyncio.gather(*(self._try(api, tenant, run_id, task_id) for run_id in fresh))

    async def _try(self, api: RunApi, tenant: Tenant, run_id: str, task_id: str) -> None:
        reply = await api.get(tenant, run_id)
        if not reply.is_ok:
            self._unread += 1
            self._refused("reading it", run_id, reply)
            return
        details = msgspec.json.decode(reply.body)
        sampled = Sampled(run_id, self._now(), was_held=details["status"] == RunStatus.QUEUED)
        self._sample.append(sampled)
        self._compare(run_id, details, task_id)
        if not sampled.was_held:
            return
        number, self._taken = self._taken, self._taken + 1
        if number % TAG_EVERY == 0:
            tag = f"sampled-{number}"
            if (reply := await api.add_tag(tenant, run_id, tag)).is_ok:
                sampled.tag = tag
            else:
                self._refused("tagging it", run_id, reply)
        if number % CANCEL_EVERY == 0:
            if (reply := await api.cancel(tenant, run_id)).is_ok:
                sampled.cancelled_at = self._now()
            else:
                self._refused("cancelling it", run_id, reply)

    def _compare(self, run_id: str, details: Mapping[str, Any], task_id: str) -> None:
        number = self._marker.call_of(details["tags"])
        if details["id"] != run_id or details["taskIdentifier"] != task_id or number is None:
            self._faults.append(f"{run_id}, read while it was held, is another run or has lost its task or its tags")
        elif number in self._sent and details["payload"] != msgspec.json.decode(self._sent[number].body)["payload"]:
            self._faults.append(f"{run_id}, read while it was held, has another payload than was sent")

    def _refused(self, what: str, run_id: str, reply: Reply) -> None:
        said = reply.body[:200].decode(errors="replace")
        self._faults.append(f"{run_id} was held, and {what} was answered {reply.status}: {said}")


def judge(
    sample: Iterable[Sampled], rows: Mapping[str, RunRow], faults: Sequence[str] = (), *, unread: int = 0
) -> SampleFigures:
    """Compare the sample with its runs as the database has them; pure. `faults` are those found before, `unread` runs among them.

    A run that had started when it was first read was no longer held: it is not of the sample.
    """
    found = list(faults)
    sampled = unread
    retrieved = tagged = cancelled = too_late = 0
    for each in sample:
        row = rows.get(each.run_id)
        if row is None:
            sampled += 1
            found.append(f"{each.run_id} was held and is no run")
            continue
        if not each.was_held:
            if not row.started_by(each.read_at):
                sampled += 1
                found.append(f"{each.run_id} was held, and did not read as QUEUED")
            continue
        sampled += 1
        retrieved += 1
        if each.tag is not None:
            if each.tag in row.tags:
                tagged += 1
            else:
                found.append(f"{each.run_id} was tagged while it was held, and its run lacks the tag")
        if each.cancelled_at is not None:
            if row.started_by(each.cancelled_at):
                too_late += 1
            elif row.status == RunStatus.CANCELED and row.attempt_count == 0 and row.started_at is None:
                cancelled += 1
            else:
                found.append(f"{each.run_id} was cancelled while it was held, and its run is {row.status}")
    return SampleFigures(sampled, retrieved, tagged, cancelled, too_late, tuple(found))
