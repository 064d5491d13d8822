"""Caps on what is held: exact where one script sees it all, bounded where it does not, and in nobody's way below them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from redis.asyncio import Redis

from mollifier.buffer import (
    Acceptance,
    Accepted,
    AcceptOutcome,
    Buffer,
    Claimed,
    DuplicateKey,
    DuplicateRun,
    OverCap,
)
from mollifier.caps import CAPS, NO_CAP, Amount, Cap, CapUse, Limits, Overall, Usage, exceeded, limits, sum_names, uses
from mollifier.errors import BufferUnavailableError
from mollifier.keys import PartitionKeys, idempotency_digest
from mollifier.model import EntryKind
from mollifier.server import Command, Reply, Server
from mollifier.settings import Settings
from tests.core.support import ENV, ORG, SETTINGS, bound, drain_ids, execute, hold, state_of, take, until

HELD, AUDIT = EntryKind.HELD, EntryKind.AUDIT
UNCAPPED = replace(SETTINGS, **dict.fromkeys(CAPS, 0))
# These three are in three partitions of SETTINGS' four.
ORGS = ("org", "org1", "org2")

pytestmark = pytest.mark.leaves_keys


def capped(redis: Redis, now_s: Callable[[], float] = lambda: 0, /, **caps: int) -> Buffer:
    """One process's buffer, under these caps and no others."""
    settings = replace(UNCAPPED, **caps)
    return Buffer(Server(redis), lambda: settings, monotonic=now_s)


async def accept(buffer: Buffer, run_id: str, payload: bytes = b"payload", **other: Any) -> AcceptOutcome:
    values: dict[str, Any] = {"env_id": ENV, "org_id": ORG, "kind": HELD, **other}
    return await buffer.accept(run_id, values.pop("env_id"), values.pop("org_id"), payload, **values)


# --- one cap at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", ["held_env_max_entries", "held_org_max_entries", "held_max_entries"])
async def test_as_many_entries_are_held_as_the_cap_says_and_the_next_changes_nothing(
    redis_client: Redis, cap: Cap
) -> None:
    buffer = capped(redis_client, **{cap: 3})
    await hold(buffer, "a", "b", "c", kind=HELD)
    before = await state_of(redis_client)

    assert await accept(buffer, "d", bindings=bound("task", "key")) == OverCap(cap)

    assert await state_of(redis_client) == before


@pytest.mark.parametrize("cap", ["held_env_max_bytes", "held_org_max_bytes", "held_max_bytes"])
@pytest.mark.parametrize(("size", "fits"), [(39, True), (40, True), (41, False)])
async def test_as_many_bytes_are_held_as_the_cap_says(redis_client: Redis, cap: Cap, size: int, fits: bool) -> None:
    buffer = capped(redis_client, **{cap: 100})
    await hold(buffer, "a", kind=HELD, payload=b"x" * 60)

    outcome = await accept(buffer, "b", b"x" * size)

    assert outcome == (Accepted("b", 2) if fits else OverCap(cap))
    assert (await buffer.usage()).total == (Amount(2, 60 + size) if fits else Amount(1, 60))


@pytest.mark.parametrize(
    ("caps", "named"),
    [
        (dict.fromkeys(CAPS, 1), "held_env_max_entries"),
        ({"held_env_max_bytes": 1, "held_org_max_entries": 1, "held_max_entries": 1}, "held_env_max_bytes"),
        ({"held_org_max_entries": 1, "held_org_max_bytes": 1}, "held_org_max_entries"),
        ({"held_org_max_bytes": 10, "held_max_entries": 1, "held_max_bytes": 1}, "held_org_max_bytes"),
        ({"held_max_entries": 1, "held_max_bytes": 10}, "held_max_entries"),
    ],
)
async def test_of_several_caps_the_narrowest_is_named(redis_client: Redis, caps: dict[str, int], named: Cap) -> None:
    await hold(capped(redis_client), "a", kind=HELD)
    assert await accept(capped(redis_client, **caps), "b") == OverCap(named)


async def test_a_cap_of_one_environment_or_organization_is_not_anothers(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_env_max_entries=1, held_org_max_entries=2)
    await hold(buffer, "a", kind=HELD)
    await hold(buffer, "b", kind=HELD, env="other")
    assert await accept(buffer, "c", env_id="third") == OverCap("held_org_max_entries")
    await hold(buffer, "d", kind=HELD, env="theirs", org="neighbour")


