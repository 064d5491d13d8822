"""The accounts of a torture: what the callers were answered against the runs that there are. Pure.

A trial is what one run is to come of: one trigger, or several with one idempotency key. A held run whose key another run took while the
buffer's server was away, so that nobody could know, is created CANCELED and names the winner: it is `superseded`, and no duplicate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec

from mollifier.held import SUPERSEDED
from mollifier.model import FINAL_STATUSES, RunStatus
from mollifier.play.torture.ledger import Ledger
from mollifier.play.torture.orders import payload_of

_GIVEN_UP = (RunStatus.SYSTEM_FAILURE, RunStatus.CRASHED)
_CULPRITS_NAMED = 10


class RunRow(NamedTuple):
    """A run as the database has it, as far as these accounts go."""

    run_id: str
    trial: int
    status: str
    tags: tuple[str, ...]
    payload: bytes
    attempt_count: int
    started_at: datetime | None
    error_name: str | None

    @property
    def is_superseded(self) -> bool:
        """Whether it gave way to another run that has its key."""
        return self.status == RunStatus.CANCELED and self.error_name == SUPERSEDED


class Accounts(msgspec.Struct, frozen=True, kw_only=True):
    """Calls, runs and changes, counted. `errors` and `unknown` calls may have made a run, but at most one.

    `corrupted` are runs with another payload than was sent; `cancelled_executed` runs that were executed although their cancellation had
    been answered before they started; `changes_lost` tags that were answered and are not there; `unexecuted` runs that have not ended;
    `gave_up` runs that ended SYSTEM_FAILURE or CRASHED. `culprits` names some of the runs or trials behind each number that should be 0.
    """

    offered: int
    accepted: int
    rejected: int
    errors: int
    unknown: int
    retries: int
    created: int
    lost: int
    duplicated: int
    superseded: int
    corrupted: int
    cancelled: int
    cancelled_executed: int
    changes_lost: int
    unexecuted: int
    gave_up: int
    culprits: Mapping[str, Sequence[str]] = {}

    def imbalances(self) -> tuple[str, ...]:
        """Return every rule that these accounts break, in words; none when they balance."""
        answered = self.accepted + self.rejected + self.errors + self.unknown
        rules = (
            (self.offered != answered, f"offered {self.offered} calls, and {answered} came to some end"),
            (self.rejected, f"{self.rejected} calls were rejected (4xx), and every one of them was valid"),
            (self.lost, f"{self.lost} accepted triggers have no run"),
            (self.duplicated, f"{self.duplicated} runs are one too many for their trigger"),
            (self.corrupted, f"{self.corrupted} runs have another payload than was sent"),
            (self.cancelled_executed, f"{self.cancelled_executed} runs were executed although they had been cancelled"),
            (self.changes_lost, f"{self.changes_lost} changes were answered and are not there"),
            (self.unexecuted, f"{self.unexecuted} runs were not executed to an end"),
            (self.gave_up, f"{self.gave_up} runs were given up by the system"),
        )
        return tuple(finding for is_broken, finding in rules if is_broken)


def close(ledger: Ledger, rows: Iterable[RunRow], *, seed: int) -> Accounts:
    """Compare the ledger with the runs of this torture."""
    runs = {row.run_id: row for row in rows}
    living: defaultdict[int, list[str]] = defaultdict(list)
    for row in runs.values():
        if not row.is_superseded:
            living[row.trial].append(row.run_id)
    faults = {
        "lost": [_named(ledger, call) for call in _lost(ledger, runs, living)],
        "duplicated": [run_id for run_ids in living.values() for run_id in run_ids[1:]] + _answered_twice(ledger),
        "corrupted": [row.run_id for row in runs.values() if row.payload != payload_of(seed, row.trial)],
        "cancelled_executed": [
            f"{run_id}: {runs[run_id].status}, cancelled at {at}, started at {runs[run_id].started_at}"
            for run_id, at in ledger.cancelled_at.items()
            if run_id in runs and _executed_after(runs[run_id], at)
        ],
        "changes_lost": [
            run_id for run_id, tag in ledger.tags.items() if run_id in runs and tag not in runs[run_id].tags
        ],
        "unexecuted": [row.run_id for row in runs.values() if row.status not in FINAL_STATUSES],
        "gave_up": [row.run_id for row in runs.values() if row.status in _GIVEN_UP],
    }
    return Accounts(
        offered=ledger.offered,
        accepted=len(ledger.accepted),
        rejected=ledger.rejected,
        errors=ledger.errors,
        unknown=ledger.unknown,
        retries=ledger.retries,
        created=len(runs),
        superseded=sum(row.is_superseded for row in runs.values()),
        cancelled=len(ledger.cancelled_at),
        culprits={name: found[:_CULPRITS_NAMED] for name, found in faults.items() if found},
        **{name: len(found) for name, found in faults.items()},
    )


def _lost(ledger: Ledger, runs: Mapping[str, RunRow], living: Mapping[int, Sequence[str]]) -> list[int]:
    """Return the accepted calls that have not the run they were promised, or, where that gave way, none that stands for it."""
    return [
        call
        for call, run_id in ledger.accepted.items()
        if (run_id and run_id not in runs) or not living.get(ledger.trials[call])
    ]


def _named(ledger: Ledger, call: int) -> str:
    return ledger.accepted[call] or f"call {call}"


def _answered_twice(ledger: Ledger) -> list[str]:
    """Return the runs that were the answer to more than one trial, once for each beyond the first."""
    trials: defaultdict[str, set[int]] = defaultdict(set)
    for call, run_id in ledger.accepted.items():
        if run_id:
            trials[run_id].add(ledger.trials[call])
    return [run_id for run_id, some in trials.items() for _ in range(len(some) - 1)]


def _executed_after(row: RunRow, cancelled_at: datetime) -> bool:
    """Return whether it was executed although its cancellation was answered before it had started."""
    if row.started_at is not None and row.started_at <= cancelled_at:
        return False
    return row.attempt_count > 0 or row.status != RunStatus.CANCELED
