"""The books: each way in which they can fail to balance is noticed, and a play that went well is not accused."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.play.books import Books, reconcile
from mollifier.rollout import Mode

MONITOR = Books(
    offered=10, accepted=10, pass_through=6, mollify=4, would_mollify=0, buffered=4, drained=4,
    hash_mismatches=0, runs_created=10, lost=0, duplicated=0, executed=10, left_in_buffer=0, buffer_connections=3,
)  # fmt: skip
SHADOW = msgspec.structs.replace(MONITOR, mollify=0, shadow_log=4, would_mollify=4, buffered=0, drained=0)
OFF = msgspec.structs.replace(MONITOR, pass_through=0, mollify=0, buffered=0, drained=0, buffer_connections=0)
DIVERT = msgspec.structs.replace(
    MONITOR, executed=8, attempts_used_up=0,
    sampled=6, sampled_retrieved=6, sampled_tagged=3, sampled_cancelled=2, sampled_too_late=0, sampled_faults=0,
)  # fmt: skip
OUTAGE = msgspec.structs.replace(DIVERT, buffered=6, drained=6, sheltered=2)
SLOW = msgspec.structs.replace(DIVERT, failed_open=1, unbuffered=1, buffered=3, drained=3)
CAPPED = msgspec.structs.replace(DIVERT, over_cap_created=1, buffered=3, drained=3)
REJECTING = msgspec.structs.replace(
    DIVERT, offered=12, rejected=2, over_cap_rejected=2, mollify=6, buffered=4, drained=4
)
BARE = Books(offered=10, accepted=10, pass_through=6, mollify=4)


@pytest.mark.parametrize(
    ("books", "mode"),
    [
        (MONITOR, Mode.MONITOR),
        (SHADOW, Mode.SHADOW),
        (OFF, Mode.OFF),
        (DIVERT, Mode.DIVERT),
        (msgspec.structs.replace(DIVERT, sampled_cancelled=1, sampled_too_late=1), Mode.DIVERT),
        (msgspec.structs.replace(DIVERT, sampled_too_late=1, executed=7), Mode.DIVERT),
        (msgspec.structs.replace(DIVERT, attempts_used_up=1), Mode.DIVERT),
        (OUTAGE, Mode.DIVERT),
        (CAPPED, Mode.DIVERT),
        (SLOW, Mode.DIVERT),
        (msgspec.structs.replace(SLOW, drained=4), Mode.DIVERT),
        (REJECTING, Mode.DIVERT),
        (MONITOR, None),
        (SHADOW, None),
        (BARE, None),
    ],
)
def test_a_play_that_went_well_balances(books: Books, mode: Mode | None) -> None:
    assert books.imbalances(mode) == ()


@pytest.mark.parametrize(
    ("books", "mode", "changes", "said"),
    [
        (MONITOR, Mode.MONITOR, {"offered": 11}, "offered 11 is not accepted 10 + rejected 0 + errors 0"),
        (MONITOR, Mode.MONITOR, {"offered": 11, "errors": 1}, "1 calls got no answer"),
        (MONITOR, Mode.MONITOR, {"offered": 12, "rejected": 2}, "2 calls were rejected"),
        (SLOW, Mode.DIVERT, {"buffered": 2, "drained": 2}, "mollified 4 triggers, 1 were not taken in time and 2 were"),
        (SLOW, Mode.DIVERT, {"drained": 5}, "3 triggers were buffered and 5 drained"),
        (SLOW, Mode.DIVERT, {"drained": 2}, "3 triggers were buffered and 2 drained"),
        (MONITOR, Mode.MONITOR, {"lost": 1}, "1 accepted triggers have no run"),
        (MONITOR, Mode.MONITOR, {"duplicated": 1}, "one too many"),
        (MONITOR, Mode.MONITOR, {"runs_created": 9, "executed": 9}, "9 runs were created for 10 accepted triggers"),
        (MONITOR, Mode.MONITOR, {"executed": 9}, "9 of 10 runs were executed"),
        (MONITOR, Mode.MONITOR, {"buffered": 3, "drained": 3}, "mollified 4 triggers and 3 were buffered"),
        (MONITOR, Mode.MONITOR, {"drained": 3}, "4 triggers were buffered and 3 drained"),
        (MONITOR, Mode.MONITOR, {"hash_mismatches": 1}, "1 payloads came out"),
        (MONITOR, Mode.MONITOR, {"left_in_buffer": 2}, "2 entries are left"),
        (MONITOR, Mode.MONITOR, {"pass_through": 5}, "the gate decided 9 times for 10 accepted triggers"),
        (MONITOR, Mode.MONITOR, {"pass_through": 5, "shadow_log": 1, "would_mollify": 1}, "enrolled, and yet 1"),
        (
            SHADOW,
            Mode.SHADOW,
            {"pass_through": 5, "mollify": 1, "buffered": 1, "drained": 1},
            "in shadow mode nothing may be held, and 1",
        ),
        (SHADOW, Mode.SHADOW, {"would_mollify": 3}, "shadow_log 4 times and the log has 3"),
        (OFF, Mode.OFF, {"pass_through": 10}, "switched off, and yet the gate decided 10 times"),
        (OFF, Mode.OFF, {"buffer_connections": 1}, "switched off, and yet the buffer's server saw 1 connections"),
        (DIVERT, Mode.DIVERT, {"buffered": 5, "drained": 5}, "mollified 4 triggers and 5 were buffered"),
        (DIVERT, Mode.DIVERT, {"executed": 9}, "9 of 8 runs were executed"),
        (DIVERT, Mode.DIVERT, {"executed": 7}, "7 of 8 runs were executed"),
        (DIVERT, Mode.DIVERT, {"sampled_faults": 1}, "1 times a held run was not what it had to be"),
        (OUTAGE, Mode.DIVERT, {"buffered": 5, "drained": 5}, "mollified 4 triggers and 5 were buffered"),
        (OUTAGE, Mode.DIVERT, {"attempts_used_up": 1}, "1 entries used up attempts"),
        (
            CAPPED,
            Mode.DIVERT,
            {"buffered": 4, "drained": 4},
            "mollified 4 triggers, caps kept 1 out and 4 were buffered",
        ),
        (
            REJECTING,
            Mode.DIVERT,
            {"offered": 13, "rejected": 3},
            "1 calls were rejected (4xx), and not because of a cap",
        ),
        (REJECTING, Mode.DIVERT, {"pass_through": 5}, "the gate decided 11 times for 10 accepted"),
        (BARE, None, {"left_in_buffer": 1}, "1 entries are left"),
    ],
)
def test_each_imbalance_is_noticed_and_nothing_else_is(
    books: Books, mode: Mode | None, changes: Mapping[str, int], said: str
) -> None:
    (found,) = msgspec.structs.replace(books, **changes).imbalances(mode)
    assert said in found


@pytest.mark.parametrize(
    ("accepted", "found", "counts"),
    [
        ({}, [], (0, 0, 0)),
        ({0: "a", 1: "b"}, [("a", 0), ("b", 1)], (2, 0, 0)),
        ({0: "a", 1: "b"}, [("a", 0)], (1, 1, 0)),
        ({0: "a"}, [("a", 0), ("b", 0)], (2, 0, 1)),
        ({0: "a", 1: "a"}, [("a", 0)], (1, 0, 1)),
        ({0: "a"}, [("a", 0), ("c", 7)], (2, 0, 0)),
        ({}, [("c", 7)], (1, 0, 0)),
    ],
    ids=["nothing", "all", "lost", "two runs for one call", "one run for two calls", "run without answer", "only that"],
)
def test_answers_and_runs_are_compared_one_by_one(
    accepted: dict[int, str], found: list[tuple[str, int]], counts: tuple[int, int, int]
) -> None:
    assert reconcile(accepted, found) == counts


@pytest.mark.parametrize(
    ("books", "mode", "changes", "said"),
    [
        (SHADOW, Mode.SHADOW, {"shadow_log": 0, "would_mollify": 0, "pass_through": 10}, "not one would_mollify event"),
        (MONITOR, Mode.MONITOR, {"mollify": 0, "pass_through": 10, "buffered": 0, "drained": 0}, "nothing was copied"),
        (
            DIVERT,
            Mode.DIVERT,
            {"mollify": 0, "pass_through": 10, "buffered": 0, "drained": 0, "failed_open": 4},
            "nothing was held: this proves nothing of held runs (4 failures",
        ),
        (DIVERT, Mode.DIVERT, {"sampled_tagged": 0}, "none of 6 sampled runs was tagged"),
        (DIVERT, Mode.DIVERT, {"sampled_cancelled": 0, "executed": 10}, "none of 6 sampled runs was cancelled"),
    ],
)
def test_a_burst_that_left_no_trace_is_an_imbalance_although_the_numbers_agree(
    books: Books, mode: Mode, changes: Mapping[str, int], said: str
) -> None:
    assert books.imbalances(mode, has_burst=True) == ()
    idle = msgspec.structs.replace(books, **changes)
    assert said in " ".join(idle.imbalances(mode, has_burst=True))
    assert said not in " ".join(idle.imbalances(mode))


@given(st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)))
def test_the_lost_are_those_answered_without_a_run(answered: set[int], created: set[int]) -> None:
    result = reconcile({n: f"run_{n}" for n in answered}, [(f"run_{n}", n) for n in created])
    assert result == (len(created), len(answered - created), 0)
