"""How much may be held: caps on entries and on their bytes, per environment, per organization, and in all.

A cap bounds what the buffer's server keeps of one environment, so that a burst of one leaves room for the bursts of all others. What is
held of an environment and of its organization is in one partition, whose sums the accepting script reads: these caps are exact.
What is held in all is spread over the partitions, and no script sees more than its own. So the script is told what the others leave of
the cap to its partition: as they were when they were last read, with what this process has sent there since (`Overall`). So the cap in
all may be exceeded by what other processes put into other partitions within the age of a reading, and by entries that overtake each
other on their way, of which there are no more than triggers under way at that moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from mollifier.settings import Settings

Cap = Literal[
    "held_env_max_entries",
    "held_env_max_bytes",
    "held_org_max_entries",
    "held_org_max_bytes",
    "held_max_entries",
    "held_max_bytes",
]
"""A cap, by its setting."""

CAPS: tuple[Cap, ...] = get_args(Cap)
"""In the order in which they are looked at: the narrowest first."""

ENV_CAPS, ORG_CAPS = CAPS[:2], CAPS[2:4]

NO_CAP = 2**53 - 1
"""More than is ever held, and exact in a script."""


NOTHING_HELD = (0,) * len(CAPS)
"""The sums of an empty buffer."""


class Amount(NamedTuple):
    """So many entries, and so many bytes of what they carry."""

    entries: int = 0
    bytes: int = 0


class Limits(NamedTuple):
    """The most that may be held, in the order of CAPS; the last two are of the partition, as far as the others leave it."""

    env_max_entries: int = NO_CAP
    env_max_bytes: int = NO_CAP
    org_max_entries: int = NO_CAP
    org_max_bytes: int = NO_CAP
    max_entries: int = NO_CAP
    max_bytes: int = NO_CAP


class Usage(NamedTuple):
    """How much is held: in all, of each organization and of each environment."""

    total: Amount
    orgs: Mapping[str, Amount]
    envs: Mapping[str, Amount]


class CapUse(NamedTuple):
    """A cap that is set, and how much of it is in use: by the environment or organization that has most, or, with no owner, in all."""

    cap: Cap
    most: int
    held: int
    owner_id: str = ""


def uses(settings: Settings, usage: Usage) -> list[CapUse]:
    """Return how much of each cap is in use."""
    found: list[CapUse] = []
    amounts_of: Sequence[Mapping[str, Amount]] = (usage.envs, usage.orgs, {"": usage.total})
    for place, cap in enumerate(CAPS):
        held = {owner_id: amount[place % 2] for owner_id, amount in amounts_of[place // 2].items()}
        fullest = max(held, key=lambda owner_id: held[owner_id], default="")
        most: int = getattr(settings, cap)
        if most:
            found.append(CapUse(cap, most, held.get(fullest, 0), fullest))
    return found


def capped_in_all(settings: Settings) -> bool:
    """Tell whether there is a cap on everything together."""
    return settings.held_max_entries > 0 or settings.held_max_bytes > 0


def limits(settings: Settings, beside: Amount | None = None) -> Limits:
    """Return what may be held in a partition, with so much in all others."""
    most = Limits(*(getattr(settings, cap) or NO_CAP for cap in CAPS))
    if beside is None:
        return most
    return most._replace(max_entries=most.max_entries - beside.entries, max_bytes=most.max_bytes - beside.bytes)


def exceeded(sums: Sequence[int], most: Limits, more: Amount) -> Cap | None:
    """Return the first cap that so much more on top of the sums (in the order of CAPS) would exceed; `lua/accept.lua` does the same."""
    for place, cap in enumerate(CAPS):
        if sums[place] + more[place % 2] > most[place]:
            return cap
    return None


def sum_names(env_id: str, org_id: str) -> tuple[str, ...]:
    """Name the sums of the hash `usage` that the caps are about, in the order of CAPS; `lua/lib/usage.lua` does the same."""
    scopes = (f":env:{env_id}", f":org:{org_id}", "")
    return tuple(f"{noun}{scope}" for scope in scopes for noun in ("entries", "bytes"))


class Overall:
    """What is held in all, as one process knows it: sums that were read, and what it has sent to each partition since.

    What was on its way when a reading began may be in it or not, so it counts as sent since.
    """

    def __init__(self) -> None:
        self._read = _Tally()
        self._sent = _Tally()
        self._under_way = _Tally()
        self._sent_since_reading_began = _Tally()

    def beside(self, partition: int) -> Amount:
        """Return what all other partitions hold."""
        read, sent = self._read.beside(partition), self._sent.beside(partition)
        return Amount(read.entries + sent.entries, read.bytes + sent.bytes)

    def leave(self, partition: int, entry_bytes: int) -> None:
        """Count an entry that is being sent to the partition."""
        for tally in (self._under_way, self._sent, self._sent_since_reading_began):
            tally.add(partition, 1, entry_bytes)

    def arrive(self, partition: int, entry_bytes: int, *, stored: bool) -> None:
        """Take note of what became of it; what is not known to be refused counts as stored."""
        refused = () if stored else (self._sent, self._sent_since_reading_began)
        for tally in (self._under_way, *refused):
            tally.add(partition, -1, -entry_bytes)

    def begin_reading(self) -> None:
        """Take note that the sums are about to be read."""
        self._sent_since_reading_began = _Tally(self._under_way.amounts)

    def end_reading(self, sums: Mapping[int, Amount]) -> None:
        """Take the sums of the partitions, as read since `begin_reading`."""
        self._read, self._sent = _Tally(sums), _Tally(self._sent_since_reading_began.amounts)


class _Tally:
    """Amounts by partition, and all of them together."""

    def __init__(self, amounts: Mapping[int, Amount] | None = None) -> None:
        self.amounts = {partition: amount for partition, amount in (amounts or {}).items() if any(amount)}
        self._entries = sum(amount.entries for amount in self.amounts.values())
        self._bytes = sum(amount.bytes for amount in self.amounts.values())

    def add(self, partition: int, entries: int, by: int) -> None:
        before = self.amounts.get(partition, Amount())
        self.amounts[partition] = Amount(before.entries + entries, before.bytes + by)
        self._entries += entries
        self._bytes += by

    def beside(self, partition: int) -> Amount:
        own = self.amounts.get(partition, Amount())
        return Amount(self._entries - own.entries, self._bytes - own.bytes)
