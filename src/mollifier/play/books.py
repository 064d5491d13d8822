"""The books of a play: what was offered, what the system says it did, and whether the two agree.

Pure: numbers in, findings out. Each rule is one line of the contract that every accepted trigger is one run, and that what the gate
held is what the buffer took and the drainer gave back, byte for byte. Numbers that agree because nothing happened prove nothing: a play
with a burst in it has to have had it held, and some of the held runs changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from mollifier.rollout import Mode


class Books(msgspec.Struct, frozen=True, kw_only=True):
    """Every number counts triggers, runs or entries; None is a number that nobody could be asked for.

    `pass_through`, `shadow_log` and `mollify` are the gate's decisions; `would_mollify`, `buffered` and `drained` come from the
    structured log; `unbuffered` counts triggers that the gate mollified and the buffer did not answer for in time: their runs were created
    directly, and it may have taken them all the same; `over_cap_created` and `over_cap_rejected` count triggers that the gate mollified and a cap kept out of the buffer, by what
    became of them; `failed_open` counts failures of the gate and the buffer that triggers survived; `runs_created` is counted in
    the database; `buffer_connections` are those that the buffer's server of an embedded stack saw from anybody.

    `sheltered`, of a play with an outage, counts triggers that the gate let pass and that were held because their engine was away;
    `attempts_used_up` entries that took more than one attempt, or were given up. `sampled` and what follows it are of the held runs that
    were read, tagged and cancelled during the play: `sampled_cancelled` never executed, `sampled_too_late` cancelled once started.
    """

    offered: int
    accepted: int
    rejected: int = 0
    errors: int = 0
    pass_through: int = 0
    shadow_log: int = 0
    mollify: int = 0
    unbuffered: int = 0
    over_cap_created: int = 0
    over_cap_rejected: int = 0
    failed_open: int = 0
    would_mollify: int | None = None
    buffered: int | None = None
    drained: int | None = None
    hash_mismatches: int | None = None
    runs_created: int | None = None
    lost: int | None = None
    duplicated: int | None = None
    executed: int | None = None
    left_in_buffer: int | None = None
    buffer_connections: int | None = None
    sheltered: int | None = None
    attempts_used_up: int | None = None
    sampled: int | None = None
    sampled_retrieved: int | None = None
    sampled_tagged: int | None = None
    sampled_cancelled: int | None = None
    sampled_too_late: int | None = None
    sampled_faults: int | None = None

    def imbalances(self, mode: Mode | None, *, has_burst: bool = False) -> tuple[str, ...]:
        """Return every rule that these books break, in words; none when they balance.

        `mode` is None when it is not known. `has_burst` says that the calls have a burst in them which the gate has to see.
        """
        rules = (self._calls(), self._runs(), self._buffer(), self._sample(), self._mode(mode))
        proof = self._proof(mode) if has_burst else ()
        return tuple(finding for rule in (*rules, proof) for finding in rule)

    def _calls(self) -> Iterator[str]:
        if self.offered != self.accepted + self.rejected + self.errors:
            yield f"offered {self.offered} is not accepted {self.accepted} + rejected {self.rejected} + errors {self.errors}"
        if self.errors:
            yield f"{self.errors} calls got no answer or a failure (5xx)"
        if self.rejected > self.over_cap_rejected:
            yield f"{self.rejected - self.over_cap_rejected} calls were rejected (4xx), and not because of a cap"

    def _runs(self) -> Iterator[str]:
        if self.lost:
            yield f"{self.lost} accepted triggers have no run"
        if self.duplicated:
            yield f"{self.duplicated} runs or answers are one too many for their trigger"
        if self.runs_created not in (None, self.accepted):
            yield f"{self.runs_created} runs were created for {self.accepted} accepted triggers"
        if self.executed is not None and self.runs_created is not None:
            to_execute = self.runs_created - (self.sampled_cancelled or 0)
            if not to_execute - (self.sampled_too_late or 0) <= self.executed <= to_execute:
                yield f"{self.executed} of {to_execute} runs were executed to their end"

    @property
    def _to_be_held(self) -> int:
        """How many triggers had to come into the buffer."""
        return self.mollify - self.over_cap_created - self.over_cap_rejected - self.unbuffered + (self.sheltered or 0)

    def _buffer(self) -> Iterator[str]:
        over_cap = self.over_cap_created + self.over_cap_rejected
        if self.buffered not in (None, self._to_be_held):
            kept_out = f", caps kept {over_cap} out" if over_cap else ""
            kept_out += f", {self.unbuffered} were not taken in time" if self.unbuffered else ""
            yield f"the gate mollified {self.mollify} triggers{kept_out} and {self.buffered} were buffered"
        buffered, drained = self.buffered or 0, self.drained or 0
        if not buffered <= drained <= buffered + self.unbuffered:
            yield f"{buffered} triggers were buffered and {drained} drained"
        if self.would_mollify not in (None, self.shadow_log):
            yield f"the gate decided shadow_log {self.shadow_log} times and the log has {self.would_mollify} would_mollify events"
        if self.hash_mismatches:
            yield f"{self.hash_mismatches} payloads came out of the buffer other than they went in"
        if self.left_in_buffer:
            yield f"{self.left_in_buffer} entries are left in the buffer"

    def _sample(self) -> Iterator[str]:
        if self.sampled_faults:
            yield f"{self.sampled_faults} times a held run was not what it had to be"
        if self.sheltered is not None and self.attempts_used_up:
            yield f"{self.attempts_used_up} entries used up attempts for an outage of the database"

    def _mode(self, mode: Mode | None) -> Iterator[str]:
        decided = self.pass_through + self.shadow_log + self.mollify
        match mode:
            case Mode.OFF:
                if decided:
                    yield f"switched off, and yet the gate decided {decided} times"
                if self.buffer_connections:
                    yield f"switched off, and yet the buffer's server saw {self.buffer_connections} connections"
            case Mode.SHADOW | Mode.MONITOR | Mode.DIVERT:
                if decided != self.accepted + self.over_cap_rejected:
                    yield f"the gate decided {decided} times for {self.accepted} accepted triggers"
                if mode is Mode.SHADOW and self.mollify:
                    yield f"in shadow mode nothing may be held, and {self.mollify} triggers were"
                if mode is not Mode.SHADOW and self.shadow_log:
                    yield f"the organization is enrolled, and yet {self.shadow_log} triggers were only logged"
            case None:
                pass

    def _proof(self, mode: Mode | None) -> Iterator[str]:
        """A play with a burst in it that proves nothing of what its mode is about."""
        held = self._to_be_held
        match mode:
            case Mode.SHADOW if not self.would_mollify:
                yield f"there was a burst, and yet not one would_mollify event: this proves nothing of the gate{self._survived}"
            case Mode.MONITOR if not held:
                yield f"there was a burst, and yet nothing was copied to the buffer: this proves nothing of it{self._survived}"
            case Mode.DIVERT if not held:
                yield f"there was a burst, and yet nothing was held: this proves nothing of held runs{self._survived}"
            case Mode.DIVERT:
                if not self.sampled_tagged:
                    yield f"none of {self.sampled or 0} sampled runs was tagged while it was held"
                if not self.sampled_cancelled:
                    yield f"none of {self.sampled or 0} sampled runs was cancelled while it was held"
            case _:
                pass

    @property
    def _survived(self) -> str:
        return f" ({self.failed_open} failures of gate and buffer were survived)" if self.failed_open else ""


class RunsFound(NamedTuple):
    """What the database says of the accepted calls."""

    runs_created: int
    lost: int
    duplicated: int


def reconcile(accepted: Mapping[int, str], found: Iterable[tuple[str, int]]) -> RunsFound:
    """Compare the run ids that calls were answered with the runs that exist, each with the call it was made for.

    Lost are answered ids without a run. Duplicated are runs beyond the first of a call, and answers beyond the first with one id.
    """
    runs = dict(found)
    per_call = Counter(runs.values())
    ids = set(accepted.values())
    return RunsFound(
        runs_created=len(runs),
        lost=len(ids - runs.keys()),
        duplicated=sum(count - 1 for count in per_call.values()) + len(accepted) - len(ids),
    )
