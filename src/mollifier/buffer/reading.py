"""Looking into the buffer: entries, lists of them, counts. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence

from mollifier import inspection
from mollifier.buffer.part import Part
from mollifier.errors import MalformedEntryError
from mollifier.inspection import Counts
from mollifier.model import Entry


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

    async def held_run_ids(
        self, org_id: str, env_id: str, *, from_ms: int | None = None, newest_first: bool = True
    ) -> list[str]:
        """Return the environment's held runs in the order of their triggers' moments, from `from_ms` on in that direction."""
        key = self.keyspace.of(org_id).held(env_id)
        if newest_first:
            start = "+inf" if from_ms is None else from_ms
            members = await self._server.run("ZRANGE", key, start, "-inf", "BYSCORE", "REV")
        else:
            start = "-inf" if from_ms is None else from_ms
            members = await self._server.run("ZRANGE", key, start, "+inf", "BYSCORE")
        return [member.decode() for member in members]

    async def counts(self) -> Counts:
        """Count everything the buffer holds, over all partitions."""
        return await inspection.count(self._server, self.keyspace)
