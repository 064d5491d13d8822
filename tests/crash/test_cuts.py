"""The network fails between chosen bytes, of a request or of its reply: nothing is lost, nothing happens twice, and no reply crosses to another.

Each case has connections of its own, so that every one of an operation sends the same bytes: how many is measured in a run that goes well.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Literal
from urllib.parse import urlsplit

import pytest

from mollifier import faults
from mollifier.errors import BufferUnavailableError
from mollifier.keys import idempotency_digest
from mollifier.play.proxy import HANG, HOST, LOSE, Direction, Fate, Proxy
from mollifier.postgres.database import DEADLINE_S, Database
from tests.core.support import until
from tests.crash.books import Book, all_kept
from tests.crash.drains import Holding
from tests.crash.ground import TASK, Ground, buffer_of, free_claims, house_of, new_name

Store = Literal["valkey", "postgres"]
LEASE_MS = 1_000


class Snare:
    """Springs when this process comes to the point for the first time; what began there may then come to be over."""

    def __init__(self, point: str) -> None:
        self._moments = [f"{point}.before", f"{point}.after"]
        self.spring: Callable[[], None] = _nothing
        self.over: Callable[[], None] = _nothing

    @property
    def has_sprung(self) -> bool:
        """True once it came there."""
        return len(self._moments) < len(("before", "after"))

    def __call__(self, point: str) -> None:
        if self._moments and point == self._moments[0]:
            (self.over if self._moments.pop(0).endswith("after") else self.spring)()


def _nothing() -> None:
    pass


class Cut(Holding):
    """A buffer whose process has one store behind a proxy."""

    proxy: Proxy
    number: int


Act = Callable[[Cut], Awaitable[None]]


@asynccontextmanager
async def behind_proxy(
    ground: Ground, store: Store, number: int, snare: Snare, *, deadline_s: float = DEADLINE_S, **changes: object
) -> AsyncGenerator[Cut]:
    """Lend a process's parts that come to the snare, one of their stores behind a proxy."""
    socket = "valkey.sock" if store == "valkey" else ".s.PGSQL.5432"
    async with Proxy(ground.stack.sockets / socket) as proxy:
        if store == "valkey":
            changes["redis_url"] = f"redis://{HOST}:{proxy.port}/{number}"
        else:
            name = urlsplit(ground.database_url).path
            changes["database_url"] = f"postgresql://mollifier@{HOST}:{proxy.port}{name}"
        settings = ground.settings(number, lease_ms=LEASE_MS, **changes)
        faults.install(snare)
        try:
            async with (
                Database(settings.database_url or "", deadline_s=deadline_s) as database,
                house_of(settings, database) as house,
            ):
                await database.ping()
                cut = Cut(ground, settings, house, new_name())
                cut.proxy, cut.number = proxy, number
                await cut.buffer.ping()
                yield cut
        finally:
            faults.install(None)


async def hold(holding: Cut) -> None:
    await holding.hold("a", idempotency_key="key")


async def hold_three(holding: Cut) -> None:
    await holding.hold_many("a", "b", "c")


async def create(holding: Cut) -> None:
    await holding.trigger("a", idempotency_key="key")


async def again(holding: Cut) -> None:
    """Trigger once more with the key: what the first call left claimed has run out by then."""
    digest = idempotency_digest(holding.environment.id, TASK, "key")
    assert not await free_claims(holding.mollifier, holding.redis, holding.environment, [digest])
    await holding.trigger("a", idempotency_key="key")


async def create_three(holding: Cut) -> None:
    await holding.trigger_many("a", "b", "c")


async def drain(holding: Cut) -> None:
    """Drain what is held until it comes to the cut, or to the end."""
    drainer = holding.mollifier.drainer()
    async with buffer_of(holding.ground.settings(holding.number), holding.ground.database) as healthy:

        async def is_over() -> bool:
            return (await healthy.counts()).left == 0 or holding.proxy.cuts > 0

        drainer.start()
        await until(is_over)
        await drainer.stop()


OPERATIONS: Sequence[tuple[Store, str, Act]] = [
    ("valkey", "valkey.claim", hold),
    ("valkey", "valkey.accept", hold),
    ("valkey", "valkey.accept", hold_three),
    ("valkey", "valkey.release", create),
    ("valkey", "valkey.peek", drain),
    ("valkey", "valkey.pop", drain),
    ("valkey", "valkey.ack", drain),
    ("postgres", "engine.create_runs", create),
    ("postgres", "engine.create_runs", create_three),
    ("postgres", "engine.create_held_runs", drain),
]


