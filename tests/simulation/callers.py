"""Callers of the API: they ask, wait, give up, and ask again with the same keys, as the SDKs do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from mollifier import dead_letters
from mollifier.errors import (
    BufferUnavailableError,
    ConflictError,
    EngineUnavailableError,
    InvalidRequestError,
    OverCapError,
)
from mollifier.facade import Mollifier
from mollifier.model import Environment, MetadataOperation, Run, RunFilter, TriggerRequest
from tests.simulation.history import Call, Outcome
from tests.simulation.network import Cut
from tests.simulation.plan import Ask

if TYPE_CHECKING:
    from tests.simulation.world import World

INCREMENT = MetadataOperation(type="increment", key="n", value=b"1")
_WAY_S = 0.0002

Operation = Callable[[Mollifier], Awaitable[Any]]


class Callers:
    """Everybody who asks anything in one seed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[str, list[str]] = {}

    def tasks(self, asks: Sequence[Ask]) -> list[asyncio.Task[None]]:
        """Begin: each request is made at its time."""
        return [asyncio.create_task(self._ask(ask)) for ask in asks]

    async def _ask(self, ask: Ask) -> None:
        world = self._world
        await asyncio.sleep(ask.at_s)
        known = self._known.get(world.plan.tenants[ask.tenant].id)
        if ask.kind == "replay" and known:
            # Whoever replays has looked which are dead.
            known = [run_id for run_id in known if world.watch.facts.is_dead(run_id)] or known
        picked = known[int(ask.pick * len(known))] if known else ""
        is_about_one = ask.kind in ("tag", "count", "cancel", "move", "read", "replay")
        if is_about_one and not picked:
            return
        requests = ask.requests
        if ask.has_parent and picked:
            requests = tuple(replace(request, parent_run_id=picked) for request in requests)
        for attempt in range(ask.tries):
            call = await self._call(ask, requests, picked if is_about_one else "", ask.api + attempt)
            if call.outcome in ("answered", "refused"):
                return
            await asyncio.sleep(ask.again_after_s)

    async def _call(self, ask: Ask, requests: tuple[TriggerRequest, ...], run_id: str, api: int) -> Call:
        world = self._world
        process = world.api(api)
        history = world.history
        call = Call(
            kind=ask.kind,
            environment=world.plan.tenants[ask.tenant],
            process=process.name,
            began=history.steps,
            began_s=world.loop.time(),
            requests=requests,
            run_id=run_id,
            value=ask.value,
        )
        history.calls.append(call)
        world.watch.asked(call)
        history.note(call.began_s, "asks", call)
        try:
            outcome, answer = "answered", await process.serve(call, ask.patience_s, _WAY_S, _operation(call))
        except (InvalidRequestError, ConflictError, OverCapError) as error:
            outcome, answer = "refused", error
        except (EngineUnavailableError, BufferUnavailableError) as error:
            outcome, answer = "unavailable", error
        except (Cut, TimeoutError, RuntimeError) as error:
            outcome, answer = "broken", error
        self._told(call, outcome, answer)
        return call

    def _told(self, call: Call, outcome: Outcome, answer: Any) -> None:
        world = self._world
        call.outcome, call.answer = outcome, answer
        call.ended, call.ended_s = world.history.steps, world.loop.time()
        if call.kind == "trigger" and outcome == "answered":
            call.results = tuple(triggered.result for triggered in answer)
            call.answer = None
            known = self._known.setdefault(call.environment.id, [])
            known.extend(result.run_id for result in call.results)
        world.answered(call)


def _operation(call: Call) -> Operation:
    environment, run_id = call.environment, call.run_id
    match call.kind:
        case "trigger" if len(call.requests) == 1:

            async def trigger(mollifier: Mollifier) -> Any:
                return [await mollifier.triggers.trigger(environment, call.requests[0])]

            return trigger
        case "trigger":
            return lambda mollifier: mollifier.triggers.trigger_many(environment, call.requests)
        case "tag":
            return lambda mollifier: mollifier.runs.add_tags(environment, run_id, [call.value])
        case "count":
            return lambda mollifier: mollifier.runs.change_metadata(environment, run_id, [INCREMENT])
        case "cancel":
            return lambda mollifier: mollifier.runs.cancel(environment, run_id)
        case "move":
            return lambda mollifier: mollifier.runs.reschedule(environment, run_id, call.value)
        case "reset":
            return lambda mollifier: mollifier.runs.reset_idempotency_key(environment, "task", call.value)
        case "read":
            return lambda mollifier: mollifier.runs.get(environment, run_id)
        case "replay":
            return lambda mollifier: _replay(mollifier, run_id)
        case "list":
            return lambda mollifier: _walk(mollifier, environment, call.value)


async def _replay(mollifier: Mollifier, run_id: str) -> str:
    """Put a dead letter back into its queue; say what came of it."""
    assert mollifier.buffer is not None
    (outcome,) = await dead_letters.replay_many(mollifier.buffer, [run_id])
    if isinstance(outcome, BufferUnavailableError):
        raise outcome
    return type(outcome).__name__


async def _walk(mollifier: Mollifier, environment: Environment, page_size: int) -> list[Run]:
    """Read all pages of a list, one after another."""
    page = await mollifier.runs.list(environment, RunFilter(page_size=page_size))
    found = list(page.runs)
    while page.next is not None:
        page = await mollifier.runs.list(environment, RunFilter(page_size=page_size, after=page.next))
        found += page.runs
    return found
