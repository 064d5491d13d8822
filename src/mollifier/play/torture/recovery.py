"""What a killed worker leaves behind: the entries it held, and how long each of them takes to be settled by another one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from mollifier.deadline import within
from mollifier.entries import parse
from mollifier.errors import BufferUnavailableError
from mollifier.inspection import listed
from mollifier.keys import PartitionKeys
from mollifier.model import Entry, EntryState
from mollifier.play.client import percentile
from mollifier.server import Server

_TURN_S = 0.05
_LOOK_MS = 1000.0


class Held(NamedTuple):
    """One entry under a lease, and how often it has been reclaimed by then."""

    keys: PartitionKeys
    run_id: str
    lease: int
    reclaims: int


class Recovered(NamedTuple):
    """One stranded entry: how long after its holder was stopped for good it was settled, and whether something else was at fault meanwhile."""

    seconds: float
    disturbed: bool


class Recoveries:
    """Watches stranded entries through a connection of its own. `clock` counts seconds."""

    def __init__(
        self,
        server: Server,
        partitions: Sequence[PartitionKeys],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._server = server
        self._partitions = partitions
        self._clock = clock
        self._sleep = sleep
        self._watching: set[asyncio.Task[None]] = set()
        self._disturbed_until_s = 0.0
        self._disturbing = 0
        self.recovered: list[Recovered] = []

    async def held(self) -> list[Held]:
        """Return what is under a lease now; nothing while the buffer's server does not answer."""
        try:
            return await within(_LOOK_MS, self._held())
        except (BufferUnavailableError, TimeoutError):
            return []

    def watch(self, entries: Sequence[Held], stopped_s: float) -> None:
        """Watch what a worker held that has done nothing any more since that moment, until the last of it is settled."""
        if entries:
            watching = asyncio.create_task(self._watch(entries, stopped_s))
            self._watching.add(watching)
            watching.add_done_callback(self._watching.discard)

    def disturb(self) -> None:
        """Note that something begins without which entries cannot be settled."""
        self._disturbing += 1

    def calm(self) -> None:
        """Note that it is over."""
        self._disturbing -= 1
        self._disturbed_until_s = self._clock()

    async def finish(self) -> None:
        """Return when everything that is watched has been settled."""
        while self._watching:
            await asyncio.gather(*tuple(self._watching))

    def seconds(self, *, disturbed: bool) -> list[float]:
        """Return how long each took, of those that were disturbed or of those that were not."""
        return [one.seconds for one in self.recovered if one.disturbed == disturbed]

    async def _held(self) -> list[Held]:
        leased = await self._server.run_many([("ZRANGE", keys.draining, 0, -1) for keys in self._partitions])
        found = [
            (keys, run_id.decode())
            for keys, members in zip(self._partitions, leased, strict=True)
            for run_id in listed(members)
        ]
        entries = await self._read(found)
        return [
            Held(keys, entry.run_id, entry.lease, entry.reclaims)
            for (keys, _), entry in zip(found, entries, strict=True)
            if entry is not None and entry.state is EntryState.DRAINING
        ]

    async def _read(self, found: Sequence[tuple[PartitionKeys, str]]) -> list[Entry | None]:
        hashes = await self._server.run_many([("HGETALL", keys.entry(run_id)) for keys, run_id in found])
        parsed = [parse(run_id, fields) for (_, run_id), fields in zip(found, hashes, strict=True)]
        return [entry if isinstance(entry, Entry) else None for entry in parsed]

    async def _watch(self, entries: Sequence[Held], stopped_s: float) -> None:
        """Look until each is settled. Only one that is reclaimed was stranded: another worker held, and settled, the rest."""
        left = list(entries)
        disturbed = self._disturbing > 0
        while left:
            await self._sleep(_TURN_S)
            disturbed = disturbed or self._disturbing > 0 or self._disturbed_until_s >= stopped_s
            try:
                now = await within(_LOOK_MS, self._read([(one.keys, one.run_id) for one in left]))
            except (BufferUnavailableError, TimeoutError):
                continue
            seconds = self._clock() - stopped_s
            for one, entry in zip(tuple(left), now, strict=True):
                if entry is not None and entry.state in (EntryState.DRAINING, EntryState.QUEUED):
                    continue
                left.remove(one)
                if entry is not None and entry.reclaims > one.reclaims:
                    self.recovered.append(Recovered(seconds, disturbed))


def p99_s(seconds: Sequence[float]) -> float | None:
    """Return the 99th percentile, None for nothing."""
    return round(percentile(seconds, 99), 3) if seconds else None
