"""3. The buffer: the durable store of held triggers. Every change of state is one atomic script.

Operations take many at once, one being the special case: a batch travels in one round trip. Reads never change anything, and
an entry that does not parse is reported, never the end of a reader.

`outcomes` has the values that go in and come out; `storing`, `taking`, `settling`, `mending` with `reporting`, `reading` and `letters` have
the operations, by who needs them: the trigger path, the drainer's pops, the holders of leases, the sweeper, everybody, and whoever
looks after what died.
"""

from __future__ import annotations

from mollifier.buffer.letters import Letters
from mollifier.buffer.mending import Chunk, Cursor, Look, Mending, Survey
from mollifier.buffer.outcomes import (
    Acceptance,
    Accepted,
    AcceptOutcome,
    Binding,
    Bound,
    Claimed,
    ClaimOutcome,
    Disposal,
    Doubted,
    DuplicateKey,
    DuplicateRun,
    HeldPlace,
    KeyClaimed,
    OverCap,
    Popped,
    Ready,
    Reclaimed,
    Revival,
    Unconfirmed,
)
from mollifier.buffer.reading import Reading
from mollifier.buffer.reporting import Reporting
from mollifier.buffer.settling import Settling
from mollifier.buffer.storing import Storing
from mollifier.buffer.taking import Taking
from mollifier.errors import SettingsError
from mollifier.keys import ENGINE_AWAY, PARTITIONS
from mollifier.settings import variable

__all__ = [
    "AcceptOutcome",
    "Acceptance",
    "Accepted",
    "Binding",
    "Bound",
    "Buffer",
    "Chunk",
    "ClaimOutcome",
    "Claimed",
    "Cursor",
    "Disposal",
    "Doubted",
    "DuplicateKey",
    "DuplicateRun",
    "HeldPlace",
    "KeyClaimed",
    "Look",
    "OverCap",
    "Popped",
    "Ready",
    "Reclaimed",
    "Revival",
    "Survey",
    "Unconfirmed",
]


class Buffer(Storing, Taking, Settling, Mending, Reporting, Reading, Letters):
    """One buffer on one server. Every method raises BufferUnavailableError when the server gives no answer."""

    async def claim_layout(self) -> None:
        """Record the number of partitions at the first boot; raise SettingsError when the buffer was made with another."""
        await self._server.run("SET", PARTITIONS, len(self.keyspace.partitions), "NX")
        await self.check_layout()

    async def check_layout(self) -> None:
        """Raise SettingsError when the buffer was made with another number of partitions; one that was never made has none."""
        wanted = len(self.keyspace.partitions)
        recorded = await self._server.run("GET", PARTITIONS)
        if recorded is not None and int(recorded) != wanted:
            detail = f"is {wanted}, but this buffer was made with {int(recorded)}; entries would be out of reach. Set it back"
            raise SettingsError(variable("partitions"), detail)

    async def tell_engine_away(self, lifetime_ms: int) -> None:
        """Have others know, for so long, that a drainer finds the run engine away or failing."""
        await self._server.run("SET", ENGINE_AWAY, 1, "PX", lifetime_ms)

    async def tell_engine_back(self) -> None:
        """Have others know it no more."""
        await self._server.run("DEL", ENGINE_AWAY)

    async def is_engine_away(self) -> bool:
        """Return whether some drainer has found the run engine away or failing of late."""
        return bool(await self._server.run("EXISTS", ENGINE_AWAY))

    async def ping(self) -> None:
        """Return when the server answers."""
        await self._server.run("PING")
