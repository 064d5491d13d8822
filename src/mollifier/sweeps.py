"""What a sweep found: the report that the gauges, the admin API and the doctor show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import msgspec

Index = Literal["queue", "waiting", "draining", "failed", "held", "owners"]
"""Where a run is named."""
Mismatch = Literal["missing", "late", "empty", "unplaced", "malformed", "usage"]
"""What two parts of the buffer may say differently.

The ready index: an environment or organization with something due is `missing` in it or stands too `late`; one that stands there has
nothing, it is `empty`. `unplaced`: an entry that stands nowhere; `malformed`: one that stands nowhere and does not read as an entry.
`usage`: a sum is not that of the records.
"""
Repair = Literal["missing", "late", "empty", "returned", "leased", "listed", "buried", "dropped"]
"""What was done: to the ready index, as above. To an entry: `returned` to queue or waiting, `leased` so that it is reclaimed unless its
holder lives, `listed` as a dead letter. To one that is gone: `buried`, a dead letter now, or `dropped` where it was named.
"""

INDEXES: tuple[Index, ...] = get_args(Index)
MISMATCHES: tuple[Mismatch, ...] = get_args(Mismatch)

_NUMBERS = ("at_ms", "stale", "oldest_ms", "entries", "held_bytes", "dead_letters")
_TABLES = ("orphans", "mismatches", "repaired")


class SweepReport(msgspec.Struct, frozen=True, kw_only=True):
    """One sweep, which ended at `at_ms` by the server's clock. Tables leave out what is zero.

    `stale` are entries that have been due, and leases that have been over, for longer than any drainer at work lets them; `oldest_ms` is
    the age of the oldest entry that is due. `entries` and `held_bytes` are held in all, by the sums. `orphans` counts where runs were named
    whose entry is gone. What was `repaired` is among the orphans and mismatches of this report, and in the next one no more.
    """

    at_ms: int
    stale: int = 0
    oldest_ms: int = 0
    entries: int = 0
    held_bytes: int = 0
    dead_letters: int = 0
    orphans: Mapping[str, int] = {}
    mismatches: Mapping[str, int] = {}
    repaired: Mapping[str, int] = {}


def to_fields(report: SweepReport) -> list[str]:
    """Return the report as a hash keeps it: name and value, one after the other; `orphans:queue` for what is in a table."""
    fields = {name: getattr(report, name) for name in _NUMBERS}
    for table in _TABLES:
        fields.update({f"{table}:{kind}": number for kind, number in getattr(report, table).items()})
    return [text for name, number in fields.items() for text in (name, str(number))]


def from_fields(fields: Any) -> SweepReport | None:
    """Return the report that the hash says, None where there is none that can be read: another release may have written it."""
    if not fields or isinstance(fields, Exception):
        return None
    values: dict[str, Any] = {table: {} for table in _TABLES}
    try:
        for name, value in cast("Mapping[bytes, bytes]", fields).items():
            table, _, kind = name.decode().partition(":")
            if kind:
                values.get(table, {})[kind] = int(value)
            elif table in _NUMBERS:
                values[table] = int(value)
        return SweepReport(**values)
    except (TypeError, ValueError):
        return None
