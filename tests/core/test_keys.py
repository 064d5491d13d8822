"""Keys: one slot per partition, no two names alike whatever ids contain, and no customer's text among them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from mollifier.keys import (
    CONFIRMATION,
    ENGINE_AWAY,
    PARTITIONS,
    Keyspace,
    PartitionKeys,
    idempotency_digest,
    is_request_digest,
    request_digest,
)

ids = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["a", "a:b", ":", "{a}", "{p01}", "}", "queue:a"]
)
NAMED = [
    PartitionKeys.envs,
    PartitionKeys.queue,
    PartitionKeys.waiting,
    PartitionKeys.held,
    PartitionKeys.children,
    PartitionKeys.entry,
    PartitionKeys.idempotency,
    PartitionKeys.rate,
    PartitionKeys.tripped,
    PartitionKeys.requests,
]
EXAMPLES = ["a", "b", "a:b", "b:a", ":", "", "{a}", "{p01}", "}", "queue:a", "é", "e\u0301"]


def every_key(keys: PartitionKeys) -> list[str]:
    return [keys.seq, keys.orgs, keys.draining, keys.failed, *(name(keys, i) for name in NAMED for i in EXAMPLES)]


def test_no_two_keys_are_alike() -> None:
    names = [
        PARTITIONS,
        CONFIRMATION,
        ENGINE_AWAY,
        *(key for keys in Keyspace(3).partitions for key in every_key(keys)),
    ]
    assert len(set(names)) == len(names)


@given(st.sampled_from(NAMED), st.sampled_from(NAMED), ids, ids)
def test_keys_are_alike_only_for_the_same_noun_and_the_same_id(noun: object, other: object, a: str, b: str) -> None:
    assert callable(noun)
    assert callable(other)
    keys = PartitionKeys(0)
    assert (noun(keys, a) == other(keys, b)) == (noun is other and a == b)


@given(ids)
def test_all_keys_of_a_partition_are_in_one_slot_whatever_the_ids(name: str) -> None:
    for keys in Keyspace(3).partitions:
        slots = {key_slot(noun(keys, name).encode()) for noun in NAMED}
        assert slots == {key_slot(keys.orgs.encode())}


def test_partitions_spread_over_slots() -> None:
    slots = {key_slot(keys.orgs.encode()) for keys in Keyspace(64).partitions}
    assert len(slots) >= 63


def test_keys_are_spelled_as_they_are_documented() -> None:
    keys = PartitionKeys(7)
    assert (keys.orgs, keys.envs("O"), keys.queue("E")) == (
        "mollifier:{p07}:orgs",
        "mollifier:{p07}:envs:O",
        "mollifier:{p07}:queue:E",
    )
    assert (keys.entry("R"), keys.draining) == ("mollifier:{p07}:entry:R", "mollifier:{p07}:draining")
    assert (keys.rate("E"), keys.tripped("E")) == ("mollifier:{p07}:rate:E", "mollifier:{p07}:tripped:E")
    assert keys.idempotency("D") == "mollifier:{p07}:idempotency:D"


def test_an_organization_stays_in_its_partition_for_ever() -> None:
    # These are facts about data that users have: another hash would strand what they hold.
    keyspace = Keyspace(64)
    assert [keyspace.of(org).number for org in ("org_1", "org_2", "acme", "")] == [18, 40, 62, 0]


def test_organizations_spread_over_partitions() -> None:
    counts = [0] * 64
    for number in range(6400):
        counts[Keyspace(64).of(f"org_{number}").number] += 1
    assert min(counts) > 40
    assert max(counts) < 180


@given(st.tuples(ids, ids, ids), st.tuples(ids, ids, ids))
def test_digests_are_alike_only_for_the_same_key(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    assert (idempotency_digest(*one) == idempotency_digest(*other)) == (one == other)


def test_moving_text_between_the_parts_of_a_key_makes_another_digest() -> None:
    parts = [("a", "b", "c"), ("ab", "", "c"), ("a", "bc", ""), ("", "ab", "c"), ("a", "", "bc"), ("abc", "", "")]
    for one, other in itertools.combinations(parts, 2):
        assert idempotency_digest(*one) != idempotency_digest(*other)


@given(ids, ids, ids)
def test_a_digest_tells_the_kind_of_its_key(env: str, task: str, key: str) -> None:
    assert is_request_digest(request_digest(env, key))
    assert not is_request_digest(idempotency_digest(env, task, key))


@given(ids.filter(lambda text: len(text) > 3))
def test_a_digest_shows_nothing_of_the_key(text: str) -> None:
    digest = idempotency_digest("env", "task", text)
    assert text not in digest or set(text) <= set("0123456789abcdef")
    assert len(digest) == 40
