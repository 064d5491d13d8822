"""4. The diverting drain: held entries become runs, many in one call, and nothing is ever silently gone.

One environment's entries are created in one transaction. When the engine fails a batch, its first and its last entry are tried alone.
Where neither can be created, it is the engine that fails, and the others are spared. Otherwise the rest is tried in halves, then theirs,
down to the one entry that is at fault, which fails alone. An entry handed over twice (its holder died between creating and settling)
meets its own run id and makes nothing new; changes that arrived in between are carried to the run that exists.

A key of the entry's may by now belong to another run: bound while the buffer's server was away, so that nobody could know. The
held run is then created CANCELED and names the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec

from mollifier import handover, held, patches
from mollifier.engine import CreateOutcome, Ending, RunEngine
from mollifier.errors import (
    EngineFailingError,
    EngineUnavailableError,
    InvalidRequestError,
    MollifierError,
    NonRetryableError,
)
from mollifier.handling import Handler, Outcome
from mollifier.handover import Handover
from mollifier.model import Entry, EntryKind, RunError, RunStatus
from mollifier.telemetry import Telemetry, describe


class Materialiser:
    """Creates the runs of held entries. `clock` returns the current moment in UTC."""

    def __init__(self, engine: RunEngine, telemetry: Telemetry, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._telemetry = telemetry
        self._clock = clock

    async def handle(self, entries: Sequence[Entry]) -> Sequence[Outcome]:
        """Create the runs of these entries of one environment; one outcome each, which of some may be that the engine is away."""
        read = [_read(entry) for entry in entries]
        jobs = [job for job in read if isinstance(job, Handover)]
        created = dict(zip((job.entry.run_id for job in jobs), await self._create(jobs), strict=True))
        return [created[item.entry.run_id] if isinstance(item, Handover) else item for item in read]

    async def give_up(self, entry: Entry, error: BaseException) -> bool:
        """Record the run as SYSTEM_FAILURE with the error; False when not even that can be done, or the entry is an audit copy.

        Changes that do not read are left out; without a payload that reads as a trigger there is no run to record. A run that its caller cancelled stays cancelled, and keeps its keys; one that exists by now stays as it is, with every change of the
        entry in it. Raises EngineUnavailableError when the engine cannot be reached: that says nothing of the entry.
        """
        if entry.kind is EntryKind.AUDIT:
            return False
        try:
            job = _read(msgspec.structs.replace(entry, patches=patches.readable(entry.patches)))
            if not isinstance(job, Handover):
                return False
            failure = RunError(message=describe(error), name=held.FAILURE)
            ending = job.creation.ending or Ending(
                status=RunStatus.SYSTEM_FAILURE, at=self._clock(), frees=("idempotency_key",)
            )
            ending = msgspec.structs.replace(ending, error=failure)
            creation = msgspec.structs.replace(job.creation, ending=ending)
            try:
                outcome = await handover.create_ended(self._engine, creation)
            except EngineUnavailableError:
                raise
            except Exception:
                # A failure that was recorded before has its run, though that could not be created as it is by now.
                if await self._engine.carry_over(entry.env_id, entry.run_id, job.changes) is None:
                    raise
                return True
            await handover.complete(self._engine, job, outcome, self._clock())
        except EngineUnavailableError:
            raise
        except Exception as unwritten:  # noqa: BLE001 - the entry then stays as failed, whatever kept its failure from being written
            self._telemetry.faulted("give up", unwritten)
            return False
        return True

    async def _create(self, jobs: Sequence[Handover]) -> Sequence[Outcome]:
        if not jobs:
            return []
        try:
            outcomes = await self._engine.create_held_runs([job.creation for job in jobs])
        except EngineUnavailableError as error:
            return [error] * len(jobs)
        except InvalidRequestError as error:
            if len(jobs) == 1:
                return [NonRetryableError(describe(error))]
            return await self._create_halves(jobs)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is found out entry by entry
            return [error] if len(jobs) == 1 else await self._create_apart(jobs, error)
        return [await self._finish(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]

    async def _create_halves(self, jobs: Sequence[Handover]) -> Sequence[Outcome]:
        half = len(jobs) // 2
        return [*await self._create(jobs[:half]), *await self._create(jobs[half:])]

    async def _create_apart(self, jobs: Sequence[Handover], error: Exception) -> Sequence[Outcome]:
        """Find out whether the entries or the engine is at fault: where neither the first nor the last can be created, no other is tried."""
        middle = jobs[1:-1]
        (first,) = await self._create(jobs[:1])
        if isinstance(first, EngineUnavailableError):
            return [first] * len(jobs)
        (last,) = await self._create(jobs[-1:])
        if isinstance(last, EngineUnavailableError):
            return [first, *[last] * len(middle), last]
        if not any(one is None or isinstance(one, NonRetryableError) for one in (first, last)):
            failing = EngineFailingError(f"it fails whatever it is given: {describe(error)}")
            return [first, *[failing] * len(middle), last]
        # Where one of the two was at fault it may have been the only one.
        between = await (self._create_halves(middle) if first is last is None else self._create(middle))
        return [first, *between, last]

    async def _finish(self, job: Handover, outcome: CreateOutcome) -> Outcome:
        """Do what is left of one entry whose run, or whose rival, exists. What goes wrong with it is its own outcome."""
        try:
            await handover.complete(self._engine, job, outcome, self._clock())
        except Exception as error:  # noqa: BLE001 - neighbours whose runs exist are handled, whatever befell this one
            return error
        self._telemetry.drained(job.creation.snapshot, job.entry)
        return None


def by_kind(*, audit: Handler, held: Handler) -> Handler:
    """Return a handler that gives audit copies to one and held entries to the other; either may fail without the other."""

    async def handle(entries: Sequence[Entry]) -> Sequence[Outcome]:
        outcomes: dict[str, Outcome] = {}
        for kind, handler in ((EntryKind.AUDIT, audit), (EntryKind.HELD, held)):
            some = [entry for entry in entries if entry.kind is kind]
            if not some:
                continue
            try:
                answers = await handler(some)
            except Exception as error:  # noqa: BLE001 - whatever a handler raises is an outcome of its entries
                answers = [error] * len(some)
            outcomes.update(zip((entry.run_id for entry in some), answers, strict=True))
        return [outcomes[entry.run_id] for entry in entries]

    return handle


def _read(entry: Entry) -> Handover | NonRetryableError:
    try:
        return handover.read(entry)
    except NonRetryableError as error:
        return error
    except MollifierError as error:
        return NonRetryableError(describe(error))