async def test_without_caps_anything_is_held(redis_client: Redis) -> None:
    buffer = capped(redis_client)
    await hold(buffer, *(f"run{n}" for n in range(50)), kind=HELD, payload=b"x" * 10_000)


async def test_an_entry_that_is_larger_than_a_cap_is_never_held(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_org_max_bytes=10)
    assert await accept(buffer, "a", b"x" * 11) == OverCap("held_org_max_bytes")
    assert await state_of(redis_client) == {}


async def test_a_cap_that_is_lowered_holds_at_once_and_takes_nothing_away(redis_client: Redis) -> None:
    await hold(capped(redis_client), "a", "b", "c", kind=HELD)
    lowered = capped(redis_client, held_env_max_entries=1)
    assert await accept(lowered, "d") == OverCap("held_env_max_entries")
    assert await drain_ids(lowered) == ["a", "b", "c"]


# --- what counts ---------------------------------------------------------------------------------------------------


async def test_what_is_held_already_is_no_more_for_being_accepted_again(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_env_max_entries=1, held_max_entries=1)
    assert await accept(buffer, "a", bindings=bound("task", "key")) == Accepted("a", 1)
    before = await state_of(redis_client)
    assert await accept(buffer, "a") == DuplicateRun("a")
    digest = idempotency_digest(ENV, "task", "key")
    assert await accept(buffer, "b", bindings=bound("task", "key")) == DuplicateKey("a", digest)
    assert await state_of(redis_client) == before
    assert await buffer.find_over_cap([Acceptance(run_id="a", env_id=ENV, org_id=ORG, payload=b"")]) is None


async def test_audit_copies_are_under_no_cap_and_take_no_room(redis_client: Redis) -> None:
    buffer = capped(redis_client, **dict.fromkeys(CAPS, 7))
    await hold(buffer, *(f"copy{n}" for n in range(20)), kind=AUDIT)
    await hold(buffer, "run", kind=HELD, payload=b"1234567")


async def test_an_entry_takes_its_room_until_its_run_exists(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_env_max_entries=1)
    await hold(buffer, "a", kind=HELD)
    assert await buffer.requeue(await take(buffer)) == "held"
    entry = await take(buffer)
    assert await accept(buffer, "b") == OverCap("held_env_max_entries")
    assert await buffer.ack(entry) == "held"
    assert isinstance(await accept(buffer, "b"), Accepted)


async def test_an_entry_that_was_given_up_takes_its_room_until_it_is_deleted(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_env_max_entries=1)
    await hold(buffer, "a", kind=HELD)
    assert await buffer.fail(await take(buffer), "error") == "held"
    assert await accept(buffer, "b") == OverCap("held_env_max_entries")
    assert len(await buffer.discard_many(["a"])) == 1
    assert isinstance(await accept(buffer, "b"), Accepted)


async def test_a_change_of_a_held_run_is_never_refused_and_takes_room(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_env_max_bytes=20)
    await hold(buffer, "a", kind=HELD, payload=b"x" * 18)
    entry = await buffer.get_entry(ORG, "a")
    assert entry is not None
    assert await buffer.patch(entry, b"12345") == "held"
    assert await accept(buffer, "b", b"") == OverCap("held_env_max_bytes")


async def test_a_run_whose_entry_vanished_takes_the_room_it_had(redis_client: Redis, keys: PartitionKeys) -> None:
    buffer = capped(redis_client, held_env_max_entries=2, held_env_max_bytes=14)
    await hold(buffer, "a", "b", kind=HELD, payload=b"1234567")
    await execute(redis_client, "DEL", keys.entry("a"))
    assert await accept(buffer, "a", b"12345678") == OverCap("held_env_max_bytes")
    assert await accept(buffer, "a", b"1234567") == Accepted("a", 3)
    assert (await buffer.usage()).total == Amount(2, 14)


async def test_a_claim_outlives_a_refusal_and_is_given_back_by_its_owner(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_env_max_entries=1)
    await hold(buffer, "a", kind=HELD)
    digest = idempotency_digest(ENV, "task", "key")
    assert await buffer.claim(ORG, digest, "token", 60_000) == Claimed()
    assert await accept(buffer, "b", bindings=bound("task", "key"), token="token") == OverCap("held_env_max_entries")
    assert await buffer.release(ORG, [digest], "token") == 1


