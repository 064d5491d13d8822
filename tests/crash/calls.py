"""What callers do while the API process comes to grief. Before the `yield` of a story nothing befalls anybody."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import msgspec

from tests.crash.caller import Caller
from tests.crash.ground import TASK
from tests.crash.points import Fault, afterwards

Story = Callable[[Caller], AsyncGenerator[None]]
LATER = datetime(2999, 1, 1, tzinfo=UTC)


class Scene(msgspec.Struct, frozen=True):
    """A story, where the process comes to grief in it, and how that process's settings differ."""

    story: Story
    faults: tuple[Fault, ...]
    settings: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """For messages."""
        return self.story.__name__


async def hold(caller: Caller) -> AsyncGenerator[None]:
    await caller.trip()
    yield
    key = f"{caller.name}-key"
    first = await caller.trigger("a", idempotencyKey=key)
    assert await caller.trigger("a", "-again", idempotencyKey=key) == first
    await caller.trigger("b")


async def create(caller: Caller) -> AsyncGenerator[None]:
    yield
    key = f"{caller.name}-key"
    first = await caller.trigger("a", idempotencyKey=key)
    assert await caller.trigger("a", "-again", idempotencyKey=key) == first
    await caller.trigger("b")


async def copy(caller: Caller) -> AsyncGenerator[None]:
    await caller.trip()
    yield
    await caller.trigger("a", idempotencyKey=f"{caller.name}-key")


async def batch(caller: Caller) -> AsyncGenerator[None]:
    yield
    for moment in ("calm", "burst"):
        if moment == "burst":
            await caller.trip()
        marks = [f"{moment}-{number}" for number in range(3)]
        items = [{"task": TASK, **caller.item(mark)} for mark in marks]
        items[0] = {"task": TASK, **caller.item(marks[0], idempotencyKey=f"{caller.name}-{moment}")}
        request_key = f"{caller.name}-{moment}-batch"
        _, made = await caller.ok("POST", "/api/v2/tasks/batch", {"items": items}, request_key=request_key)
        _, again = await caller.ok("POST", "/api/v2/tasks/batch", {"items": items}, request_key=request_key)
        assert again["id"] == made["id"]
        await _belongs(caller, made["id"], marks)


async def stream(caller: Caller) -> AsyncGenerator[None]:
    await caller.trip()
    yield
    marks = ["a", "b"]
    announcement = {"runCount": 2, "idempotencyKey": f"{caller.name}-batch"}
    _, made = await caller.ok("POST", "/api/v3/batches", announcement)
    lines = [
        json.dumps({"index": index, "task": TASK, **caller.item(mark)}).encode() for index, mark in enumerate(marks)
    ]
    for _ in range(2):
        _, added = await caller.ok("POST", f"/api/v3/batches/{made['id']}/items", b"\n".join(lines))
        assert added["sealed"]
    await _belongs(caller, made["id"], marks)


async def change(caller: Caller) -> AsyncGenerator[None]:
    await caller.trip()
    run = await caller.trigger("changed", delay=LATER.isoformat())
    cancelled = await caller.trigger("cancelled")
    yield
    await _change(caller, run, "changed")
    await _cancel(caller, cancelled, "cancelled")


async def change_taken(caller: Caller) -> AsyncGenerator[None]:
    """The entries are in the hands of a drainer that never comes back."""
    await caller.trip()
    run = await caller.trigger("changed", delay=LATER.isoformat())
    cancelled = await caller.trigger("cancelled")
    buffer = caller.mollifier.buffer
    assert buffer is not None
    for _ in range(2):
        assert await buffer.pop(caller.environment.org_id, caller.environment.id) is not None
    yield
    await _change(caller, run, "changed")
    await _cancel(caller, cancelled, "cancelled")


async def change_created(caller: Caller) -> AsyncGenerator[None]:
    run = await caller.trigger("changed", delay=LATER.isoformat())
    cancelled = await caller.trigger("cancelled", delay=LATER.isoformat())
    yield
    await _change(caller, run, "changed")
    await _cancel(caller, cancelled, "cancelled")


