"""The sample of held runs: what is found wrong with one, and what is not held against anybody."""

from datetime import UTC, datetime, timedelta

import pytest

from mollifier.play.runs import RunRow
from mollifier.play.sampling import Sampled, judge

READ = datetime(2026, 1, 1, tzinfo=UTC)
CANCELLED = READ + timedelta(seconds=1)
LATER = READ + timedelta(seconds=2)
TAGS = ["play-x-1", "sampled-0"]

DONE = RunRow("COMPLETED", TAGS, 1, LATER)
CANCELED = RunRow("CANCELED", TAGS, 0, None)


def sampled(*, was_held: bool = True, tag: str | None = None, cancelled_at: datetime | None = None) -> Sampled:
    return Sampled("run_a", READ, was_held=was_held, tag=tag, cancelled_at=cancelled_at)


@pytest.mark.parametrize(
    ("each", "row", "counts"),
    [
        (sampled(), DONE, (1, 1, 0, 0, 0)),
        (sampled(tag="sampled-0"), DONE, (1, 1, 1, 0, 0)),
        (sampled(tag="sampled-0", cancelled_at=CANCELLED), CANCELED, (1, 1, 1, 1, 0)),
        (sampled(cancelled_at=CANCELLED), RunRow("COMPLETED", TAGS, 1, READ), (1, 1, 0, 0, 1)),
        (sampled(cancelled_at=CANCELLED), RunRow("CANCELED", TAGS, 1, READ), (1, 1, 0, 0, 1)),
        (sampled(was_held=False), RunRow("COMPLETED", TAGS, 1, READ), (0, 0, 0, 0, 0)),
    ],
    ids=["read", "tagged", "tagged and cancelled", "ended before", "started before", "no longer held"],
)
def test_what_was_done_with_a_held_run_is_found_in_its_run(
    each: Sampled, row: RunRow, counts: tuple[int, int, int, int, int]
) -> None:
    found = judge([each], {"run_a": row})
    assert (*found[:5], found.faults) == (*counts, ())


@pytest.mark.parametrize(
    ("each", "row", "said"),
    [
        (sampled(), None, "is no run"),
        (sampled(was_held=False), DONE, "did not read as QUEUED"),
        (sampled(was_held=False), CANCELED, "did not read as QUEUED"),
        (sampled(tag="sampled-9"), DONE, "lacks the tag"),
        (sampled(cancelled_at=CANCELLED), DONE, "its run is COMPLETED"),
        (sampled(cancelled_at=CANCELLED), RunRow("CANCELED", TAGS, 1, LATER), "its run is CANCELED"),
        (sampled(cancelled_at=CANCELLED), RunRow("CANCELED", TAGS, 1, None), "its run is CANCELED"),
        (sampled(cancelled_at=CANCELLED), RunRow("QUEUED", TAGS, 0, None), "its run is QUEUED"),
    ],
)
def test_what_became_of_a_held_run_against_its_callers_will_is_a_fault(
    each: Sampled, row: RunRow | None, said: str
) -> None:
    found = judge([each], {} if row is None else {"run_a": row})
    (fault,) = found.faults
    assert said in fault
    assert (found.sampled, found.cancelled, found.too_late) == (1, 0, 0)


def test_a_held_run_that_could_not_be_read_is_of_the_sample() -> None:
    assert judge([], {}, ["run_b was held, and reading it was answered 500"], unread=1)[:2] == (1, 0)
