"""1. Holding: the buffer as the trigger path uses it, each question within its deadline; what it cannot take is counted, never raised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from mollifier import snapshots as encoding
from mollifier.bindings import bindings
from mollifier.buffer import Acceptance, AcceptOutcome, Buffer, DuplicateKey, DuplicateRun, Unconfirmed
from mollifier.caps import Cap
from mollifier.claims import Claim
from mollifier.cursors import as_us
from mollifier.deadline import Breaker, within
from mollifier.errors import BufferUnavailableError
from mollifier.model import EntryKind, Snapshot
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry

_ENTRIES_PER_DEADLINE = 100
"""The deadline is for one entry; so many more take about as long again."""


class Holding:
    """Puts entries into the buffer. `buffer` is None when none is configured: then it takes nothing.

    The `breaker` has nobody behind it but these writes: one that is slow has its own size to blame, too.
    """

    def __init__(
        self, *, settings: Callable[[], Settings], buffer: Buffer | None, telemetry: Telemetry, breaker: Breaker
    ) -> None:
        self._settings = settings
        self._buffer = buffer
        self._telemetry = telemetry
        self._breaker = breaker

    async def accept(self, entries: Sequence[Acceptance]) -> Sequence[AcceptOutcome | None]:
        """Store the entries; None stands for one that the buffer did not take."""
        buffer = self._buffer
        if buffer is None or not entries:
            return [None] * len(entries)
        settings = self._settings()
        deadline_ms = self._deadline_ms(len(entries))
        if settings.confirmation.is_asked:
            deadline_ms += settings.accept_confirm_timeout_ms
        payload_bytes = sum(len(entry.payload) for entry in entries)
        try:
            with self._telemetry.span("mollifier.buffer.accept", {"mollifier.payload_bytes": payload_bytes}):
                outcomes = await self._breaker.ask(
                    lambda: within(deadline_ms, buffer.accept_many(entries)), is_answer=_is_confirmed
                )
        except Exception as error:  # noqa: BLE001 - a buffer fault of any kind never fails a trigger
            self._telemetry.failed_open("buffer", error, len(entries))
            return [None] * len(entries)
        faults = [outcome for outcome in outcomes if isinstance(outcome, BufferUnavailableError)]
        if faults:
            self._telemetry.failed_open("buffer", faults[0], len(faults))
        if unconfirmed := sum(map(_is_unconfirmed, outcomes)):
            self._tell_unconfirmed(unconfirmed)
        return [None if isinstance(outcome, BufferUnavailableError) else outcome for outcome in outcomes]

    async def confirm(self, org_id: str, run_ids: Sequence[str]) -> bool:
        """Tell whether these runs are held, and as safe as an accept would be, so that triggers may be answered with them."""
        buffer, settings = self._buffer, self._settings()
        if buffer is None or not settings.confirmation.is_asked:
            return True
        deadline_ms = self._deadline_ms(len(run_ids)) + settings.accept_confirm_timeout_ms
        try:
            is_confirmed = await self._breaker.ask(
                lambda: within(deadline_ms, buffer.confirm(org_id, run_ids)), is_answer=bool
            )
        except Exception as error:  # noqa: BLE001 - as above
            self._telemetry.failed_open("confirmation", error, len(run_ids))
            return False
        if not is_confirmed:
            self._tell_unconfirmed(len(run_ids))
        return is_confirmed

    async def find_over_cap(self, entries: Sequence[Acceptance]) -> Cap | None:
        """Return the first cap that these entries of one environment would exceed together; None too where the buffer does not answer."""
        buffer = self._buffer
        if buffer is None or not entries:
            return None
        deadline_ms = self._deadline_ms(len(entries))
        try:
            return await self._breaker.ask(lambda: within(deadline_ms, buffer.find_over_cap(entries)))
        except Exception as error:  # noqa: BLE001 - as above
            self._telemetry.failed_open("caps", error)
            return None

    def _tell_unconfirmed(self, number: int) -> None:
        settings = self._settings()
        missed = f"not confirmed within {settings.accept_confirm_timeout_ms} ms: {settings.accept_confirm}"
        self._telemetry.failed_open("confirmation", BufferUnavailableError(missed), number)

    def _deadline_ms(self, entries: int) -> int:
        return self._settings().accept_deadline_ms * -(-entries // _ENTRIES_PER_DEADLINE)


def _is_confirmed(outcomes: Sequence[AcceptOutcome | BufferUnavailableError]) -> bool:
    """Tell whether everything that is stored is as safe as was asked for; what was refused is not stored."""
    return not any(map(_is_unconfirmed, outcomes))


def _is_unconfirmed(outcome: AcceptOutcome | BufferUnavailableError) -> bool:
    match outcome:
        case Unconfirmed() | DuplicateRun(is_confirmed=False) | DuplicateKey(is_confirmed=False):
            return True
        case _:
            return False


def held_entry(snapshot: Snapshot, claim: Claim | None, *, taken: bool = False) -> Acceptance:
    """Return the entry that is the run's only copy until the run is created; `taken`: which may be at any moment."""
    return msgspec.structs.replace(
        audit_copy(snapshot),
        kind=EntryKind.HELD,
        created_us=as_us(snapshot.created_at),
        parent_run_id=snapshot.parent_run_id,
        bindings=[binding for _, binding in bindings(snapshot)],
        token=claim.proof if claim else "",
        taken=taken,
    )


def audit_copy(snapshot: Snapshot) -> Acceptance:
    """Return the entry that duplicates a run which is created as always."""
    return Acceptance(
        run_id=snapshot.run_id,
        env_id=snapshot.env_id,
        org_id=snapshot.org_id,
        payload=encoding.encode(snapshot),
        kind=EntryKind.AUDIT,
    )
