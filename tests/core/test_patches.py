"""Changes to a held run: what each makes of it, and of its status at a moment."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.errors import ConflictError, InvalidRequestError, MollifierError
from mollifier.model import MetadataOperation, RunStatus, Snapshot
from mollifier.patches import (
    AddTags,
    Cancel,
    ChangeMetadata,
    Patch,
    Patched,
    Reschedule,
    ResetKey,
    apply,
    apply_all,
    decode,
    encode,
    status_at,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def held(**fields: Any) -> Patched:
    return Patched(Snapshot(run_id="run_1", org_id="org", env_id="env", task_id="echo", created_at=START, **fields))


STATUSES: list[tuple[dict[str, Any], float, RunStatus]] = [
    ({}, 0, RunStatus.QUEUED),
    ({"delayed_until": at(10)}, 9, RunStatus.DELAYED),
    ({"delayed_until": at(10)}, 10, RunStatus.QUEUED),
    ({"ttl_s": 5}, 4, RunStatus.QUEUED),
    ({"ttl_s": 5}, 5, RunStatus.EXPIRED),
    ({"ttl_s": 5, "delayed_until": at(10)}, 14, RunStatus.QUEUED),
    ({"ttl_s": 5, "delayed_until": at(10)}, 15, RunStatus.EXPIRED),
    ({"ttl_s": 2**62}, 1e9, RunStatus.QUEUED),
]


@pytest.mark.parametrize(("fields", "seconds", "status"), STATUSES)
def test_the_status_of_a_held_run_is_what_time_has_made_of_it(
    fields: dict[str, Any], seconds: float, status: RunStatus
) -> None:
    assert status_at(held(**fields), at(seconds)) is status


def test_a_cancellation_is_for_good_and_the_first_one_counts() -> None:
    cancelled = apply(held(ttl_s=5), Cancel(at(1)))

    assert (cancelled.cancelled_at, status_at(cancelled, at(60))) == (at(1), RunStatus.CANCELED)
    assert apply(cancelled, Cancel(at(2))) == cancelled


def test_a_run_that_has_expired_cannot_be_cancelled_any_more() -> None:
    expired = held(ttl_s=5)

    assert apply(expired, Cancel(at(5))) == expired
    assert status_at(apply(expired, Cancel(at(5))), at(6)) is RunStatus.EXPIRED


NOT_DELAYED: list[tuple[Patched, RunStatus]] = [
    (held(), RunStatus.QUEUED),
    (held(delayed_until=at(3)), RunStatus.QUEUED),
    (held(delayed_until=at(1), ttl_s=2), RunStatus.EXPIRED),
    (apply(held(delayed_until=at(60)), Cancel(at(1))), RunStatus.CANCELED),
]


@pytest.mark.parametrize(("run", "status"), NOT_DELAYED)
def test_only_a_delayed_run_is_rescheduled_and_the_refusal_names_its_status(run: Patched, status: RunStatus) -> None:
    with pytest.raises(ConflictError, match=f"this one is {status}"):
        apply(run, Reschedule(at(99), at(3)))


CHANGES: list[Patch] = [
    AddTags(("a",), at(7)),
    ChangeMetadata((MetadataOperation(type="set", key="k", value=b"1"),), at(7)),
    Reschedule(at(99), at(7)),
    Cancel(at(7)),
    ResetKey(at(7)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_each_change_moves_the_moment_of_the_last_change_and_never_back(change: Patch) -> None:
    run = held(delayed_until=at(60), idempotency_expires_at=at(1000))

    assert apply(run, change).changed_at == at(7)
    assert apply(apply(run, AddTags(("later",), at(8))), change).changed_at == at(8)


def test_a_change_that_cannot_be_applied_says_so() -> None:
    with pytest.raises(InvalidRequestError):
        apply(held(tags=tuple("abcdefghij")), AddTags(("k",), at(1)))
    with pytest.raises(InvalidRequestError):
        apply(held(metadata=b'{"k":"x"}'), ChangeMetadata((increment(b"1"),), at(1)))


def increment(value: bytes) -> MetadataOperation:
    return MetadataOperation(type="increment", key="k", value=value)


moments = st.integers(0, 120).map(at)
changes = st.one_of(
    st.builds(AddTags, st.lists(st.sampled_from("abcdefghijkl"), max_size=3).map(tuple), moments),
    st.builds(ChangeMetadata, st.just((increment(b"1"),)), moments),
    st.builds(Reschedule, moments, moments),
    st.builds(Cancel, moments),
    st.builds(ResetKey, moments),
)


@given(
    st.lists(changes, max_size=12),
    st.none() | moments,
    st.none() | st.integers(1, 60),
)
def test_what_was_accepted_one_by_one_reads_the_same_from_the_list(
    asked: list[Patch], delayed_until: datetime | None, ttl_s: int | None
) -> None:
    run = start = held(delayed_until=delayed_until, ttl_s=ttl_s)
    accepted: list[bytes] = []
    for change in asked:
        try:
            run = apply(run, change)
        except MollifierError:
            continue
        accepted.append(encode(change))

    assert apply_all(start.snapshot, decode(accepted)) == run
