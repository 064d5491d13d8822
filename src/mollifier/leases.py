"""4. Leases: what this process has in its hands, kept for as long as it works on it, and what dead processes left behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from mollifier.buffer import Buffer
from mollifier.findings import tell_reclaimed
from mollifier.model import Entry
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry


class Leases:
    """The leases of one process. `sleep` takes seconds."""

    def __init__(
        self,
        buffer: Buffer,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._buffer = buffer
        self._settings = settings
        self._telemetry = telemetry
        self._sleep = sleep
        # By run and lease: lease numbers repeat among partitions, and a run may come back under a new lease.
        self._held: dict[tuple[str, int], Entry] = {}

    def __len__(self) -> int:
        """Return how many entries are popped and not settled yet."""
        return len(self._held)

    def take(self, entries: Sequence[Entry]) -> None:
        """Keep the leases of these entries from now on."""
        self._held.update(((entry.run_id, entry.lease), entry) for entry in entries)

    def drop(self, entries: Sequence[Entry]) -> None:
        """Keep them no longer: the entries are settled, or left to whoever comes after this process."""
        for entry in entries:
            self._held.pop((entry.run_id, entry.lease), None)

    async def keep(self, is_ended: Callable[[], bool]) -> None:
        """Extend the leases of what is being handled here, and put back what dead holders left, three times a lease.

        What is found is put back in portions, one after the other: however much it is, the last of it does not wait for a third of a lease more.
        """
        is_more = False
        while not is_ended():
            if not is_more:
                await self._sleep(self._settings().lease_ms / 3000)
            try:
                if self._held:
                    await self._buffer.extend_many(list(self._held.values()))
            except Exception as error:  # noqa: BLE001 - the loop outlives any fault
                self._telemetry.faulted("extend", error)
            is_more = False
            try:
                reclaimed = await self._buffer.reclaim_expired()
                is_more = reclaimed.number > 0
                tell_reclaimed(reclaimed, self._telemetry)
            except Exception as error:  # noqa: BLE001 - the loop outlives any fault
                self._telemetry.faulted("reclaim", error)
