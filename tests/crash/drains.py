"""What a drainer finds when it is to die: entries of every kind, in a buffer of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from redis.asyncio import Redis

from mollifier.admission import Triggered
from mollifier.buffer import Buffer
from mollifier.facade import Mollifier
from mollifier.model import Environment, MetadataOperation, TriggerRequest
from mollifier.server import Server
from mollifier.settings import Settings
from tests.crash.books import Book
from tests.crash.ground import TASK, Ground, house_of, payload, trip
from tests.crash.points import Fault, afterwards
from tests.postgres.support import execute

LATER = datetime(2999, 1, 1, tzinfo=UTC)
SHORT_LEASE_MS = 100


class Holding:
    """One buffer, and what is promised of that which it holds."""

    def __init__(self, ground: Ground, settings: Settings, house: tuple[Mollifier, Redis], name: str) -> None:
        self.ground = ground
        self.settings = settings
        self.mollifier, self.redis = house
        self.environment = Environment(
            id=name, name="prod", project_id=name, org_id=f"org-{name}", org_flags={"mollifierEnabled": True}
        )
        self.book = Book(name)

    @property
    def buffer(self) -> Buffer:
        """The buffer."""
        assert self.mollifier.buffer is not None
        return self.mollifier.buffer

    async def hold(self, mark: str, *tags: str, **options: Any) -> str:
        """Have one trigger held, and return its run's id."""
        await trip(self.mollifier, self.redis, self.environment)
        return await self.trigger(mark, *tags, **options)

    async def create(self, mark: str, *, changed: Mapping[str, Any], **options: Any) -> str:
        """Have one run created, by a process whose settings are changed so, and return its id."""
        settings = msgspec.structs.replace(self.settings, **changed)
        async with house_of(settings, self.ground.database) as (mollifier, _):
            triggered = await mollifier.triggers.trigger(self.environment, self._request(mark, **options))
        return self._note(mark, triggered)

    async def trigger(self, mark: str, *tags: str, **options: Any) -> str:
        """Trigger one run and return its id."""
        request = self._request(mark, *tags, **options)
        return self._note(mark, await self.mollifier.triggers.trigger(self.environment, request))

    async def trigger_many(self, *marks: str) -> None:
        """Trigger runs together."""
        requests = [self._request(mark) for mark in marks]
        answers = await self.mollifier.triggers.trigger_many(self.environment, requests)
        for mark, triggered in zip(marks, answers, strict=True):
            self._note(mark, triggered)

    async def hold_many(self, *marks: str) -> None:
        """Have triggers that come together held."""
        await trip(self.mollifier, self.redis, self.environment)
        await self.trigger_many(*marks)

    async def is_drained(self) -> bool:
        """Return whether the buffer holds nothing but dead letters."""
        counts = await self.buffer.counts()
        return counts.left == counts.failed

    def _request(self, mark: str, *tags: str, **options: Any) -> TriggerRequest:
        marker = self.book.marker(mark)
        body = msgspec.json.encode(payload(self.ground, marker))
        return TriggerRequest(task_id=TASK, payload=body, tags=(marker, *tags), **options)

    def _note(self, mark: str, triggered: Triggered) -> str:
        self.book.of(mark).answers.add(triggered.result.run_id)
        return triggered.result.run_id


Story = Callable[[Holding], Awaitable[None]]


class Scene(msgspec.Struct, frozen=True):
    """What a drainer finds, where it comes to grief, how many dead letters stay, and how its settings differ."""

    story: Story
    faults: tuple[Fault, ...]
    dead: int = 0
    settings: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """For messages."""
        return self.story.__name__


async def every_kind(holding: Holding) -> None:
    """Plain ones, changed ones, one that was cancelled, one that has lost its key to another, and a copy."""
    runs, environment = holding.mollifier.runs, holding.environment
    await holding.hold("plain")
    await holding.hold("delayed", delay=LATER)
    delayed = holding.book.of("delayed")
    delayed.status, delayed.delayed_until = "DELAYED", LATER
    changed = await holding.hold("changed")
    assert await runs.add_tags(environment, changed, ["more"])
    assert await runs.change_metadata(environment, changed, [MetadataOperation(type="increment", key="n", value=b"1")])
    holding.book.of("changed").tags, holding.book.of("changed").counted = {"more"}, (1, 1)
    cancelled = await holding.hold("cancelled")
    assert await runs.cancel(environment, cancelled)
    holding.book.of("cancelled").status = "CANCELED"
    await holding.hold("superseded", idempotency_key="key")
    holding.book.of("superseded").status = "CANCELED"
    await holding.create("winner", changed={"enabled": False}, idempotency_key="key")
    await holding.create("copied", changed={"divert": False})


async def refused_once(holding: Holding) -> None:
    """The database refuses them the first time."""
    for mark in ("a", "b"):
        sequence = f"refusals_{holding.environment.id}_{mark}"
        await execute(holding.ground.database, f"CREATE SEQUENCE {sequence}")
        await holding.hold(mark, f"refuse:{sequence}")


async def refused(holding: Holding) -> None:
    """The database refuses it whenever it is to be executed."""
    await holding.hold("a", "refuse")
    holding.book.of("a").status = "SYSTEM_FAILURE"


async def unstorable(holding: Holding) -> None:
    """No database can store it."""
    await holding.hold("a", "\0")
    holding.book.of("a").is_dead = True


async def stranded(holding: Holding) -> None:
    """It was popped by a drainer that is dead."""
    await holding.hold("a")
    short = msgspec.structs.replace(holding.settings, lease_ms=SHORT_LEASE_MS)
    dying = Buffer(Server(holding.redis), lambda: short)
    assert await dying.pop(holding.environment.org_id, holding.environment.id) is not None


async def slow(holding: Holding) -> None:
    """It takes longer than a lease to create."""
    await holding.hold("a", "slow")


COMMIT = Fault("postgres.commit.before")
SCENES = (
    Scene(
        every_kind,
        (
            *afterwards("valkey.peek", "valkey.pop", "engine.create_held_runs", "engine.carry_over", "valkey.ack"),
            Fault("engine.create_held_runs.after", nth=2),
            COMMIT,
        ),
    ),
    Scene(refused_once, afterwards("valkey.requeue")),
    Scene(
        refused,
        (Fault("engine.create_held_runs.before", nth=2), Fault("engine.create_held_runs.after", nth=2)),
        settings={"drain_max_attempts": 1},
    ),
    Scene(unstorable, (Fault("valkey.fail.before"), *afterwards("valkey.fail")), dead=1),
    Scene(stranded, (Fault("valkey.reclaim.before"), *afterwards("valkey.reclaim"))),
    Scene(slow, afterwards("valkey.extend")),
)


def scene(story: Story) -> Scene:
    """Return the scene of the story."""
    return next(each for each in SCENES if each.story is story)
