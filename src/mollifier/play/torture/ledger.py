"""What the callers of a torture were answered."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

from mollifier.play.torture.orders import Order

_COMPLAINTS_KEPT = 12


class Ledger:
    """Answers by call, as they come in. Every call offered ends as one of accepted, rejected, errors or unknown.

    `accepted` has the run id of each accepted call, empty for an item of a batch, which is answered as a whole; `trials` the trial of each
    call. `tags` and `cancelled_at` are the changes that were answered as done, by run. A complaint is an answer that should not be.
    """

    def __init__(self) -> None:
        self.offered = 0
        self.rejected = 0
        self.errors = 0
        self.unknown = 0
        self.retries = 0
        self.accepted: dict[int, str] = {}
        self.trials: dict[int, int] = {}
        self.tags: dict[str, str] = {}
        self.cancelled_at: dict[str, datetime] = {}
        self.refused_changes = 0
        self.complaints: Counter[str] = Counter()

    @property
    def settled(self) -> int:
        """Calls that are no longer under way."""
        return len(self.accepted) + self.rejected + self.errors + self.unknown

    def offer(self, order: Order) -> None:
        """Note that the order is on its way."""
        self.offered += order.calls
        for place in range(order.calls):
            self.trials[order.number + place] = order.trial + place

    def accept(self, order: Order, run_id: str) -> None:
        """Note that all of the order was accepted."""
        for place in range(order.calls):
            self.accepted[order.number + place] = run_id

    def complain(self, detail: str) -> None:
        """Note an answer that should not be; a few different ones are kept."""
        if detail in self.complaints or len(self.complaints) < _COMPLAINTS_KEPT:
            self.complaints[detail] += 1
