"""1. Claims: one key of a caller's, any number of concurrent triggers, any mix of held and created: one run.

A held run is not in the engine yet, so the engine's unique constraint cannot see it; and between looking a key up and binding it
there is room for a second trigger. So a trigger with a key claims it on the buffer's server first. The claim carries its owner's
token: it turns into a binding when the run is held, and is released when the run was created. Whoever meets a claim waits for what
becomes of it.

A claimant prolongs its claim while it is at work. One that has not for a lease of seconds is taken for dead, and its key is in doubt: its
owner may be no more than slow, or have left a creation under way in the engine. So nobody waits any longer, and nobody holds a run under
the key, its former owner included; all create theirs, and of those the engine's constraint lets one be. The doubt ends with the claim's life.

A claim lives longer than what is done under it: that has a deadline (`deadline_ms`), made of the engine's and the buffer's. A claimant
that was stopped for longer is cancelled by that deadline before it creates anything, and what it still has on the way to the buffer is
refused there, because holding a run takes the claim itself. A late release harms nobody: the token is not the next owner's.

A key that is bound to a run that is worth nothing (`bindings.py`) is claimed as if it were free, in one step with the look at whose it is.
Where that takes a question to the engine, and the engine is away, the held run answers.

The keys of a batch are claimed together, in one round trip where all are free, in the order of their digests. Whoever has to wait for
one holds none that comes after it, so nobody waits for a key whose holder waits for one of his: two batches with the same keys wait
for each other in turn, never both at once.

Without the buffer's server, or while a breaker has it left alone, there are no claims and nothing is held; the engine's constraints
alone decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from mollifier import ids
from mollifier.bindings import Worth, bindings
from mollifier.buffer import Binding, Bound, Buffer, ClaimOutcome, KeyClaimed
from mollifier.deadline import Breaker, forget, within
from mollifier.engine import Existing, KeyKind
from mollifier.errors import BufferNotAskedError, BufferUnavailableError, EngineUnavailableError
from mollifier.model import Snapshot
from mollifier.refuge import SAFE_DEADLINE_MS, Refuge
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry

_ENGINE_CALLS = 3
"""Looking the keys up, creating, and creating once more what the buffer did not take."""
_ACCEPTS = 10
"""How many times its deadline the buffer may take for the most items that one call has."""
_SLACK = 2
"""A deadline that is spent in slices lasts longer in a busy process; one that is missed fails the trigger."""
_LEASE_MS = 3_000
"""How long a claimant is waited for that does not prolong its claim, besides the deadlines of doing so."""
_TRIES = 3
"""How often in a lease a claim is prolonged."""
_FIRST_WAIT_MS = 2
_LONGEST_WAIT_MS = 50

T = TypeVar("T")


class Claim(msgspec.Struct, frozen=True):
    """The keys that triggers have set out to claim, and the token that proves which of them they did.

    `is_sure`: all of them were, as far as they were nobody's. Otherwise the server gave no answer, and some may have been.
    """

    org_id: str
    token: str = ""
    digests: tuple[str, ...] = ()
    is_sure: bool = True

    @property
    def proof(self) -> str:
        """What holding a run has to show: the token, or nothing where there may be no claim."""
        return self.token if self.is_sure else ""


class Taken(msgspec.Struct, frozen=True):
    """What became of claiming: the claim, and for each snapshot the held run that answers for it, if one does."""

    claim: Claim
    existing: tuple[Existing | None, ...]


class Claims:
    """Claims callers' keys on the buffer's server. `engine_deadline_ms` is how long one call of the engine may take; `sleep` takes seconds.

    The `breaker` stands in front of every question; while it refuses them, no key is claimed.
    """

    def __init__(
        self,
        buffer: Buffer,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        refuge: Refuge,
        engine_deadline_ms: int,
        breaker: Breaker | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        new_token: Callable[[], str] = ids.token,
    ) -> None:
        self._buffer = buffer
        self._settings = settings
        self._telemetry = telemetry
        self._refuge = refuge
        self._engine_deadline_ms = engine_deadline_ms
        self._breaker = breaker or Breaker()
        self._sleep = sleep
        self._new_token = new_token
        self._releasing: set[asyncio.Future[int]] = set()

    @property
    def are_needed(self) -> bool:
        """True when a run may be held, by this replica or another, now or since before. Switched off, nobody asks the buffer's server."""
        return self._settings().enabled

    @property
    def deadline_ms(self) -> int:
        """How long triggers may take from their claim to its release."""
        settings = self._settings()
        buffer_ms = settings.gate_deadline_ms + _ACCEPTS * settings.accept_deadline_ms
        # A key's held run is confirmed, or created, and so is what an accept finds there already.
        safe_ms = settings.accept_confirm_timeout_ms + SAFE_DEADLINE_MS if settings.confirmation.is_asked else 0
        return _ENGINE_CALLS * self._engine_deadline_ms + _SLACK * (buffer_ms + safe_ms)

    @property
    def lifetime_ms(self) -> int:
        """How long a claim lives whose owner does not release it: the deadline counts from the reply, the lifetime from before it."""
        return self.deadline_ms + self.deadline_ms // 10 + _SLACK * self._settings().accept_deadline_ms

    @property
    def lease_ms(self) -> int:
        """How long a claimant is waited for that does not prolong its claim: it has three tries, each of them within its deadline."""
        return _LEASE_MS + _SLACK * self._settings().accept_deadline_ms

    async def take(self, snapshots: Sequence[Snapshot]) -> Taken:
        """Claim the keys of these snapshots of one organization; tell of each the held run that one of its keys belongs to.

        Raises EngineUnavailableError when somebody else's claim outlasts every trigger: whose run it is cannot be told.
        """
        wanted = [bindings(snapshot) for snapshot in snapshots]
        digests = sorted({binding.digest for keys in wanted for _, binding in keys})
        claim = Claim(snapshots[0].org_id, self._new_token(), tuple(digests))
        bound: dict[str, str] = {}
        if not self._breaker.admits():
            self._telemetry.failed_open("claim", BufferNotAskedError("not asked: it has given no answers of late"))
            return Taken(replace(claim, digests=(), is_sure=False), (None,) * len(snapshots))
        try:
            await self._claim(claim, bound, Worth(self._buffer, self._refuge, snapshots[0]))
        except (BufferUnavailableError, TimeoutError) as error:
            self._telemetry.failed_open("claim", error)
            claim = replace(claim, is_sure=False)
        except BaseException:
            await self.release(claim)
            raise
        unbound = tuple(digest for digest in digests if digest not in bound)
        return Taken(replace(claim, digests=unbound), tuple(_holder(keys, bound) for keys in wanted))

    @asynccontextmanager
    async def keeping(self, claim: Claim) -> AsyncGenerator[None]:
        """Prolong the claim while something is done under it, for no longer than its deadline, and give it back in the end.

        Raises EngineUnavailableError when the deadline is over.
        """
        # Of one that may not have been made, others need not know how it fares: nothing is held under it.
        prolonging = asyncio.create_task(self._prolong(claim)) if claim.digests and claim.is_sure else None
        try:
            async with asyncio.timeout(self.deadline_ms / 1000):
                yield
        except TimeoutError as error:
            raise EngineUnavailableError("it took longer than a key can be claimed for; try again") from error
        finally:
            if prolonging is not None:
                prolonging.cancel()
            # Bound to a held run by now, the keys are no longer the claim's, and stay.
            await self.release(claim)

    async def _prolong(self, claim: Claim) -> None:
        while True:
            await self._sleep(_LEASE_MS / _TRIES / 1000)
            prolong = partial(self._buffer.prolong, claim.org_id, claim.digests, claim.token, self.lifetime_ms)
            with suppress(BufferUnavailableError, TimeoutError):
                await self._within(prolong)

    async def release(self, claim: Claim) -> None:
        """Give back what is still claimed of the keys; a fault leaves them to run out.

        It is sent in any case, for a claim that stays behind when the server is well again keeps the next trigger with its key waiting. It is
        waited for within a deadline only, and not at all where claiming has had no answer.
        """
        if claim.digests:
            releasing = asyncio.ensure_future(self._buffer.release(claim.org_id, claim.digests, claim.token))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)
            releasing.add_done_callback(forget)
            if claim.is_sure:
                with suppress(BufferUnavailableError, TimeoutError):
                    await self._within(lambda: asyncio.shield(releasing))

    def close(self) -> None:
        """Wait for no release any more."""
        for releasing in self._releasing:
            releasing.cancel()

    async def _claim(self, claim: Claim, bound: dict[str, str], worth: Worth) -> None:
        """Claim the keys in their order, as many at a time as are free; note in `bound` the runs that some belong to.

        While one is waited for, those before it are claimed again from time to time, and all of them at the end: they begin their life
        together.
        """
        left = claim.digests
        wait_ms, waited_ms, aged_ms = _FIRST_WAIT_MS, 0, 0
        while left:
            outcomes = await self._ask(claim, left, worth)
            bound.update(_runs(left, outcomes))
            unbound = tuple(digest for digest in claim.digests if digest not in bound)
            if isinstance(outcomes[-1], KeyClaimed):
                blocked = left[len(outcomes) - 1 :]
                if waited_ms > self.lifetime_ms:
                    raise EngineUnavailableError("another trigger with this key has not come to an end; try again")
                if aged_ms == 0 < waited_ms:
                    # Somebody took one of those claimed before, after it had run out: whoever waits for it holds none after it.
                    await self.release(replace(claim, digests=blocked[1:]))
                await self._sleep(wait_ms / 1000)
                waited_ms, aged_ms = waited_ms + wait_ms, aged_ms + wait_ms
                wait_ms = min(_LONGEST_WAIT_MS, wait_ms * 2)
                is_old = aged_ms > _LEASE_MS / _TRIES
                left, aged_ms = (unbound, 0) if is_old else (blocked, aged_ms)
            else:
                left, aged_ms = (unbound, 0) if aged_ms else ((), 0)

    async def _ask(self, claim: Claim, digests: Sequence[str], worth: Worth) -> Sequence[ClaimOutcome]:
        """Claim the keys; those whose run is worth nothing again, at that run's cost."""
        claim_many = partial(self._buffer.claim_many, claim.org_id, digests, claim.token, self.lifetime_ms)
        while True:
            void = [worth.void.get(digest, "") for digest in digests]
            outcomes = await self._within(partial(claim_many, void, lease_ms=self.lease_ms))
            look = partial(worth.look_into, _runs(digests, outcomes))
            # Having waited for the engine, they are claimed anew in any case: what is claimed together begins its life together.
            if not (await self._within(look) or await self._ask_engine(worth)):
                return outcomes

    async def _ask_engine(self, worth: Worth) -> bool:
        try:
            return await worth.ask_engine()
        except EngineUnavailableError as error:
            self._telemetry.failed_open("engine", error)
            return True

    async def _within(self, question: Callable[[], Awaitable[T]]) -> T:
        breaker, deadline_ms = self._breaker, self._settings().accept_deadline_ms
        if breaker.behind is not None and breaker.behind.on_trial:
            # A server of which only a PING has told is worth no longer wait than the gate's, and this as good a question.
            breaker, deadline_ms = breaker.behind, self._settings().gate_deadline_ms
        return await breaker.ask(lambda: within(deadline_ms, question()))


def _runs(digests: Sequence[str], outcomes: Sequence[ClaimOutcome]) -> dict[str, str]:
    """Return the run of each key that belongs to one."""
    found = zip(digests, outcomes, strict=False)
    return {digest: outcome.run_id for digest, outcome in found if isinstance(outcome, Bound)}


def _holder(keys: Sequence[tuple[KeyKind, Binding]], bound: Mapping[str, str]) -> Existing | None:
    return next((Existing(bound[key.digest], by=by) for by, key in keys if key.digest in bound), None)