async def test_entries_that_come_together_are_let_in_one_by_one(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_org_max_bytes=25)
    entries = [Acceptance(run_id=f"r{n}", env_id=ENV, org_id=ORG, payload=b"x" * 10, kind=HELD) for n in range(3)]
    entries.append(replace(entries[0], run_id="small", payload=b"x" * 5))
    over = OverCap("held_org_max_bytes")
    assert await buffer.accept_many(entries) == [Accepted("r0", 1), Accepted("r1", 2), over, Accepted("small", 3)]


@pytest.mark.parametrize(("count", "found"), [(2, None), (3, "held_env_max_entries")])
async def test_whether_entries_fit_together_is_told_without_a_change(
    redis_client: Redis, count: int, found: Cap | None
) -> None:
    buffer = capped(redis_client, held_env_max_entries=3, held_max_entries=3)
    await hold(buffer, "a", kind=HELD)
    before = await state_of(redis_client)
    entries = [Acceptance(run_id=f"r{n}", env_id=ENV, org_id=ORG, payload=b"x") for n in range(count)]
    assert await buffer.find_over_cap(entries) == found
    assert await state_of(redis_client) == before


# --- in all --------------------------------------------------------------------------------------------------------


async def fill(buffer: Buffer, runs: Sequence[tuple[str, str]]) -> list[str]:
    """Accept runs of organizations, all in one call; return those that were let in."""
    outcomes = await buffer.accept_many(
        [Acceptance(run_id=run, env_id=f"{org}/e", org_id=org, payload=b"x", kind=HELD) for org, run in runs]
    )
    return [outcome.run_id for outcome in outcomes if isinstance(outcome, Accepted)]


async def test_one_process_by_itself_keeps_the_cap_in_all_across_partitions(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_max_entries=10)
    assert len({buffer.keyspace.of(org).number for org in ORGS}) == len(ORGS)
    await fill(buffer, [(org, f"{org}{n}") for n in range(9) for org in ORGS])
    assert (await buffer.usage()).total.entries == 10
    for org in ORGS:
        assert await accept(buffer, "late", org_id=org, env_id=f"{org}/late") == OverCap("held_max_entries")


async def test_triggers_on_their_way_at_once_exceed_the_cap_in_all_by_no_more_than_they_are(
    redis_client: Redis,
) -> None:
    buffer = capped(redis_client, held_max_entries=10)
    together = [(org, f"{org}{n}") for n in range(9) for org in ORGS]
    await asyncio.gather(*(fill(buffer, [one]) for one in together))
    held = (await buffer.usage()).total.entries
    assert 10 <= held < 10 + len(together)
    assert await fill(buffer, [(org, f"{org}late") for org in ORGS]) == []


async def test_bytes_in_all_are_counted_across_partitions(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_max_bytes=100)
    assert await accept(buffer, "a", b"x" * 60, org_id=ORGS[0]) == Accepted("a", 1)
    assert await accept(buffer, "b", b"x" * 41, org_id=ORGS[1]) == OverCap("held_max_bytes")
    assert await accept(buffer, "b", b"x" * 40, org_id=ORGS[1]) == Accepted("b", 1)


async def test_what_another_process_holds_in_the_same_partition_counts_at_once(redis_client: Redis) -> None:
    one, other = (capped(redis_client, held_max_entries=4) for _ in range(2))
    await fill(one, [(ORG, "a")])
    await fill(other, [(ORG, "b"), (ORG, "c"), (ORG, "d")])
    assert await accept(one, "e") == OverCap("held_max_entries")


async def test_what_another_process_holds_elsewhere_counts_within_a_second(redis_client: Redis) -> None:
    now_s = 0.0
    one, other = (capped(redis_client, lambda: now_s, held_max_entries=4) for _ in range(2))
    await fill(one, [(ORGS[0], "a")])
    await fill(other, [(ORGS[1], f"b{n}") for n in range(3)])
    assert await fill(one, [(ORGS[0], "over by what one second lets in")])

    now_s = 1.0
    assert await accept(one, "e") == OverCap("held_max_entries")
    # What was drained leaves room, within a second as well.
    await drain_ids(one, f"{ORGS[1]}/e", ORGS[1])
    assert await accept(one, "e") == OverCap("held_max_entries")
    now_s = 2.0
    assert await fill(one, [(ORGS[0], "e")]) == ["e"]


