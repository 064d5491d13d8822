"""The accounts: each way in which a run can be lost, doubled or wrong is noticed, and what is right is not accused."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from mollifier.held import SUPERSEDED
from mollifier.play.torture.accounts import RunRow, close
from mollifier.play.torture.ledger import Ledger
from mollifier.play.torture.orders import Order, Want, payload_of

SEED = 3
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def order(number: int, *, want: Want = Want.PLAIN, calls: int = 1, trial: int | None = None) -> Order:
    return Order(number=number, at_s=0.0, tenant=0, want=want, calls=calls, trial=number if trial is None else trial)


def row(run_id: str, trial: int, status: str = "COMPLETED", **values: object) -> RunRow:
    started_at = None if status == "CANCELED" else NOON
    plain = RunRow(run_id, trial, status, (), payload_of(SEED, trial), int(started_at is not None), started_at, None)
    return plain._replace(**values)


def superseded(run_id: str, trial: int) -> RunRow:
    return row(run_id, trial, "CANCELED", error_name=SUPERSEDED)


def ledger_of(*accepted: tuple[Order, str]) -> Ledger:
    ledger = Ledger()
    for one, run_id in accepted:
        ledger.offer(one)
        ledger.accept(one, run_id)
    return ledger


def test_a_run_for_each_accepted_trigger_balances() -> None:
    ledger = ledger_of((order(0), "run_a"), (order(1), "run_b"))
    accounts = close(ledger, [row("run_a", 0), row("run_b", 1)], seed=SEED)
    assert (accounts.offered, accounts.accepted, accounts.created) == (2, 2, 2)
    assert accounts.imbalances() == ()
    assert accounts.culprits == {}


def test_an_accepted_trigger_without_its_run_is_lost() -> None:
    accounts = close(ledger_of((order(0), "run_a")), [], seed=SEED)
    assert accounts.lost == 1
    assert accounts.culprits == {"lost": ["run_a"]}
    assert accounts.imbalances() == ("1 accepted triggers have no run",)


def test_another_run_of_the_same_trigger_does_not_stand_for_the_one_that_was_promised() -> None:
    assert close(ledger_of((order(0), "run_a")), [row("run_z", 0)], seed=SEED).lost == 1


def test_an_item_of_an_accepted_batch_without_a_run_is_lost() -> None:
    ledger = ledger_of((order(0, want=Want.BATCH, calls=3), ""))
    accounts = close(ledger, [row("run_a", 0), row("run_c", 2)], seed=SEED)
    assert (accounts.accepted, accounts.lost) == (3, 1)


def test_two_runs_of_one_trigger_are_one_too_many_whether_or_not_it_was_answered() -> None:
    ledger = ledger_of((order(0), "run_a"))
    ledger.offer(order(1))
    ledger.unknown += 1
    rows = [row("run_a", 0), row("run_b", 0), row("run_c", 1), row("run_d", 1)]
    assert close(ledger, rows, seed=SEED).duplicated == 2


def test_a_call_without_an_answer_may_or_may_not_have_made_a_run() -> None:
    ledger = Ledger()
    ledger.offer(order(0))
    ledger.offer(order(1))
    ledger.unknown += 2
    assert close(ledger, [row("run_a", 0)], seed=SEED).imbalances() == ()


def test_callers_who_share_a_key_share_one_run() -> None:
    ledger = ledger_of((order(0, want=Want.SHARED), "run_a"), (order(1, want=Want.SHARED, trial=0), "run_a"))
    assert close(ledger, [row("run_a", 0)], seed=SEED).imbalances() == ()


def test_a_run_that_gave_way_to_another_with_its_key_is_no_duplicate() -> None:
    ledger = ledger_of((order(0, want=Want.SHARED), "run_a"), (order(1, want=Want.SHARED, trial=0), "run_b"))
    accounts = close(ledger, [superseded("run_a", 0), row("run_b", 0)], seed=SEED)
    assert (accounts.superseded, accounts.imbalances()) == (1, ())


def test_where_every_run_gave_way_the_trigger_is_lost() -> None:
    assert close(ledger_of((order(0), "run_a")), [superseded("run_a", 0)], seed=SEED).lost == 1


def test_one_run_that_answers_two_triggers_is_a_duplicate() -> None:
    ledger = ledger_of((order(0), "run_a"), (order(1), "run_a"))
    accounts = close(ledger, [row("run_a", 0)], seed=SEED)
    assert (accounts.duplicated, accounts.lost) == (1, 1)


def test_a_run_with_another_payload_is_corrupted() -> None:
    assert close(Ledger(), [row("run_a", 0, payload=b"{}")], seed=SEED).corrupted == 1


@pytest.mark.parametrize(
    ("run", "executed"),
    [
        (row("run_a", 0, "CANCELED"), 0),
        (row("run_a", 0, "CANCELED", started_at=NOON - SECOND, attempt_count=1), 0),
        (row("run_a", 0, "COMPLETED", started_at=NOON - SECOND, attempt_count=1), 0),
        (row("run_a", 0, "COMPLETED", started_at=NOON + SECOND, attempt_count=1), 1),
        (row("run_a", 0, "CANCELED", started_at=NOON + SECOND, attempt_count=1), 1),
        (row("run_a", 0, "EXPIRED", started_at=None, attempt_count=0), 1),
    ],
)
def test_a_run_must_not_start_once_its_cancellation_has_been_answered(run: RunRow, executed: int) -> None:
    ledger = ledger_of((order(0), "run_a"))
    ledger.cancelled_at["run_a"] = NOON
    assert close(ledger, [run], seed=SEED).cancelled_executed == executed


def test_a_tag_that_was_answered_has_to_be_there() -> None:
    ledger = ledger_of((order(0), "run_a"), (order(1), "run_b"))
    ledger.tags.update(run_a="mine", run_b="mine")
    assert close(ledger, [row("run_a", 0, tags=("mine",)), row("run_b", 1)], seed=SEED).changes_lost == 1


@pytest.mark.parametrize(
    ("count", "status"),
    [("unexecuted", "QUEUED"), ("unexecuted", "EXECUTING"), ("gave_up", "SYSTEM_FAILURE"), ("gave_up", "CRASHED")],
)
def test_a_run_that_was_not_executed_to_its_end_is_counted(count: str, status: str) -> None:
    accounts = close(ledger_of((order(0), "run_a")), [row("run_a", 0, status)], seed=SEED)
    assert getattr(accounts, count) == 1
    assert len(accounts.imbalances()) == 1


def ignore(ledger: Ledger) -> None:
    """Leave the caller without any answer that was noted."""


def reject(ledger: Ledger) -> None:
    ledger.rejected += 1


@pytest.mark.parametrize(
    ("happened", "said"),
    [
        (ignore, "offered 1 calls, and 0 came to some end"),
        (reject, "1 calls were rejected (4xx), and every one of them was valid"),
    ],
)
def test_every_call_comes_to_an_end_and_no_valid_one_is_rejected(happened: Callable[[Ledger], None], said: str) -> None:
    ledger = Ledger()
    ledger.offer(order(0))
    happened(ledger)
    assert close(ledger, [], seed=SEED).imbalances() == (said,)
