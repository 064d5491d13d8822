"""Looking into the buffer: entries, lists of them, counts. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence

from mollifier import inspection
from mollifier.buffer.outcomes import HeldPlace
from mollifier.buffer.part import Part, members_of, scored
from mollifier.caps import Usage
from mollifier.errors import MalformedEntryError
from mollifier.inspection import Counts
from mollifier.keys import parent_number
from mollifier.model import Entry
from mollifier.server import Command


class Reading(Part):
    """The part of the buffer that only looks."""

    async def get_entry(self, org_id: str, run_id: str) -> Entry | None:
        """Return one entry, None when there is none. Raises MalformedEntryError when what is there does not parse."""
        (found,) = await self.get_entries(org_id, [run_id])
        if isinstance(found, MalformedEntryError):
            raise found
        return found

    async def get_entries(self, org_id: str, run_ids: Sequence[str]) -> list[Entry | MalformedEntryError | None]:
        """Return entries of one organization in the given order: None where there is none, an error where one does not parse."""
        found = await inspection.entries(self._server, self.keyspace.of(org_id), run_ids)
        # A partition is shared by organizations: what belongs to a neighbour does not exist here.
        return [None if isinstance(entry, Entry) and entry.org_id != org_id else entry for entry in found]

    async def list_entries(
        self, org_id: str, env_id: str, *, offset: int = 0, limit: int = 100
    ) -> list[Entry | MalformedEntryError]:
        """Return the environment's queued entries, oldest first. References whose entry is gone are passed over."""
        queue = self.keyspace.of(org_id).queue(env_id)
        queued = await self._server.run("ZRANGE", queue, offset, offset + limit - 1)
        found = await self.get_entries(org_id, [run_id.decode() for run_id in queued])
        return [entry for entry in found if entry is not None]

    async def held_places(
        self,
        org_id: str,
        env_id: str,
        *,
        beyond: HeldPlace | None = None,
        newest_first: bool = True,
        limit: int = 100,
        from_us: int | None = None,
        to_us: int | None = None,
    ) -> list[HeldPlace]:
        """Return where the environment's held runs stand, in the order of (created_us, run id): up to `limit` of them beyond a place.

        Fewer than `limit` are the last. `from_us` and `to_us` bound the moments, both included. One round trip. What else was triggered in the
        microsecond of `beyond` is read whole: as many as the largest batch has items.
        """
        key = self.keyspace.of(org_id).held(env_id)
        direction = ("REV",) if newest_first else ()
        first, last = (to_us, from_us) if newest_first else (from_us, to_us)
        start = _bound(first, "+inf" if newest_first else "-inf")
        stop = _bound(last, "-inf" if newest_first else "+inf")
        reads: list[Command] = []
        if beyond is not None:
            at_us = beyond.created_us
            reads.append(("ZRANGE", key, at_us, at_us, "BYSCORE", *direction))
            if first is None or (first >= at_us if newest_first else first <= at_us):
                start = f"({at_us}"
        reads.append(("ZRANGE", key, start, stop, "BYSCORE", *direction, "LIMIT", 0, limit, "WITHSCORES"))
        *same, others = [members_of(reply) for reply in await self._server.run_many(reads)]
        places = [HeldPlace(*place) for place in scored(others)]
        if beyond is not None:
            there = [HeldPlace(beyond.created_us, run_id.decode()) for run_id in same[0]]
            places = [place for place in there if (place < beyond if newest_first else place > beyond)] + places
        return places[:limit]

    async def held_children(self, org_id: str, env_id: str, parent_run_id: str, limit: int) -> list[str]:
        """Return up to `limit` held runs that the run triggered, by id; ids that are made by time have the oldest first. One round trip.

        Another parent with the same `parent_number` has its children among them: the entries tell.
        """
        number = parent_number(parent_run_id)
        key = self.keyspace.of(org_id).children(env_id)
        found = await self._server.run("ZRANGE", key, number, number, "BYSCORE", "LIMIT", 0, limit)
        return [run_id.decode() for run_id in found]

    async def usage(self) -> Usage:
        """Return how much is held, in all, by organization and by environment."""
        return await inspection.usage(self._server, self.keyspace)

    async def counts(self) -> Counts:
        """Count everything the buffer holds, over all partitions."""
        return await inspection.count(self._server, self.keyspace)


def _bound(moment_us: int | None, end: str) -> str:
    return end if moment_us is None else str(moment_us)
