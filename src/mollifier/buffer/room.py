"""What the caps leave room for, kept up to date while triggers are held; nobody is asked while none are."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest

from mollifier import inspection
from mollifier.buffer.outcomes import Acceptance, Accepted, AcceptOutcome, Unconfirmed
from mollifier.caps import Limits, Overall, capped_in_all, limits
from mollifier.errors import BufferUnavailableError
from mollifier.keys import Keyspace
from mollifier.model import EntryKind
from mollifier.server import Server
from mollifier.settings import Settings

Outcomes = Sequence[AcceptOutcome | BufferUnavailableError]

AGE_MAX_S = 1.0
"""Sums that are older are read again before anything is held by them."""
_AGEING_S = AGE_MAX_S / 2
"""From this age on they are read beforehand, so that nobody has to wait for them in the middle of a burst."""


class Room:
    """Reads what all partitions hold, at most twice a second; `monotonic` returns seconds.

    Every entry is sent by sums that are no older than AGE_MAX_S, or not at all.
    """

    def __init__(
        self,
        server: Server,
        keyspace: Keyspace,
        settings: Callable[[], Settings],
        monotonic: Callable[[], float],
    ) -> None:
        self._server = server
        self._keyspace = keyspace
        self._settings = settings
        self._monotonic = monotonic
        self._overall = Overall()
        self._read_at_s = -math.inf
        self._reading: _Reading | None = None
        self._ahead: asyncio.Task[None] | None = None

    async def look(self) -> None:
        """See to it that the sums are recent. Raises BufferUnavailableError where they are not, and cannot be read."""
        if not capped_in_all(self._settings()):
            return
        if self._age_s >= AGE_MAX_S:
            await self._read(AGE_MAX_S)
        elif self._age_s >= _AGEING_S and (self._ahead is None or self._ahead.done()):
            self._ahead = asyncio.create_task(self._read_ahead(), name="mollifier-room")

    def limits_of(self, org_id: str) -> Limits:
        """Return what may be held of the organization, of each of its environments, and in its partition."""
        return limits(self._settings(), self._overall.beside(self._partition(org_id)))

    def leave(self, entry: Acceptance) -> Limits:
        """Count an entry that is being sent, and return the limits that hold for it. Audit copies are not counted and have none."""
        if entry.kind is EntryKind.AUDIT:
            return Limits()
        most = self.limits_of(entry.org_id)
        self._overall.leave(self._partition(entry.org_id), len(entry.payload))
        return most

    def arrive(self, entries: Sequence[Acceptance], outcomes: Outcomes = ()) -> None:
        """Take note of what became of entries that were sent; of those without an outcome nobody knows: they may be stored."""
        for entry, outcome in zip_longest(entries, outcomes):
            if entry.kind is EntryKind.HELD:
                stored = outcome is None or isinstance(outcome, Accepted | Unconfirmed)
                self._overall.arrive(self._partition(entry.org_id), len(entry.payload), stored=stored)

    def _partition(self, org_id: str) -> int:
        return self._keyspace.of(org_id).number

    @property
    def _age_s(self) -> float:
        return self._monotonic() - self._read_at_s

    async def _read(self, age_s: float) -> None:
        """Read the sums unless they are younger than this. Who comes while they are being read shares what comes of it."""
        while self._age_s >= age_s:
            if self._reading is None:
                await self._read_for_all(_Reading())
            else:
                reading = self._reading
                await reading.is_over.wait()
                if reading.failure is not None:
                    raise BufferUnavailableError(str(reading.failure)) from reading.failure

    async def _read_for_all(self, reading: _Reading) -> None:
        self._reading = reading
        began_s = self._monotonic()
        self._overall.begin_reading()
        try:
            self._overall.end_reading(await inspection.held_sums(self._server, self._keyspace))
            self._read_at_s = began_s
        except BufferUnavailableError as error:
            reading.failure = error
            raise
        finally:
            # One whose caller gave up is over without a failure: of those that waited for it another reads.
            self._reading = None
            reading.is_over.set()

    async def _read_ahead(self) -> None:
        with suppress(BufferUnavailableError):
            await self._read(_AGEING_S)


class _Reading:
    """One reading of the sums, under way."""

    def __init__(self) -> None:
        self.is_over = asyncio.Event()
        self.failure: BufferUnavailableError | None = None
