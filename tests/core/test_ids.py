"""Ids: what they look like, how they sort, and that a batch's runs are called the same each time."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from mollifier import ids

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
RUN = re.compile("run_[0-9a-z]{25}")
indexes = st.integers(0, ids.INDEX_MAX)


def test_an_id_is_its_kind_and_25_characters() -> None:
    assert RUN.fullmatch(ids.run_id(NOW))
    assert re.fullmatch("batch_[0-9a-z]{25}", ids.batch_id(NOW))


def test_an_id_that_was_made_later_sorts_later() -> None:
    made = [ids.run_id(NOW + timedelta(milliseconds=n)) for n in range(100)]
    assert made == sorted(made)


def test_ids_of_one_moment_differ() -> None:
    assert len({ids.run_id(NOW) for _ in range(1000)}) == 1000


@given(index=indexes)
def test_the_run_of_an_item_is_called_the_same_each_time(index: int) -> None:
    batch_id = ids.batch_id(NOW)
    assert ids.item_run_id(batch_id, index) == ids.item_run_id(batch_id, index)
    assert RUN.fullmatch(ids.item_run_id(batch_id, index))


@given(pair=st.tuples(indexes, indexes))
def test_the_runs_of_a_batch_sort_by_their_index(pair: tuple[int, int]) -> None:
    batch_id = ids.batch_id(NOW)
    low, high = sorted(pair)
    assert (ids.item_run_id(batch_id, low) < ids.item_run_id(batch_id, high)) == (low < high)


def test_the_runs_of_different_batches_differ() -> None:
    made = [ids.item_run_id(ids.batch_id(NOW), index) for _, index in itertools.product(range(100), range(10))]
    assert len(set(made)) == len(made)


def test_the_runs_of_a_batch_sort_with_others_of_its_moment() -> None:
    earlier, later = ids.run_id(NOW - timedelta(milliseconds=1)), ids.run_id(NOW + timedelta(milliseconds=1))
    assert earlier < ids.item_run_id(ids.batch_id(NOW), 5) < later