async def test_sums_are_read_beforehand_so_that_no_burst_waits_for_them(redis_client: Redis) -> None:
    now_s = 0.0
    buffer = capped(redis_client, lambda: now_s, held_max_entries=5)
    await fill(buffer, [(ORGS[0], "a")])
    await fill(capped(redis_client), [(ORGS[1], f"b{n}") for n in range(3)])
    now_s = 0.6
    assert await fill(buffer, [(ORGS[0], "c")]) == ["c"]

    async def knows() -> bool:
        one_more = Acceptance(run_id="d", env_id=ENV, org_id=ORGS[2], payload=b"", kind=HELD)
        return await buffer.find_over_cap([one_more]) == "held_max_entries"

    await until(knows)


async def test_an_entry_that_was_refused_is_not_counted_on(redis_client: Redis) -> None:
    buffer = capped(redis_client, held_max_entries=3, held_env_max_entries=1)
    await hold(buffer, "a", kind=HELD)
    for _ in range(5):
        assert await accept(buffer, "a") == DuplicateRun("a")
        assert await accept(buffer, "b") == OverCap("held_env_max_entries")
    assert len(await fill(buffer, [(ORGS[1], "c")])) == 1
    assert len(await fill(buffer, [(ORGS[2], "d")])) == 1
    assert await accept(buffer, "e", org_id=ORGS[2], env_id="e") == OverCap("held_max_entries")


class Recorder(Server):
    """Notes the commands that are sent."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.verbs: list[str] = []

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        self.verbs += [str(command[0]) for command in commands]
        return await super().run_many(commands)


@pytest.mark.parametrize(
    ("caps", "kind", "readings"),
    [({}, HELD, 0), ({"held_max_bytes": 99}, AUDIT, 0), ({"held_max_bytes": 99}, HELD, 1)],
    ids=["no cap in all", "audit copies", "held"],
)
async def test_sums_are_read_once_and_only_for_what_they_are_about(
    redis_client: Redis, caps: dict[str, int], kind: EntryKind, readings: int
) -> None:
    server = Recorder(redis_client)
    buffer = Buffer(server, lambda: replace(UNCAPPED, **caps), monotonic=lambda: 0)
    await hold(buffer, "a", "b", "c", kind=kind)
    assert server.verbs.count("HMGET") == readings * SETTINGS.partitions


class Reluctant(Server):
    """Answers questions for sums when it is let, with an error if it is to fail."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.asked = 0
        self.answers = asyncio.Event()
        self.fails = False

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        if commands[0][0] == "HMGET":
            self.asked += 1
            await self.answers.wait()
            if self.fails:
                raise BufferUnavailableError("no answer")
        return await super().run_many(commands)


async def all_waiting(server: Reluctant, buffer: Buffer) -> list[asyncio.Task[AcceptOutcome]]:
    """Have ten entries on their way that wait for the sums."""
    accepting = [asyncio.create_task(accept(buffer, f"r{n}")) for n in range(10)]
    while not server.asked:
        await asyncio.sleep(0)
    return accepting


async def test_all_who_come_meanwhile_share_one_reading_and_go_on_together(redis_client: Redis) -> None:
    server = Reluctant(redis_client)
    accepting = await all_waiting(server, Buffer(server, lambda: SETTINGS))
    server.answers.set()
    assert [type(outcome) for outcome in await asyncio.gather(*accepting)] == [Accepted] * 10
    assert server.asked == 1


async def test_a_server_that_does_not_tell_the_sums_takes_nothing_and_is_asked_once_for_all(
    redis_client: Redis,
) -> None:
    server = Reluctant(redis_client)
    buffer = Buffer(server, lambda: SETTINGS)
    server.fails = True
    accepting = await all_waiting(server, buffer)
    server.answers.set()
    outcomes = await asyncio.gather(*accepting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BufferUnavailableError] * 10
    assert (server.asked, await state_of(redis_client)) == (1, {})
    server.fails = False
    assert isinstance(await accept(buffer, "later"), Accepted)


async def test_when_the_one_who_reads_gives_up_another_reads(redis_client: Redis) -> None:
    server = Reluctant(redis_client)
    reader, *others = await all_waiting(server, Buffer(server, lambda: SETTINGS))
    reader.cancel()
    while server.asked < 2:
        await asyncio.sleep(0)
    server.answers.set()
    assert [type(outcome) for outcome in await asyncio.gather(*others)] == [Accepted] * 9


# --- the arithmetic ------------------------------------------------------------------------------------------------


class Partition:
    """A partition as its script sees it."""

    def __init__(self) -> None:
        self.held = 0

    def accept(self, most: int) -> bool:
        if self.held + 1 > most:
            return False
        self.held += 1
        return True


