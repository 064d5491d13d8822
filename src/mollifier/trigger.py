"""1. The trigger path: validate, idempotency, then admission (the gate, the buffer or the engine), in this order.

A trigger that validation rejects, or that an idempotency key answers, never reaches the gate: it leaves nothing in the buffer and
counts against no rate. Triggers that come together are validated together: when one is rejected, nothing happens for any.

A trigger with a key claims it first (see `claims.py`), whether or not this replica diverts: another may, and this one may have. Only
when neither store takes the run does the trigger fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

import msgspec

from mollifier.admission import Admission, Triggered, answer
from mollifier.bindings import bindings
from mollifier.claims import Claim, Claims
from mollifier.deadline import forget
from mollifier.engine import Existing, KeyKind, RunEngine, TaskCatalog
from mollifier.errors import EngineUnavailableError, FieldError, InvalidRequestError, NotFoundError
from mollifier.model import Environment, GateInputs, Run, Snapshot, TriggerRequest, TriggerResult
from mollifier.refuge import Refuge
from mollifier.runs import Runs
from mollifier.snapshots import take_snapshot
from mollifier.telemetry import Telemetry, current_trace

Looking = asyncio.Future[Sequence[Existing | None]]
"""What is being found out of the runs that keys belong to."""


class Place(msgspec.Struct, frozen=True):
    """What the caller called the fields of one request: errors name them so."""

    task: str = "taskId"
    parent: str = "options.parentRunId"


class Checked(msgspec.Struct, frozen=True):
    """Requests of one environment whose tasks and parents exist; `parents` are those runs, by id."""

    environment: Environment
    requests: tuple[TriggerRequest, ...]
    parents: Mapping[str, Run]


class TriggerService:
    """Takes valid requests of authenticated environments and makes runs of them.

    `claims` is None when no buffer is configured. `clock` returns the current moment in UTC; `new_run_id` a fresh run id.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        claims: Claims | None,
        engine: RunEngine,
        refuge: Refuge,
        runs: Runs,
        tasks: TaskCatalog,
        telemetry: Telemetry,
        clock: Callable[[], datetime],
        new_run_id: Callable[[datetime], str],
    ) -> None:
        self._admission = admission
        self._claims = claims
        self._engine = engine
        self._refuge = refuge
        self._runs = runs
        self._tasks = tasks
        self._telemetry = telemetry
        self._clock = clock
        self._new_run_id = new_run_id

    async def trigger(self, environment: Environment, request: TriggerRequest) -> Triggered:
        """Trigger one run.

        Raises NotFoundError for an unknown task, InvalidRequestError for an unknown parent, BufferUnavailableError where the parent may be held
        and the buffer does not tell, EngineUnavailableError when no store can take the run.
        """
        (triggered,) = await self.trigger_many(environment, [request], [Place()])
        return triggered

    async def trigger_many(
        self, environment: Environment, requests: Sequence[TriggerRequest], places: Sequence[Place] | None = None
    ) -> list[Triggered]:
        """Trigger many runs at once; one answer each, in order. Requests that share an idempotency key make one run.

        Raises as `trigger` does: the first two before anything has happened, the last when some run has found no store.
        """
        return await self.trigger_checked(await self.check(environment, requests, places))

    async def check(
        self, environment: Environment, requests: Sequence[TriggerRequest], places: Sequence[Place] | None = None
    ) -> Checked:
        """Look up what the requests refer to. Without `places`, errors call them `items[0]` and so on."""
        named = places or [item_place(index) for index in range(len(requests))]
        for request, place in zip(requests, named, strict=True):
            if not await self._tasks.knows(request.task_id):
                hint = "Tasks are recorded when a worker that has them in MOLLIFIER_TASKS boots."
                raise NotFoundError("task", request.task_id, place.task, hint)
        parents = await self._parents(environment, requests)
        orphans = {
            place.parent: request.parent_run_id
            for request, place in zip(requests, named, strict=True)
            if request.parent_run_id is not None and request.parent_run_id not in parents
        }
        if orphans:
            detail = "no run {!r} in this environment; give the id of the run that triggers this one"
            raise InvalidRequestError(*(FieldError(field, detail.format(run_id)) for field, run_id in orphans.items()))
        return Checked(environment, tuple(requests), parents)

    async def trigger_checked(self, checked: Checked) -> list[Triggered]:
        """Trigger what `check` found nothing wrong with."""
        now = self._clock()
        # Where the caller named no trace, one begins here: what is drained and executed later belongs to it.
        traceparent, tracestate = current_trace()
        requests = [
            msgspec.structs.replace(request, traceparent=traceparent, tracestate=tracestate)
            if traceparent is not None and request.traceparent is None
            else request
            for request in checked.requests
        ]
        snapshots = [self._snapshot(checked, request, now) for request in requests]
        inputs = [gate_inputs(checked.environment, request) for request in checked.requests]
        if not any(map(bindings, snapshots)):
            return await self._admission.admit(snapshots, inputs)
        if self._claims is None or not self._claims.are_needed:
            return await self._trigger_new(snapshots, inputs, await self._engine.find_by_keys_many(snapshots))
        async with self._looking_ahead(snapshots) as looking:
            taken = await self._claims.take(snapshots)
            async with self._claims.keeping(taken.claim):
                held = await self._admission.assure(snapshots, taken.existing)
                existing = await self._find_unheld(snapshots, held, looking)
                return await self._trigger_new(snapshots, inputs, existing, taken.claim)

    @asynccontextmanager
    async def _looking_ahead(self, snapshots: Sequence[Snapshot]) -> AsyncGenerator[Looking | None]:
        """Have the engine look the keys up while they are claimed, where nothing is held.

        A run that is created between the two is met when this one is: the engine's constraints are asked once more then. Before a run
        is held nobody asks them, so where runs are held the look has to be under the claim.
        """
        if self._admission.diverts:
            yield None
            return
        looking = asyncio.ensure_future(self._engine.find_by_keys_many(snapshots))
        try:
            yield looking
        finally:
            looking.add_done_callback(forget)
            looking.cancel()

    async def _find_unheld(
        self, snapshots: Sequence[Snapshot], held: Sequence[Existing | None], looking: Looking | None
    ) -> Sequence[Existing | None]:
        """Complete what the buffer knows by what the engine knows; with `looking`, what it has been asked already."""
        asked = [index for index, existing in enumerate(held) if existing is None]
        if not asked:
            return held
        if looking is not None:
            return [existing or found for existing, found in zip(held, await looking, strict=True)]
        try:
            found = await self._refuge.find_by_keys_many([snapshots[index] for index in asked])
        except EngineUnavailableError as error:
            # Whether the keys are taken shows when the runs are created.
            self._telemetry.failed_open("engine", error)
            return held
        by_index = dict(zip(asked, found, strict=True))
        return [existing or by_index[index] for index, existing in enumerate(held)]

    async def _trigger_new(
        self,
        snapshots: Sequence[Snapshot],
        inputs: Sequence[GateInputs],
        existing: Sequence[Existing | None],
        claim: Claim | None = None,
    ) -> list[Triggered]:
        """Admit those that no run stands for yet, of those that share a key the first one only.

        Should a run that has another of its keys answer for that one after all, the next of them is admitted, and so on.
        """
        followed = _followed(snapshots, existing)
        new = [index for index, found in enumerate(existing) if found is None and index not in followed]
        admitted = await self._admission.admit([snapshots[i] for i in new], [inputs[i] for i in new], claim)
        answers = dict(zip(new, admitted, strict=True))
        left: list[int] = []
        for index, found in enumerate(existing):
            if found is not None:
                answers[index] = Triggered(answer(found))
            elif index in followed:
                first, by = followed[index]
                if _stands_for(answers[first].result, snapshots[first], by):
                    answers[index] = Triggered(answer(Existing(answers[first].result.run_id, by=by)))
                else:
                    left.append(index)
        if left:
            some = ([snapshots[i] for i in left], [inputs[i] for i in left], [None] * len(left))
            answers.update(zip(left, await self._trigger_new(*some, claim), strict=True))
        return [answers[index] for index in range(len(snapshots))]

    def _snapshot(self, checked: Checked, request: TriggerRequest, now: datetime) -> Snapshot:
        parent = checked.parents[request.parent_run_id] if request.parent_run_id is not None else None
        return take_snapshot(checked.environment, request, parent, request.run_id or self._new_run_id(now), now)

    async def _parents(self, environment: Environment, requests: Sequence[TriggerRequest]) -> Mapping[str, Run]:
        wanted = dict.fromkeys(request.parent_run_id for request in requests)
        return await self._runs.get_many(environment, [run_id for run_id in wanted if run_id is not None])


