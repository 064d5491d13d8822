"""6. Runs, wherever they are: one place to read and change a run that is in the engine, in the buffer, or on its way.

A run is looked for in the engine, then in the buffer, then in the engine once more: the drainer may have moved it in between.
What the engine has not, a buffer that cannot be asked may hold, whether or not anything is diverted now: it may have been held before.
While it is held, a change is appended to its entry as a patch; once somebody has set out to create the run, a change creates it if
need be and is made in the engine (`handover.py` tells why, and in which order it all happens). Everything is scoped to the caller's
environment: what belongs to another does not exist.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import TypeGuard, TypeVar

from mollifier import handover, held, listing, patches
from mollifier.buffer import Buffer
from mollifier.changes import HeldChanges
from mollifier.engine import RunEngine
from mollifier.errors import (
    BufferUnavailableError,
    EngineUnavailableError,
    MalformedEntryError,
    NonRetryableError,
)
from mollifier.keys import idempotency_digest
from mollifier.model import (
    KEY_FREEING_STATUSES,
    Entry,
    EntryKind,
    EntryState,
    Environment,
    MetadataOperation,
    Run,
    RunFilter,
    RunPage,
    RunStatus,
)
from mollifier.settings import Settings

log = logging.getLogger(__name__)

_Outage = EngineUnavailableError | BufferUnavailableError

T = TypeVar("T")
Change = Callable[[], Awaitable[Run | None]]


class Runs:
    """Reads and changes runs for one application. `buffer` is None when none is configured; `clock` returns the moment in UTC.

    Every method raises EngineUnavailableError or BufferUnavailableError when neither store can answer for the run.
    """

    def __init__(
        self,
        engine: RunEngine,
        buffer: Buffer | None,
        settings: Callable[[], Settings],
        clock: Callable[[], datetime],
    ) -> None:
        self._engine = engine
        self._buffer = buffer
        self._settings = settings
        self._clock = clock
        self._changes = HeldChanges(engine, buffer, clock) if buffer is not None else None

    # --- reading ---------------------------------------------------------------------------------------------------

    async def get(self, environment: Environment, run_id: str) -> Run | None:
        """Return the run, or None when this environment has no such run."""
        return await self._wherever(
            environment,
            run_id,
            lambda: self._engine.get_run(environment.id, run_id),
            lambda entry, _: self._read(entry),
        )

    async def get_many(self, environment: Environment, run_ids: Sequence[str]) -> Mapping[str, Run]:
        """Return those of the runs that this environment has, by id, in a handful of round trips; without their children's ids."""
        found, outage = await self._find(environment, run_ids)
        if outage is not None:
            raise outage
        return found

    async def get_reachable(self, environment: Environment, run_ids: Sequence[str]) -> Mapping[str, Run]:
        """Return those of the runs that can be found now: with a store away, without those that only it has. Raises nothing."""
        found, _ = await self._find(environment, run_ids)
        return found

    async def children(self, environment: Environment, run: Run, limit: int) -> Sequence[Run]:
        """Return the runs that this one triggered, wherever they are, oldest first; at most `limit`, and without their own children.

        Those that cannot be looked up now, a store being away, are left out.
        """
        run_ids = dict.fromkeys(run.children[:limit])
        if (buffer := self._holding()) is not None:
            # What is held is looked at first: a child that moves in between is then in the engine. With the buffer away, its own are missed.
            held_ids: Sequence[str] = ()
            with suppress(BufferUnavailableError):
                held_ids = await buffer.held_children(environment.org_id, environment.id, run.id, limit)
            if held_ids or self._settings().divert:
                with suppress(EngineUnavailableError):
                    # A run that is held itself may have children that passed the gate.
                    run_ids.update(dict.fromkeys(await self._engine.get_children(environment.id, run.id, limit)))
                run_ids.update(dict.fromkeys(held_ids))
        found = await self.get_reachable(environment, tuple(run_ids))
        children = (child for child in found.values() if child.snapshot.parent_run_id == run.id)
        return sorted(children, key=lambda child: (child.snapshot.created_at, child.id))[:limit]

    async def list(self, environment: Environment, query: RunFilter) -> RunPage:
        """Return one page of the environment's runs, held ones included, newest first; without what the runs carry (see `RunPage`)."""
        if (buffer := self._holding()) is None:
            return await self._engine.list_runs(environment.id, query)
        reading = listing.held_runs(buffer, self._engine, environment, query, self._clock())
        waiting = await self._unless_away(reading, listing.HeldRuns())
        return listing.merge(await self._engine.list_runs(environment.id, query), waiting, query)

    # --- changing --------------------------------------------------------------------------------------------------

    async def cancel(self, environment: Environment, run_id: str) -> Run | None:
        """Cancel the run unless it has ended. A held one is created cancelled at once, so that nothing can start it."""
        now = self._clock()
        return await self._change(
            environment, run_id, patches.Cancel(now), lambda: self._engine.cancel_run(environment.id, run_id, now)
        )

    async def add_tags(self, environment: Environment, run_id: str, tags: Sequence[str]) -> Run | None:
        """Add tags. Raises InvalidRequestError beyond ten in all."""
        return await self._change(
            environment,
            run_id,
            patches.AddTags(tuple(tags), self._clock()),
            lambda: self._engine.add_tags(environment.id, run_id, tags),
        )

    async def change_metadata(
        self, environment: Environment, run_id: str, operations: Sequence[MetadataOperation]
    ) -> Run | None:
        """Apply metadata operations; concurrent ones never lose one."""
        return await self._change(
            environment,
            run_id,
            patches.ChangeMetadata(tuple(operations), self._clock()),
            lambda: self._engine.change_metadata(environment.id, run_id, operations),
        )

    async def reschedule(self, environment: Environment, run_id: str, delay: timedelta | datetime) -> Run | None:
        """Move a delayed run. Raises ConflictError when it is not delayed."""
        now = self._clock()
        until = now + delay if isinstance(delay, timedelta) else delay
        return await self._change(
            environment,
            run_id,
            patches.Reschedule(until, now),
            lambda: self._engine.reschedule_run(environment.id, run_id, until, now),
        )

    async def reset_idempotency_key(self, environment: Environment, task_id: str, key: str) -> bool:
        """Free the key in both stores; False when nothing held it. Of several at the same moment more than one may find that it was held.

        Raises before anything is freed, or with the held run's binding still in its place: whoever tries again finds what held it.
        """
        reset = patches.ResetKey(self._clock())
        reset_created = partial(self._engine.reset_idempotency_key, environment.id, task_id, key, reset.at)
        if (buffer := self._holding()) is None:
            return await reset_created() is not None
        digest = idempotency_digest(environment.id, task_id, key)
        try:
            # Found out before anything is freed: a buffer that cannot be asked may hold a run with the key.
            bound = await buffer.bound_run(environment.org_id, digest)
        except BufferUnavailableError:
            # Where nothing is diverted, a key that is the engine's is hardly a held run's as well; whose it is otherwise cannot be told.
            if self._settings().divert or await reset_created() is None:
                raise
            return True
        created = await reset_created()
        freed = created is not None
        if bound is not None:
            freed = await self._let_go(environment, task_id, key, bound, reset) or freed
        if created is not None and created != bound:
            # Held and created since the first look, it answers by its binding until that has gone too.
            bound = await self._unless_away(buffer.bound_run(environment.org_id, digest), None)
            if bound == created:
                await self._let_go(environment, task_id, key, created, reset)
        return freed

    async def make_safe(self, org_id: str, env_id: str, run_ids: Sequence[str]) -> AbstractSet[str]:
        """See to it that the engine has these held runs, whatever becomes of their entries; return those that it has.

        It has not what is in neither store, or whose entry cannot be read, the buffer being away. Raises EngineUnavailableError where it
        cannot be asked, or cannot create one of its entry.
        """
        left = await self._unknown(env_id, run_ids)
        made = {run_id for run_id in left if await self._is_handed_over(org_id, run_id)}
        # Settled meanwhile, an entry has its run.
        return {*run_ids} - {*await self._unknown(env_id, [run_id for run_id in left if run_id not in made])}

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _unknown(self, env_id: str, run_ids: Sequence[str]) -> Sequence[str]:
        """Return those of the runs that the engine does not have."""
        known: Mapping[str, Run] = await self._engine.get_runs(env_id, run_ids) if run_ids else {}
        return [run_id for run_id in run_ids if run_id not in known]

    async def _is_handed_over(self, org_id: str, run_id: str) -> bool:
        """Create the run of an entry as it stands once it takes no more changes; False where there is none to be read.

        Raises EngineUnavailableError where the engine cannot create it.
        """
        if self._buffer is None or self._changes is None:
            return False
        try:
            entry = await self._buffer.get_entry(org_id, run_id)
            if entry is not None and not entry.taken:
                await self._buffer.mark(entry)
                entry = await self._buffer.get_entry(org_id, run_id)
        except BufferUnavailableError:
            return False
        except MalformedEntryError as error:
            _report(run_id, error)
            return False
        if entry is None or entry.state is EntryState.MATERIALISED:
            return False
        if not await self._changes.hand_over(entry):
            raise EngineUnavailableError(
                "a run that is held can neither be confirmed nor be created for now; try again"
            )
        return True

    async def _find(self, environment: Environment, run_ids: Sequence[str]) -> tuple[Mapping[str, Run], _Outage | None]:
        """Return those of the runs that are found, by id, and why some may have been missed."""
        if not run_ids:
            return {}, None
        outage: _Outage | None = None
        found: dict[str, Run] = {}
        try:
            found.update(await self._engine.get_runs(environment.id, run_ids))
        except EngineUnavailableError as error:
            outage = error
        missing = [run_id for run_id in run_ids if run_id not in found]
        if missing and (buffer := self._holding()) is not None:
            try:
                entries = await buffer.get_entries(environment.org_id, missing)
            except BufferUnavailableError as error:
                return found, error
            for entry in entries:
                if isinstance(entry, MalformedEntryError):
                    _report(entry.run_id, entry)
                elif _is_held(entry, environment) and (run := await self._read(entry)) is not None:
                    found[run.id] = run
            missing = [run_id for run_id in missing if run_id not in found]
            if missing and outage is None:
                try:
                    found.update(await self._engine.get_runs(environment.id, missing))
                except EngineUnavailableError as error:
                    return found, error
        return found, outage if missing else None

    def _holding(self) -> Buffer | None:
        """Return the buffer when it may hold runs; switched off, not even its server is asked."""
        settings = self._settings()
        return self._buffer if settings.enabled or settings.drains else None

    async def _unless_away(self, looking: Awaitable[T], nothing: T) -> T:
        """Look into the buffer for what comes on top of what the engine has. Where nothing is diverted, the engine's is enough without it.

        In divert mode what an unreachable buffer may hold is missing, and that is an error, never an absence.
        """
        try:
            return await looking
        except BufferUnavailableError:
            if self._settings().divert:
                raise
            return nothing

    async def _wherever(
        self,
        environment: Environment,
        run_id: str,
        in_engine: Change,
        in_buffer: Callable[[Entry, EngineUnavailableError | None], Awaitable[Run | None]],
    ) -> Run | None:
        """Ask the engine, then the buffer, telling `in_buffer` of the engine's outage if it is away, then the engine once more."""
        outage: EngineUnavailableError | None = None
        try:
            run = await in_engine()
        except EngineUnavailableError as error:
            run, outage = None, error
        if run is not None:
            return run
        buffer = self._holding()
        if buffer is not None:
            entry = await self._held_entry(buffer, environment, run_id)
            held_run = await in_buffer(entry, outage) if entry is not None else None
            if held_run is not None:
                return held_run
        if outage is not None:
            raise outage
        return await in_engine() if buffer is not None else None

    async def _held_entry(self, buffer: Buffer, environment: Environment, run_id: str) -> Entry | None:
        try:
            entry = await buffer.get_entry(environment.org_id, run_id)
        except MalformedEntryError as error:
            _report(run_id, error)
            return None
        return entry if _is_held(entry, environment) else None

    async def _read(self, entry: Entry) -> Run | None:
        try:
            return held.run_of(entry, self._clock())
        except NonRetryableError as error:
            _report(entry.run_id, error)
            return None

    async def _let_go(
        self, environment: Environment, task_id: str, key: str, run_id: str, reset: patches.ResetKey
    ) -> bool:
        """Free the key of a run that is bound to it in the buffer, wherever that run is by now; False when it no longer held it.

        Nobody else's key is freed: others may have reset it meanwhile, and triggered anew. The binding is the last to go, for it keeps
        others from making a run with the key. So whoever sets out to create the run after that creates it without the key, and where
        somebody may have set out before, it is created first.
        """
        buffer, changes = self._buffer, self._changes
        if buffer is None or changes is None:
            return False
        digest = idempotency_digest(environment.id, task_id, key)
        freed = False
        entry = await self._held_entry(buffer, environment, run_id)
        # A run that has expired has freed its key, as a created one does, whether or not the drainer has come to it.
        while entry is not None and self._status(entry, reset.at) not in KEY_FREEING_STATUSES:
            if handover.is_taken(entry) and entry.state in (EntryState.QUEUED, EntryState.DRAINING):
                if not await changes.hand_over(entry):
                    raise EngineUnavailableError(f"{run_id}, which holds the key, cannot be created yet; try again")
                freed = await self._reset_created(environment, task_id, key, run_id, reset) or freed
            match await changes.append(entry, reset, unbind=(digest,)):
                case Entry():
                    return True
                case "changed":
                    entry = await self._held_entry(buffer, environment, run_id)
                case _:
                    break
        # The drainer may have created the run and let go of the key between the looks.
        return await self._reset_created(environment, task_id, key, run_id, reset) or freed

    async def _reset_created(
        self, environment: Environment, task_id: str, key: str, run_id: str, reset: patches.ResetKey
    ) -> bool:
        """Free the key in the engine if that run holds it there; return whether it did."""
        engine = self._engine
        return await engine.reset_idempotency_key(environment.id, task_id, key, reset.at, run_id=run_id) is not None

    def _status(self, entry: Entry, now: datetime) -> RunStatus:
        """Return the held run's status; one that cannot be read is about to fail."""
        try:
            return held.run_of(entry, now).status
        except NonRetryableError as error:
            _report(entry.run_id, error)
            return RunStatus.SYSTEM_FAILURE

    async def _change(
        self, environment: Environment, run_id: str, patch: patches.Patch, in_engine: Change
    ) -> Run | None:
        return await self._wherever(
            environment, run_id, in_engine, lambda entry, outage: self._change_held(entry, patch, outage)
        )

    async def _change_held(
        self, entry: Entry, patch: patches.Patch, outage: EngineUnavailableError | None
    ) -> Run | None:
        """Change the run where it is held; None to change it in the engine."""
        try:
            return await self._changes.change(entry, patch, outage) if self._changes is not None else None
        except (NonRetryableError, MalformedEntryError) as error:
            _report(entry.run_id, error)
            return None


def _is_held(entry: Entry | None, environment: Environment) -> TypeGuard[Entry]:
    return entry is not None and entry.kind is EntryKind.HELD and entry.env_id == environment.id


def _report(run_id: str, error: Exception) -> None:
    log.error("mollifier.malformed_entry", extra={"fields": {"run_id": run_id, "error": str(error)}})
