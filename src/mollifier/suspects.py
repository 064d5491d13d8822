"""4. Suspects: entries whose handlers died, handled so that one deadly entry takes few others with it.

A process that dies leaves everything behind that it had in hand, of which one entry at most is to blame. Handled together again,
the others would come back as often as that one, and be given up with it. So what has come back is handled one at a time, after what
has not, in an order that is drawn anew each time. Whatever comes before the deadly one is settled when that kills, so half of the
others get through each time, and to share ten deaths with it takes bad luck of one in a thousand.

What has come back too often is not handled at all but given up, before the other suspects: it becomes a failure that everybody can
see. Should that be deadly too, `reclaim` makes a dead letter of it after `GIVE_UPS_MAX` more returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from mollifier.errors import NonRetryableError
from mollifier.model import Entry


class ReclaimLimitError(NonRetryableError):
    """The entry came back too often from those who died, or hung, while they handled it."""

    def __init__(self, reclaims: int) -> None:
        super().__init__(f"its lease ran out {reclaims} times; whoever handled it died or hung each time")


class Turn(msgspec.Struct, frozen=True):
    """Entries to be handled together or, where there is an `error`, to be given up for it."""

    entries: tuple[Entry, ...]
    error: ReclaimLimitError | None = None


def turns(entries: Sequence[Entry], max_reclaims: int, draw: Callable[[], float]) -> list[Turn]:
    """Return how to handle entries of one environment, one turn after the other; `draw` returns a number in [0, 1)."""
    trusted = tuple(entry for entry in entries if not entry.reclaims)
    given_up = [entry for entry in entries if entry.reclaims > max_reclaims]
    suspects = [entry for entry in entries if 0 < entry.reclaims <= max_reclaims]
    suspects.sort(key=lambda _: draw())
    return [
        *([Turn(trusted)] if trusted else []),
        *(Turn((entry,), ReclaimLimitError(entry.reclaims)) for entry in given_up),
        *(Turn((entry,)) for entry in suspects),
    ]
