"""1. Claims: one key of a caller's, any number of concurrent triggers, any mix of held and created: one run.

A held run is not in the engine yet, so the engine's unique constraint cannot see it; and between looking a key up and binding it
there is room for a second trigger. So a trigger with a key claims it on the buffer's server first. The claim carries its owner's
token: it turns into a binding when the run is held, is released when the run was created, and runs out when its owner died, later
than any trigger takes. Whoever meets a claim waits for what becomes of it.

Without the buffer's server there are no claims and nothing is held; the engine's constraints alone decide.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Literal, TypeVar

import msgspec

from mollifier.buffer import Binding, Bound, Buffer, Claimed, KeyClaimed
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
    """The keys a trigger has claimed, and the token that proves it. Without any there is nothing to give back."""

    org_id: str
    token: str = ""
    digests: tuple[str, ...] = ()


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

    async def take(self, snapshot: Snapshot) -> Claim | Existing:
        """Claim the snapshot's keys; or return the held run that one of them belongs to.

        Raises EngineUnavailableError when somebody else's claim outlasts every trigger: whose run it is cannot be told.
        """
        claim = Claim(snapshot.org_id, self._new_token())
        try:
            for by, binding in bindings(snapshot):
                winner = await self._claim(claim, binding)
                if winner is not None:
                    await self.release(claim)
                    return Existing(winner, by=by)
                claim = msgspec.structs.replace(claim, digests=(*claim.digests, binding.digest))
        except (BufferUnavailableError, TimeoutError) as error:
            self._telemetry.failed_open("claim", error)
        return claim

    async def release(self, claim: Claim) -> None:
        """Give the keys back; a fault leaves them to run out."""
        for digest in claim.digests:
            with suppress(BufferUnavailableError, TimeoutError):
                await self._within(self._buffer.release(claim.org_id, digest, claim.token))

    async def _claim(self, claim: Claim, binding: Binding) -> str | None:
        """Return None when the key was claimed, else the run it belongs to."""
        wait_ms, waited_ms = _FIRST_WAIT_MS, 0
        while waited_ms <= LIFETIME_MS:
            outcome = await self._within(self._buffer.claim(claim.org_id, binding.digest, claim.token, LIFETIME_MS))
            match outcome:
                case Claimed():
                    return None
                case Bound(run_id):
                    return run_id
                case KeyClaimed():
                    await self._sleep(wait_ms / 1000)
                    waited_ms += wait_ms
                    wait_ms = min(_LONGEST_WAIT_MS, wait_ms * 2)
        await self.release(claim)
        raise EngineUnavailableError("another trigger with this key has not come to an end; try again")

    async def _within(self, operation: Awaitable[T]) -> T:
        return await within(self._settings().accept_deadline_ms, operation)


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