@pytest.mark.parametrize(("store", "point", "act"), OPERATIONS)
async def test_a_connection_may_be_cut_after_any_byte(ground: Ground, store: Store, point: str, act: Act) -> None:
    books: list[Book] = []
    whole: dict[Direction, int] = {}

    async def play(spring: Callable[[Proxy], None], over: Callable[[Proxy], None] = lambda _: None) -> int:
        """Play it on a buffer of its own; return how often a connection was cut."""
        snare = Snare(point)
        async with behind_proxy(ground, store, len(books), snare) as holding:
            snare.spring, snare.over = partial(spring, holding.proxy), partial(over, holding.proxy)
            if act is drain:
                await holding.hold_many("a", "b", "c")
            await act(holding)
            if act in (hold, create):
                await again(holding)
            books.append(holding.book)
            return holding.proxy.cuts

    assert await play(Proxy.behave, lambda proxy: whole.update(proxy.passed_bytes)) == 0
    for direction, after_bytes in positions(whole, commands=1 if act in (hold, create) else 3):
        cut = {direction: Fate(after_bytes=after_bytes, once=True)}
        cuts = await play(lambda proxy, cut=cut: proxy.misbehave(**cut))
        # A drainer asks for other things beside: its pipelines are a little shorter now and then.
        may_end_before = act is drain and after_bytes > whole[direction] * 9 // 10
        assert cuts == 1 or may_end_before, f"{after_bytes} of the {direction}"
    await ground.inherit([ground.settings(number) for number in range(len(books))])
    assert await all_kept(ground, books)


def positions(whole: dict[Direction, int], commands: int) -> Sequence[tuple[Direction, int]]:
    """Return where to cut: before anything, within each command and at its end, within the reply; not after the last byte, when nothing comes."""
    assert min(whole.values()) > 0
    places: list[tuple[Direction, int]] = []
    for direction, number in whole.items():
        parts = 2 * commands if direction == "requests" else 2
        within = {number * part // parts for part in range(parts)}
        places.extend((direction, place) for place in sorted({0, 1, number - 1} | within) if place < number)
    return places


LOST: dict[Direction, Fate] = {"requests": LOSE}
UNANSWERED: dict[str, dict[Direction, Fate]] = {
    "nothing happens, and the server learns the scripts": {},
    "the question is lost": LOST,
    "the answer is lost": {"replies": LOSE},
    "the question comes late": {"requests": HANG},
    "the answer comes late": {"replies": HANG},
    "the question comes in pieces, late": {"requests": Fate(piece_bytes=64, delay_s=0.1)},
}
ASKED: Sequence[tuple[Store, str, Act]] = [
    ("valkey", "valkey.claim", hold),
    ("valkey", "valkey.accept", hold),
    ("valkey", "valkey.accept", hold_three),
    ("valkey", "valkey.release", create),
    ("postgres", "engine.create_runs", create),
    ("postgres", "engine.create_runs", create_three),
]


@pytest.mark.parametrize(("store", "point", "act"), ASKED)
async def test_a_question_without_an_answer_in_time_may_have_been_heard_or_may_be_heard_yet(
    ground: Ground, store: Store, point: str, act: Act
) -> None:
    books: list[Book] = []
    # A claim that comes late lasts as long as these deadlines together, and the second call waits for that.
    gate_deadline_ms = 100 if point == "valkey.claim" else 10_000
    deadlines = {"gate_deadline_ms": gate_deadline_ms, "accept_deadline_ms": 100}
    for number, fates in enumerate(UNANSWERED.values()):
        snare = Snare(point)
        async with behind_proxy(ground, store, number, snare, deadline_s=0.5, **deadlines) as holding:
            snare.spring = partial(holding.proxy.misbehave, **fates)
            acting = asyncio.ensure_future(act(holding))
            await until(partial(_has_given_up, acting, holding.proxy, store))
            holding.proxy.behave()
            await acting
            assert snare.has_sprung
            # With a key, what comes late is refused: it finds its claim released.
            if point == "valkey.accept" and act is hold_three and fates != LOST:
                await until(partial(_is_there, holding))
            if act in (hold, create):
                await again(holding)
        books.append(holding.book)
    await ground.inherit([ground.settings(number) for number in range(len(books))])
    assert await all_kept(ground, books)


async def _has_given_up(acting: asyncio.Future[None], proxy: Proxy, store: Store) -> bool:
    """Return whether it waits no more; to give up a question to the database, a client connects once more and waits for that."""
    return acting.done() or (store == "postgres" and proxy.connections > 1)


async def _is_there(holding: Cut) -> bool:
    run_ids = [run_id for promise in holding.book.promises.values() for run_id in promise.answers]
    return None not in await holding.buffer.get_entries(holding.environment.org_id, run_ids)


@pytest.mark.parametrize("seed", range(2))
async def test_no_reply_reaches_another_caller_when_connections_are_cut_again_and_again(
    ground: Ground, seed: int
) -> None:
    dice = random.Random(seed)
    async with behind_proxy(ground, "valkey", 0, Snare("none")) as holding:
        proxy, runs = holding.proxy, holding.mollifier.runs

        async def call(mark: str) -> None:
            run_id = await holding.trigger(mark)
            while True:
                try:
                    run = await runs.get(holding.environment, run_id)
                except BufferUnavailableError:
                    continue
                assert run is not None
                assert run.snapshot.tags == (holding.book.marker(mark),)
                return

        await holding.hold("first")
        for wave in range(15):
            calls = [asyncio.create_task(call(f"{wave}-{number}")) for number in range(15)]
            while not all(each.done() for each in calls):
                direction: Direction = dice.choice(["requests", "replies"])
                cut = Fate(after_bytes=dice.randrange(5_000), piece_bytes=dice.choice([7, 700, 70_000]), once=True)
                proxy.misbehave(**{direction: cut})
                await asyncio.sleep(0.003)
            proxy.behave()
            await asyncio.gather(*calls)
    assert proxy.cuts > 0
    await ground.inherit([ground.settings()])
    assert await all_kept(ground, [holding.book])
