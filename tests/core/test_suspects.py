"""Suspects: what came back is handled so that a deadly entry takes few others with it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.model import Entry, EntryKind, EntryState
from mollifier.suspects import turns

LIMIT = 10


def entry(name: str, reclaims: int = 0) -> Entry:
    return Entry(
        run_id=name,
        env_id="env",
        org_id="org",
        kind=EntryKind.HELD,
        state=EntryState.DRAINING,
        sequence=1,
        attempts=0,
        reclaims=reclaims,
        accepted_at_ms=0,
        payload=b"",
    )


def always(number: float) -> Callable[[], float]:
    return lambda: number


@pytest.mark.parametrize(
    ("reclaims", "expected"),
    [
        ([], []),
        ([0, 0, 0], [("handle", [0, 1, 2])]),
        ([0, 1, 0], [("handle", [0, 2]), ("handle", [1])]),
        ([1, LIMIT, 2], [("handle", [0]), ("handle", [1]), ("handle", [2])]),
        ([1, 0, LIMIT + 1], [("handle", [1]), ("give up", [2]), ("handle", [0])]),
        ([LIMIT + 2, LIMIT + 1], [("give up", [0]), ("give up", [1])]),
    ],
)
def test_what_never_came_back_goes_first_and_together_then_what_is_given_up_then_the_suspects_one_by_one(
    reclaims: list[int], expected: list[tuple[str, list[int]]]
) -> None:
    entries = [entry(str(place), number) for place, number in enumerate(reclaims)]
    found = [
        ("give up" if turn.error else "handle", [int(each.run_id) for each in turn.entries])
        for turn in turns(entries, LIMIT, always(0.0))
    ]
    assert found == expected


@given(reclaims=st.lists(st.integers(0, LIMIT + 2)), seed=st.integers(0, 2**32))
def test_every_entry_has_one_turn(reclaims: list[int], seed: int) -> None:
    entries = [entry(str(place), number) for place, number in enumerate(reclaims)]
    found = [each for turn in turns(entries, LIMIT, random.Random(seed).random) for each in turn.entries]
    assert sorted(found, key=lambda each: int(each.run_id)) == entries


def given_up_with_a_deadly_one(innocent: int, seed: int) -> list[str]:
    """Let workers die of one entry until nothing is left; name what was given up."""
    draw = random.Random(seed).random
    left = [entry("deadly"), *(entry(str(number)) for number in range(innocent))]
    given_up: list[str] = []
    while left:
        for turn in turns(left, LIMIT, draw):
            if turn.error is None and any(each.run_id == "deadly" for each in turn.entries):
                left = [entry(each.run_id, each.reclaims + 1) for each in left]
                break
            given_up += [each.run_id for each in turn.entries if turn.error is not None]
            left = [each for each in left if each not in turn.entries]
    return given_up


def test_of_a_thousand_that_die_together_with_a_deadly_one_hardly_any_is_given_up_with_it() -> None:
    given_up = [name for seed in range(20) for name in given_up_with_a_deadly_one(49, seed)]
    assert given_up.count("deadly") == 20
    assert len(given_up) - 20 <= 3
