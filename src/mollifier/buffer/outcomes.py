"""What the buffer is given and what it answers: values, matched by whoever asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from mollifier.caps import Cap
from mollifier.errors import BufferUnavailableError, MalformedEntryError
from mollifier.letters import Letter
from mollifier.model import Entry, EntryKind
from mollifier.scripts import DiscardReply, ReviveReply


class Accepted(msgspec.Struct, frozen=True):
    """The entry is stored, as the `sequence`-th of its environment."""

    run_id: str
    sequence: int


class Unconfirmed(msgspec.Struct, frozen=True):
    """The entry is stored; whether it would outlive a crash, as `accept_confirm` asks, was not known in time."""

    run_id: str


class DuplicateRun(msgspec.Struct, frozen=True):
    """There already is an entry of this run, in whatever state, and of a held run no mere audit copy; nothing changed.

    `is_confirmed`: where `accept_confirm` asks for it, that entry is as safe as one that was `Accepted`.
    """

    run_id: str
    is_confirmed: bool = True


class DuplicateKey(msgspec.Struct, frozen=True):
    """The key with this digest is bound to the live entry of another run, `run_id`; nothing changed. `is_confirmed` as above."""

    run_id: str
    digest: str
    is_confirmed: bool = True


class KeyClaimed(msgspec.Struct, frozen=True):
    """Another trigger has claimed one of the keys and has not bound it yet; nothing changed."""


class OverCap(msgspec.Struct, frozen=True):
    """The entry would exceed what may be held, by this cap; nothing changed."""

    cap: Cap


AcceptOutcome = Accepted | Unconfirmed | DuplicateRun | DuplicateKey | KeyClaimed | OverCap


class Binding(msgspec.Struct, frozen=True):
    """One of the caller's keys, by its digest, and the moment (ms since the epoch) up to which it belongs to the run."""

    digest: str
    expires_ms: int


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """One entry to store as QUEUED, and the caller's keys to bind to it, which must be free or claimed by `token`.

    `created_us` is the trigger's moment, microseconds since the epoch, by which lists order held runs. An audit copy expires after `entry_ttl_s`.
    `taken`: somebody has set out to create the run already, and may yet (see `handover.py`).
    """

    run_id: str
    env_id: str
    org_id: str
    payload: bytes
    kind: EntryKind = EntryKind.AUDIT
    created_us: int = 0
    parent_run_id: str | None = None
    bindings: Sequence[Binding] = ()
    token: str = ""
    taken: bool = False


class Claimed(msgspec.Struct, frozen=True):
    """The key is the claimant's until it binds it, releases it, or takes too long."""


class Bound(msgspec.Struct, frozen=True):
    """The key belongs to the held run `run_id`."""

    run_id: str


class Doubted(msgspec.Struct, frozen=True):
    """Whoever claimed the key before is taken for dead, and may yet create its run: no run is held under the key, and nobody waits for it."""


ClaimOutcome = Claimed | Bound | Doubted | KeyClaimed


class Ready(msgspec.Struct, frozen=True):
    """One environment that has something due."""

    org_id: str
    env_id: str


class Reclaimed(msgspec.Struct, frozen=True):
    """What became of leases that ran out: the runs that are queued again, and those that are dead letters now.

    `failed` came back too often, the entries of `evicted` vanished, those of `malformed` do not parse, and of `missing` there was nothing to put
    back: audit copies that expired, as a rule. `faults`: what the server refused to do about one, which is left as it was.
    """

    returned: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    evicted: tuple[str, ...] = ()
    malformed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    faults: tuple[BufferUnavailableError, ...] = ()

    @property
    def number(self) -> int:
        """How many runs are not leased any more."""
        return sum(map(len, (self.returned, self.failed, self.evicted, self.malformed, self.missing)))


class Revival(msgspec.Struct, frozen=True):
    """What became of a dead letter that was to be revived; `fault` says what is wrong with one that is not whole.

    `letter` is what was known of it before, None where there was none.
    """

    run_id: str
    reply: ReviveReply
    letter: Letter | None = None
    fault: str | None = None


class Disposal(msgspec.Struct, frozen=True):
    """What became of a dead letter that was to be discarded; `letter` as in `Revival`."""

    run_id: str
    reply: DiscardReply
    letter: Letter | None = None


class HeldPlace(NamedTuple):
    """Where a held run stands in lists: the trigger's moment, microseconds since the epoch, then the run's id."""

    created_us: int
    run_id: str


class Popped(msgspec.Struct, frozen=True):
    """What one pop took: entries under a lease; what it passed over besides.

    `malformed` are runs whose entry does not parse and `evicted` held runs whose entry vanished: both are dead letters now. `orphans`
    counts references that were dropped, to audit copies that had expired.
    """

    entries: tuple[Entry, ...] = ()
    malformed: tuple[MalformedEntryError, ...] = ()
    orphans: int = 0
    evicted: tuple[str, ...] = ()