def item_place(index: int) -> Place:
    """Return what errors call the item at the index."""
    return Place(f"items[{index}].task", f"items[{index}].options.parentRunId")


def gate_inputs(environment: Environment, request: TriggerRequest) -> GateInputs:
    """Return what the gate may know of the trigger."""
    return GateInputs(
        org_id=environment.org_id,
        env_id=environment.id,
        task_id=request.task_id,
        org_flags=environment.org_flags,
        debounce=request.debounce is not None,
        one_time_token=request.one_time_token is not None,
        trigger_and_wait=request.resume_parent_on_completion,
    )


def _stands_for(result: TriggerResult, first: Snapshot, by: KeyKind) -> bool:
    """Return whether the run that answered the first of those that share a key of this kind has that key itself."""
    if result.run_id == first.run_id:
        return True
    return result.is_cached == (by == "idempotency_key") and first.debounce is None


def _followed(snapshots: Sequence[Snapshot], existing: Sequence[Existing | None]) -> Mapping[int, tuple[int, KeyKind]]:
    """Return which snapshots have the key of an earlier one that no run stands for yet, with that one and the kind of the key."""
    firsts: dict[str, int] = {}
    followed: dict[int, tuple[int, KeyKind]] = {}
    for index, snapshot in enumerate(snapshots):
        if existing[index] is not None:
            continue
        keys = bindings(snapshot)
        for by, key in keys:
            if key.digest in firsts:
                followed[index] = firsts[key.digest], by
                break
        else:
            firsts.update((key.digest, index) for _, key in keys)
    return followed
