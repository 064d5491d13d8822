"""The rotation: everybody reaches every place, nobody gets more by having more environments, and coming or going costs nobody a turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.fairness import Rotation, deal

PLENTY = 10_000
NAMES = [f"org-{n:02}" for n in range(12)]

some_names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=12, unique=True)


def single(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return these organizations with one environment each."""
    return {name: (f"env-of-{name}",) for name in names}


def order(
    rotation: Rotation,
    ready: Mapping[str, Sequence[str]],
    *,
    capacity: int = PLENTY,
    batch_size: int = 1,
    max_orgs: int = PLENTY,
) -> list[str]:
    """Return the organizations that one tick serves, in order."""
    plan = rotation.plan(ready, capacity=capacity, batch_size=batch_size, max_orgs=max_orgs)
    return [served.org_id for served, _ in plan]


def test_nothing_ready_is_nothing_to_serve() -> None:
    assert order(Rotation(), {}) == []
    assert order(Rotation(), {"org": ()}) == []


def test_no_capacity_is_nothing_to_serve() -> None:
    assert order(Rotation(), single(NAMES), capacity=0) == []


def test_the_start_advances_by_one_each_tick() -> None:
    rotation = Rotation()
    ticks = [order(rotation, single("ABCD")) for _ in range(6)]
    assert ["".join(tick) for tick in ticks] == ["ABCD", "BCDA", "CDAB", "DABC", "ABCD", "BCDA"]


@given(some_names, st.integers(1, 12))
def test_every_participant_reaches_every_position_equally_often(names: list[str], max_orgs: int) -> None:
    rotation = Rotation()
    ticks = [order(rotation, single(names), max_orgs=max_orgs) for _ in names]
    for position in range(min(max_orgs, len(names))):
        assert sorted(tick[position] for tick in ticks) == sorted(names)


@given(some_names, st.integers(1, 12), st.integers(1, 30))
def test_a_tick_serves_no_more_organizations_than_it_may(names: list[str], max_orgs: int, capacity: int) -> None:
    served = order(Rotation(), single(names), capacity=capacity, max_orgs=max_orgs)
    assert len(served) == min(len(names), max_orgs, capacity)
    assert len(set(served)) == len(served)


@given(st.integers(1, 8), st.integers(1, 8))
def test_the_environments_of_an_organization_take_turns(environments: int, rounds: int) -> None:
    rotation = Rotation()
    ready = {"org": [f"env-{n}" for n in range(environments)]}
    served = Counter(
        rotation.plan(ready, capacity=PLENTY, batch_size=1, max_orgs=PLENTY)[0][0].env_id
        for _ in range(environments * rounds)
    )
    assert served == dict.fromkeys(ready["org"], rounds)


@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 20))
def test_an_organization_with_many_environments_gets_no_more_than_one_with_a_single_one(
    environments: int, capacity: int, batch_size: int
) -> None:
    rotation = Rotation()
    ready = {"many": [f"env-{n}" for n in range(environments)], "single": ["env"]}
    got: Counter[str] = Counter()
    for _ in range(2 * environments):
        for served, share in rotation.plan(ready, capacity=capacity, batch_size=batch_size, max_orgs=PLENTY):
            got[served.org_id] += share
    assert got["many"] == got["single"]


@given(
    st.sampled_from(NAMES),
    st.lists(st.sets(st.sampled_from(NAMES)), min_size=len(NAMES), max_size=len(NAMES)),
    st.integers(1, 3),
)
def test_who_stays_ready_comes_first_within_one_round_whoever_joins_and_leaves(
    stays: str, others: list[set[str]], capacity: int
) -> None:
    rotation = Rotation()
    firsts = [order(rotation, single(sorted({stays, *ready})), capacity=capacity)[0] for ready in others]
    assert stays in firsts


@given(st.sampled_from(NAMES), st.lists(st.sets(st.sampled_from(NAMES)), min_size=len(NAMES), max_size=len(NAMES)))
def test_an_environment_that_stays_ready_is_served_within_one_round_whichever_join_and_leave(
    stays: str, others: list[set[str]]
) -> None:
    rotation = Rotation()
    served = [
        rotation.plan({"org": sorted({stays, *ready})}, capacity=1, batch_size=1, max_orgs=1)[0][0].env_id
        for ready in others
    ]
    assert stays in served


def test_the_order_in_which_the_ready_are_listed_does_not_matter() -> None:
    one, other = Rotation(), Rotation()
    for _ in range(5):
        assert order(one, single(NAMES)) == order(other, single(NAMES[::-1]))


def test_one_that_leaves_costs_nobody_a_turn() -> None:
    rotation = Rotation()
    assert order(rotation, single("ABCD"))[0] == "A"
    assert order(rotation, single("ACD"))[0] == "C"
    assert order(rotation, single("ABCD"))[0] == "D"
    assert order(rotation, single("ABCD"))[0] == "A"


@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 60))
def test_capacity_is_dealt_one_by_one(participants: int, capacity: int, most: int) -> None:
    shares = deal(participants, capacity, most)
    assert len(shares) == participants
    assert sum(shares) == min(capacity, participants * most)
    assert max(shares) <= most
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("participants", "capacity", "most", "shares"),
    [
        (2, 50, 50, [25, 25]),
        (3, 50, 50, [17, 17, 16]),
        (1, 50, 20, [20]),
        (4, 50, 5, [5, 5, 5, 5]),
        (3, 3, 50, [1, 1, 1]),
    ],
)
def test_shares_of_a_tick(participants: int, capacity: int, most: int, shares: list[int]) -> None:
    assert deal(participants, capacity, most) == shares


@given(some_names, st.integers(1, 100), st.integers(1, 20), st.integers(1, 12))
def test_everybody_who_is_served_gets_at_least_one_and_at_most_a_batch(
    names: list[str], capacity: int, batch_size: int, max_orgs: int
) -> None:
    plan = Rotation().plan(single(names), capacity=capacity, batch_size=batch_size, max_orgs=max_orgs)
    shares = [share for _, share in plan]
    assert all(1 <= share <= batch_size for share in shares)
    assert sum(shares) <= capacity
