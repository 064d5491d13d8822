"""4. One sweep: everything that the buffer holds is looked at, counted, and put right where that can be told from the thing itself.

Scripts move an entry and what names it in one step, so nothing of this is found on a server that keeps what it is given. One that
evicts keys, a hand, or a defect can part them: then an entry waits for a drainer that is never told of it, and nobody hears of that.

A sweep goes through the partitions, one environment after the other, in pieces of a hundred runs. What it sees between two pieces
may have changed already; so every judgement, and every repair, is a script's that looks again. What is repaired can be told from the
entry itself: where it belongs, and that the ready index has to name its environment. What takes more to tell is counted only: sums
(no script sees all the records that make one up, and one that is wrong may be so by entries that are gone), entries that do not read as
entries, and what a living holder has in its hands.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from mollifier.buffer import Buffer, Chunk, Cursor, Look, Ready, Survey
from mollifier.buffer.mending import START
from mollifier.errors import BufferUnavailableError
from mollifier.findings import tell_evicted
from mollifier.inspection import STALLED_MS
from mollifier.keys import PartitionKeys
from mollifier.scripts import Books, Restored
from mollifier.sweeps import Repair, SweepReport
from mollifier.telemetry import Telemetry

log = logging.getLogger(__name__)

_DONE: Mapping[str, Repair] = {
    "returned": "returned",
    "leased": "leased",
    "listed": "listed",
    "evicted": "buried",
    "dropped": "dropped",
}
_ENVIRONMENT_COST = 10
"""What looking at an environment costs, counted in runs."""


class Sweep:
    """One sweep over a buffer; it can be broken off between any two pieces. `report` has what was found, once all are done."""

    def __init__(self, buffer: Buffer, telemetry: Telemetry, *, stalled_ms: int = STALLED_MS) -> None:
        self._buffer = buffer
        self._telemetry = telemetry
        self._stalled_ms = stalled_ms
        self._totals: Counter[str] = Counter()
        self._orphans: Counter[str] = Counter()
        self._mismatches: Counter[str] = Counter()
        self._repaired: Counter[str] = Counter()
        self._oldest_ms = 0
        self.report: SweepReport | None = None

    async def pieces(self) -> AsyncGenerator[int]:
        """Sweep piece by piece; each yields how many runs it looked at. Raises BufferUnavailableError when the server gives no answer."""
        for keys in self._buffer.keyspace.partitions:
            survey = await self._buffer.survey(keys)
            for environment, drawn in survey.environments.items():
                async for cost in self._environment(keys, environment, drawn, survey.now_ms):
                    yield cost
            for org_id in survey.idle:
                await self._repair(Ready(org_id, ""))
            await self._add_up(keys, survey)
            async for cost in self._leases(keys, survey.now_ms):
                yield cost
            async for cost in self._letters(keys):
                yield cost
        self.report = SweepReport(
            at_ms=await self._buffer.now_ms(),
            stale=self._totals["stale"],
            oldest_ms=self._oldest_ms,
            entries=self._totals["entries"],
            held_bytes=self._totals["held_bytes"],
            dead_letters=self._totals["dead_letters"],
            orphans=dict(+self._orphans),
            mismatches=dict(+self._mismatches),
            repaired=dict(+self._repaired),
        )

    # --- an environment --------------------------------------------------------------------------------------------

    async def _environment(
        self, keys: PartitionKeys, environment: Ready, drawn: Sequence[str], now_ms: int
    ) -> AsyncGenerator[int]:
        held, waiting, queue = (of(environment.env_id) for of in (keys.held, keys.waiting, keys.queue))
        walks: dict[str, Cursor] = dict.fromkeys((held, waiting, queue), START)
        ledger = Ledger()
        unseen = set(drawn)
        while walks:
            chunks = dict(zip(walks, await self._buffer.chunks(list(walks.items())), strict=True))
            runs = {key: _runs(chunk, key == waiting) for key, chunk in chunks.items()}
            # A set without members needs no look, except that held has to be as long as its sum says.
            asked = {key: of_it for key, of_it in runs.items() if of_it or key == held}
            replies = await self._restore([Look(keys, environment, of_it) for of_it in asked.values()])
            gone: set[str] = set()
            for key, reply in zip(asked, replies, strict=True):
                if key == held:
                    ledger.enter(reply)
                if reply is not None:
                    gone |= self._note(environment, reply)
                    if key != held:
                        self._note_age(reply, now_ms)
            walks = {}
            for key, chunk in chunks.items():
                unseen.difference_update(run_id for run_id, _ in runs[key])
                beyond = chunk.beyond({member or run_id for run_id, member in runs[key] if run_id in gone})
                if beyond is not None:
                    walks[key] = beyond
            yield _ENVIRONMENT_COST + sum(map(len, runs.values()))
        self._mismatches["usage"] += not ledger.adds_up
        for reply in await self._restore(
            [Look(keys, environment, [(run_id, "") for run_id in unseen])] if unseen else []
        ):
            if reply is not None:
                self._note(environment, reply)
        await self._repair(environment)

    async def _restore(self, looks: Sequence[Look]) -> list[Restored | None]:
        """Have runs put back; None for a look that the server refused, as one whose memory is full may."""
        replies = await self._buffer.restore_many(looks, stalled_ms=self._stalled_ms)
        for reply in replies:
            if isinstance(reply, BufferUnavailableError):
                self._telemetry.faulted("sweep", reply)
        return [reply if isinstance(reply, Restored) else None for reply in replies]

    def _note(self, environment: Ready, found: Restored) -> set[str]:
        """Count and tell what was done about runs; return those that were taken out where they were named."""
        done: dict[Repair, list[str]] = {}
        for run_id, verdict, named in found.verdicts:
            self._orphans.update(named)
            if verdict not in ("evicted", "dropped"):
                self._mismatches["malformed" if verdict == "malformed" else "unplaced"] += 1
            if verdict in _DONE:
                done.setdefault(_DONE[verdict], []).append(run_id)
        for kind, run_ids in done.items():
            if kind == "buried":
                tell_evicted(run_ids, self._telemetry)
            self._tell(kind, len(run_ids), environment, run_ids=run_ids)
        return {*done.get("buried", ()), *done.get("dropped", ())}

    def _note_age(self, found: Restored, now_ms: int) -> None:
        self._totals["stale"] += found.stale
        if found.oldest_at_ms is not None:
            self._oldest_ms = max(self._oldest_ms, now_ms - found.oldest_at_ms)

    async def _repair(self, environment: Ready) -> None:
        (verdicts,) = await self._buffer.repair_many([environment])
        if isinstance(verdicts, BufferUnavailableError):
            self._telemetry.faulted("sweep", verdicts)
            return
        for level, kind in zip(("environment", "organization"), verdicts, strict=True):
            if kind:
                self._mismatches[kind] += 1
                self._tell(kind, 1, environment, level=level)

    def _tell(self, kind: Repair, number: int, environment: Ready, **more: Any) -> None:
        self._repaired[kind] += number
        self._telemetry.repaired(kind, number)
        fields = {"kind": kind, "org_id": environment.org_id, "env_id": environment.env_id, **more}
        log.warning("mollifier.index_repaired", extra={"fields": fields})

    # --- a partition -----------------------------------------------------------------------------------------------

    async def _add_up(self, keys: PartitionKeys, survey: Survey) -> None:
        """Compare the sums with one another, and those of environments that nothing else tells of with what is held."""
        usage = survey.usage
        self._totals["entries"] += usage.get("entries", 0)
        self._totals["held_bytes"] += usage.get("bytes", 0)
        self._mismatches["usage"] += differing_sums(usage)
        for found in await self._restore([Look(keys, Ready("", env_id)) for env_id in survey.unowned]):
            self._mismatches["usage"] += found is not None and found.books.listed != found.books.entries

    async def _leases(self, keys: PartitionKeys, now_ms: int) -> AsyncGenerator[int]:
        """Count leases that nobody takes up, and those whose entry is gone: whoever reclaims them deals with them."""
        at: Cursor | None = START
        while at is not None:
            (chunk,) = await self._buffer.chunks([(keys.draining, at)])
            self._totals["stale"] += sum(end_ms < now_ms - self._stalled_ms for _, end_ms in chunk.members)
            self._orphans["draining"] += len(await self._buffer.vanished(keys, [run_id for run_id, _ in chunk.members]))
            at = chunk.beyond()
            yield len(chunk.members)

    async def _letters(self, keys: PartitionKeys) -> AsyncGenerator[int]:
        """Drop dead letters of which nothing is left, as of audit copies that expired; one that was buried has its record."""
        at: Cursor | None = START
        while at is not None:
            (chunk,) = await self._buffer.chunks([(keys.failed, at)])
            vanished = await self._buffer.vanished(keys, [run_id for run_id, _ in chunk.members])
            forgotten = [(run_id, "") for run_id, has_record in vanished.items() if not has_record]
            gone: set[str] = set()
            for reply in await self._restore([Look(keys, Ready("", ""), forgotten)] if forgotten else []):
                gone |= self._note(Ready("", ""), reply) if reply is not None else set()
            at = chunk.beyond(gone)
            yield len(chunk.members)
        self._totals["dead_letters"] += await self._buffer.dead_letters(keys)


class Ledger:
    """Whether the sums of an environment are those of its records, entered a hundred held runs at a time."""

    def __init__(self) -> None:
        self._first: Books | None = None
        self._last: Books | None = None
        self._bytes = 0
        self._is_whole = True

    def enter(self, found: Restored | None) -> None:
        """Take note of the next held runs; None where they could not be looked at."""
        if found is None:
            self._is_whole = False
            return
        self._first = self._first or found.books
        self._last = found.books
        self._bytes += found.held_bytes

    @property
    def adds_up(self) -> bool:
        """False when the sums are wrong; true also where that cannot be told.

        How many are held is told by one script. What they take is told by several, so only where nothing came or went meanwhile: whatever
        does changes the partition's counter, the number of those held, or the sums.
        """
        if self._last is None or not self._is_whole:
            return True
        if self._last.listed != self._last.entries:
            return False
        return self._first != self._last or self._bytes == self._last.held_bytes


def differing_sums(usage: Mapping[str, int]) -> int:
    """Return how many of the sums by environment, and by organization, do not make up the whole."""
    return sum(
        sum(number for name, number in usage.items() if name.startswith(f"{noun}:{scope}:")) != usage.get(noun, 0)
        for noun in ("entries", "bytes")
        for scope in ("env", "org")
    )


def _runs(chunk: Chunk, has_sequence: bool) -> list[tuple[str, str]]:  # noqa: FBT001 - one of two kinds of members
    """Return the runs that the members name, and of those of waiting, which begin with the sequence, the member itself."""
    if has_sequence:
        return [(member.partition(":")[2], member) for member, _ in chunk.members]
    return [(member, "") for member, _ in chunk.members]