async def reset(caller: Caller) -> AsyncGenerator[None]:
    await caller.trip()
    key = f"{caller.name}-key"
    first = await caller.trigger("a", idempotencyKey=key)
    yield
    # Reset by the process that died, there is nothing left to reset for the next.
    status, _ = await caller.call(
        "POST", f"/api/v1/idempotencyKeys/{quote(key, safe='')}/reset", {"taskIdentifier": TASK}
    )
    assert status == 200 or (status == 404 and caller.went_without_answer)
    assert await caller.trigger("b", idempotencyKey=key) != first


async def decide(caller: Caller) -> AsyncGenerator[None]:
    """An operator has one dead letter replayed and another deleted."""
    await caller.trip()
    replayed, deleted = await caller.trigger("replayed"), await caller.trigger("deleted")
    buffer = caller.mollifier.buffer
    assert buffer is not None
    for _ in range(2):
        entry = await buffer.pop(caller.environment.org_id, caller.environment.id)
        assert entry is not None
        assert await buffer.fail(entry, "it died") == "held"
    yield
    # Done by the process that died, there is nothing left to do for the next.
    for method, path in (("POST", f"{replayed}/replay"), ("DELETE", deleted)):
        unanswered = caller.went_without_answer
        status, _ = await caller.call(method, f"/admin/api/v1/dead-letters/{path}")
        assert status == 200 or (status in (404, 409) and caller.went_without_answer > unanswered)
    caller.of("deleted").is_dead = True


async def _belongs(caller: Caller, batch_id: str, marks: list[str]) -> None:
    _, read = await caller.ok("GET", f"/api/v2/batches/{batch_id}")
    assert len(read["runs"]) == len(marks)
    for mark, run_id in zip(marks, read["runs"], strict=True):
        caller.of(mark).answers.add(run_id)


async def _change(caller: Caller, run_id: str, mark: str) -> None:
    promise, unanswered = caller.of(mark), caller.went_without_answer
    await caller.ok("POST", f"/api/v1/runs/{run_id}/tags", {"tags": ["more"]})
    promise.tags.add("more")
    until = LATER + timedelta(days=1)
    await caller.ok("POST", f"/api/v1/runs/{run_id}/reschedule", {"delay": until.isoformat()})
    promise.delayed_until, promise.status = until, "DELAYED"
    increments = 2
    operations = {"operations": [{"type": "increment", "key": "n", "value": 1}]}
    for _ in range(increments):
        await caller.ok("PUT", f"/api/v1/runs/{run_id}/metadata", operations)
    # A call without an answer may have counted, and was made once more.
    promise.counted = increments, increments + caller.went_without_answer - unanswered


async def _cancel(caller: Caller, run_id: str, mark: str) -> None:
    promise = caller.of(mark)
    for _ in range(2):
        await caller.ok("POST", f"/api/v2/runs/{run_id}/cancel")
    promise.status = "CANCELED"


STATEMENT, COMMIT = Fault("postgres.statement.after"), Fault("postgres.commit.before")
CLAIMING = ("valkey.claim", "engine.find_by_keys_many", "valkey.release")
CHANGING = ("engine.add_tags", "engine.reschedule_run", "engine.change_metadata", "engine.cancel_run")

SCENES = (
    Scene(hold, (Fault("valkey.claim.before"), *afterwards("valkey.limit", "valkey.trip", "valkey.accept", *CLAIMING))),
    Scene(create, (*afterwards("engine.create_runs", *CLAIMING), Fault("engine.create_runs.before"))),
    Scene(copy, afterwards("valkey.accept", "engine.create_runs"), {"divert": False}),
    Scene(
        batch,
        (*afterwards("engine.create_batch", "valkey.accept", "engine.create_runs", "engine.add_batch_runs"), COMMIT),
    ),
    Scene(stream, afterwards("engine.create_batch", "engine.get_batch", "valkey.accept", "engine.add_batch_runs")),
    Scene(change, afterwards("valkey.patch", *CHANGING, "engine.create_held_runs")),
    Scene(change_taken, (*afterwards(*CHANGING, "engine.create_held_runs"), COMMIT)),
    Scene(change_created, (*afterwards(*CHANGING), STATEMENT, COMMIT)),
    Scene(decide, afterwards("valkey.revive", "valkey.discard")),
    Scene(reset, afterwards("engine.reset_idempotency_key", "valkey.patch")),
)


def scene(story: Story) -> Scene:
    """Return the scene of the story."""
    return next(each for each in SCENES if each.story is story)