steps = st.lists(
    st.tuples(st.sampled_from(["send", "send", "arrive", "begin", "read", "end", "drain"]), st.integers(0, 5)),
    min_size=20,
    max_size=80,
)


@given(steps, st.booleans())
def test_a_process_exceeds_the_cap_in_all_by_what_overtakes_on_the_way_and_no_more(
    steps: list[tuple[str, int]], in_order: bool
) -> None:
    overall, partitions, cap = Overall(), [Partition() for _ in range(3)], 4
    on_the_way: list[tuple[int, int]] = []
    reading: dict[int, Amount] | None = None
    most_on_the_way = 0
    for what, pick in steps:
        where = pick % 3
        match what:
            case "send":
                most = limits(replace(UNCAPPED, held_max_entries=cap), overall.beside(where)).max_entries
                overall.leave(where, 1)
                on_the_way.append((where, most))
                most_on_the_way = max(most_on_the_way, len(on_the_way))
            case "arrive" if on_the_way:
                place, most = on_the_way.pop(0 if in_order else pick % len(on_the_way))
                overall.arrive(place, 1, stored=partitions[place].accept(most))
            case "begin" if reading is None:
                overall.begin_reading()
                reading = {}
            case "read" if reading is not None:
                reading.setdefault(where, Amount(partitions[where].held, partitions[where].held))
            case "end" if reading is not None:
                for number, partition in enumerate(partitions):
                    reading.setdefault(number, Amount(partition.held, partition.held))
                overall.end_reading(reading)
                reading = None
            case "drain":
                partitions[where].held = max(0, partitions[where].held - 1)
            case _:
                pass
        beyond = 0 if in_order else most_on_the_way - 1
        assert sum(partition.held for partition in partitions) <= cap + max(0, beyond)


@given(st.lists(st.integers(0, 9), min_size=6, max_size=6), st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_the_first_cap_is_named_that_the_sums_would_exceed(sums: list[int], most: list[int]) -> None:
    beyond = [cap for cap, held, limit in zip(CAPS, sums, most, strict=True) if held + 1 > limit]
    assert exceeded(sums, Limits(*most), Amount(1, 1)) == (beyond[0] if beyond else None)


def test_a_cap_of_nothing_is_none() -> None:
    assert limits(UNCAPPED) == Limits() == (NO_CAP,) * 6
    assert limits(replace(UNCAPPED, held_max_bytes=10), Amount(1, 15)).max_bytes == -5


def test_the_sums_have_the_names_that_the_script_gives_them() -> None:
    assert sum_names("e", "o") == ("entries:env:e", "bytes:env:e", "entries:org:o", "bytes:org:o", "entries", "bytes")


def test_of_each_cap_that_is_set_the_fullest_owner_is_told() -> None:
    usage = Usage(Amount(5, 50), {"o": Amount(4, 10), "p": Amount(1, 40)}, {"e": Amount(3, 9), "f": Amount(1, 1)})
    settings = replace(UNCAPPED, held_env_max_entries=9, held_org_max_bytes=100, held_max_bytes=200)
    assert uses(settings, usage) == [
        CapUse("held_env_max_entries", 9, 3, "e"),
        CapUse("held_org_max_bytes", 100, 40, "p"),
        CapUse("held_max_bytes", 200, 50),
    ]
    assert uses(settings, Usage(Amount(), {}, {}))[0] == CapUse("held_env_max_entries", 9, 0)


async def test_usage_is_read_by_organization_and_environment_whatever_their_names(redis_client: Redis) -> None:
    buffer = capped(redis_client)
    await hold(buffer, "a", kind=HELD, payload=b"12", org="org:env:x", env="entries:org:y")
    await hold(buffer, "b", kind=HELD, payload=b"123", org="org:env:x", env="")
    usage = await buffer.usage()
    assert usage.total == Amount(2, 5)
    assert usage.orgs == {"org:env:x": Amount(2, 5)}
    assert usage.envs == {"entries:org:y": Amount(1, 2), "": Amount(1, 3)}


def test_the_defaults_leave_each_organization_half_and_each_environment_a_quarter() -> None:
    given = Settings()
    for noun in ("entries", "bytes"):
        whole: int = getattr(given, f"held_max_{noun}")
        assert getattr(given, f"held_org_max_{noun}") * 2 == getattr(given, f"held_env_max_{noun}") * 4 == whole
