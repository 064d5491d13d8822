"""1. Claims: one key of a caller's, any number of concurrent triggers, any mix of held and created: one run.

A held run is not in the engine yet, so the engine's unique constraint cannot see it; and between looking a key up and binding it
there is room for a second trigger. So a trigger with a key claims it on the buffer's server first. The claim carries its owner's
token: it turns into a binding when the run is held, is released when the run was created, and runs out when its owner died, later
than any trigger takes. Whoever meets a claim waits for what becomes of it.

The keys of a batch are claimed together, in one round trip where all are free, in the order of their digests. Whoever has to wait for
one holds none that comes after it, so nobody waits for a key whose holder waits for one of his: two batches with the same keys wait
for each other in turn, never both at once.

Without the buffer's server there are no claims and nothing is held; the engine's constraints alone decide.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Literal, TypeVar

import msgspec
from msgspec.structs import replace

from mollifier.buffer import Binding, Bound, Buffer, KeyClaimed
from mollifier.deadline import within
from mollifier.engine import Existing
from mollifier.errors import BufferUnavailableError, EngineUnavailableError
from mollifier.keys import idempotency_digest, request_digest
from mollifier.model import Snapshot
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry

LIFETIME_MS = 30_000
"""Longer than any trigger takes: the engine's own deadline, twice."""
_FIRST_WAIT_MS = 2
_LONGEST_WAIT_MS = 50

T = TypeVar("T")
By = Literal["request_key", "idempotency_key"]


class Claim(msgspec.Struct, frozen=True):
    """The keys that triggers have set out to claim, and the token that proves which of them they did."""

    org_id: str
    token: str = ""
    digests: tuple[str, ...] = ()


class Taken(msgspec.Struct, frozen=True):
    """What became of claiming: the claim, and for each snapshot the held run that answers for it, if one does."""

    claim: Claim
    existing: tuple[Existing | None, ...]


class Claims:
    """Claims callers' keys on the buffer's server. `sleep` takes seconds."""

    def __init__(
        self,
        buffer: Buffer,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        new_token: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self._buffer = buffer
        self._settings = settings
        self._telemetry = telemetry
        self._sleep = sleep
        self._new_token = new_token

    async def take(self, snapshots: Sequence[Snapshot]) -> Taken:
        """Claim the keys of these snapshots of one organization; tell of each the held run that one of its keys belongs to.

        Raises EngineUnavailableError when somebody else's claim outlasts every trigger: whose run it is cannot be told.
        """
        wanted = [bindings(snapshot) for snapshot in snapshots]
        digests = sorted({binding.digest for keys in wanted for _, binding in keys})
        claim = Claim(snapshots[0].org_id, self._new_token(), tuple(digests))
        bound: dict[str, str] = {}
        try:
            await self._claim(claim, bound)
        except (BufferUnavailableError, TimeoutError) as error:
            self._telemetry.failed_open("claim", error)
        except BaseException:
            await self.release(claim)
            raise
        unbound = tuple(digest for digest in digests if digest not in bound)
        return Taken(replace(claim, digests=unbound), tuple(_holder(keys, bound) for keys in wanted))

    async def release(self, claim: Claim) -> None:
        """Give back what is still claimed of the keys; a fault leaves them to run out."""
        if claim.digests:
            with suppress(BufferUnavailableError, TimeoutError):
                await self._within(self._buffer.release(claim.org_id, claim.digests, claim.token))

    async def _claim(self, claim: Claim, bound: dict[str, str]) -> None:
        """Claim the keys in their order, as many at a time as are free; note in `bound` the runs that some belong to."""
        left = claim.digests
        wait_ms, waited_ms = _FIRST_WAIT_MS, 0
        while left:
            asking = self._buffer.claim_many(claim.org_id, left, claim.token, LIFETIME_MS)
            outcomes = await self._within(asking)
            bound.update(
                (digest, outcome.run_id)
                for digest, outcome in zip(left, outcomes, strict=False)
                if isinstance(outcome, Bound)
            )
            if not isinstance(outcomes[-1], KeyClaimed):
                return
            left = left[len(outcomes) - 1 :]
            if waited_ms > LIFETIME_MS:
                raise EngineUnavailableError("another trigger with this key has not come to an end; try again")
            await self._sleep(wait_ms / 1000)
            waited_ms += wait_ms
            wait_ms = min(_LONGEST_WAIT_MS, wait_ms * 2)

    async def _within(self, operation: Awaitable[T]) -> T:
        return await within(self._settings().accept_deadline_ms, operation)


def _holder(keys: Sequence[tuple[By, Binding]], bound: Mapping[str, str]) -> Existing | None:
    return next((Existing(bound[key.digest], by=by) for by, key in keys if key.digest in bound), None)


def bindings(snapshot: Snapshot) -> list[tuple[By, Binding]]:
    """Return the snapshot's keys in the order in which they answer: the request key, then the idempotency key."""
    found: list[tuple[By, Binding]] = []
    if snapshot.request_key is not None:
        digest = request_digest(snapshot.env_id, snapshot.request_key)
        found.append(("request_key", Binding(digest, _ms(snapshot.request_key_expires_at))))
    if snapshot.idempotency_key is not None:
        digest = idempotency_digest(snapshot.env_id, snapshot.task_id, snapshot.idempotency_key)
        found.append(("idempotency_key", Binding(digest, _ms(snapshot.idempotency_expires_at))))
    return found


def _ms(moment: datetime | None) -> int:
    return int(moment.timestamp() * 1000) if moment is not None else 0
