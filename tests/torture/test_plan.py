"""The plan: the same for the same seed, every kind of process killed again and again, and time left for entries to be recovered."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mollifier.play.torture.plan import APIS, KILLS, WORKERS, Fault, Kind, Plan, make_plan

SEEDS = st.integers(0, 10**9)
LEASES = st.floats(0.5, 30.0)


def kills(plan: Plan) -> Counter[Kind]:
    return Counter(kind for fault in (*plan.in_turn, *plan.on_apis) for kind in fault.kinds if kind in KILLS)


def over_s(fault: Fault) -> float:
    """When the fault is over and something else may happen."""
    return fault.at_s + fault.seconds + fault.quiet_s


@given(SEEDS, st.floats(1.0, 600.0), LEASES)
def test_a_seed_gives_the_same_plan_each_time(seed: int, seconds: float, lease_s: float) -> None:
    assert make_plan(seed, seconds, lease_s) == make_plan(seed, seconds, lease_s)


@given(SEEDS, SEEDS)
def test_another_seed_gives_another_plan(one: int, other: int) -> None:
    assert (make_plan(one, 60, 2.0) == make_plan(other, 60, 2.0)) == (one == other)


@given(SEEDS)
def test_five_minutes_kill_at_least_twenty_processes_of_each_kind(seed: int) -> None:
    plan = make_plan(seed, 300, 2.0)
    assert all(kills(plan)[kind] >= 20 for kind in KILLS)


@given(SEEDS, LEASES)
def test_however_short_every_kind_is_killed_once(seed: int, lease_s: float) -> None:
    assert set(kills(make_plan(seed, 0.1, lease_s))) == set(KILLS)


@given(SEEDS, LEASES)
def test_one_fault_is_over_before_the_next_begins(seed: int, lease_s: float) -> None:
    faults = make_plan(seed, 120, lease_s).in_turn
    assert all(after.at_s >= over_s(before) - 0.001 for before, after in itertools.pairwise(faults))


@given(SEEDS, LEASES)
def test_after_a_worker_s_death_twice_the_lease_passes_before_anything_else_its_entries_need_is_touched(
    seed: int, lease_s: float
) -> None:
    alone = [fault for fault in make_plan(seed, 120, lease_s).in_turn if fault.kinds == (Kind.KILL_WORKER,)]
    assert alone
    assert all(fault.quiet_s > 2 * lease_s for fault in alone)


@given(SEEDS)
def test_a_worker_is_frozen_for_longer_than_its_lease(seed: int) -> None:
    frozen = [fault for fault in make_plan(seed, 600, 2.0).in_turn if fault.kinds == (Kind.FREEZE_WORKER,)]
    assert all(fault.seconds > 2.0 for fault in frozen)


@given(SEEDS)
def test_every_place_of_the_fleet_is_hit(seed: int) -> None:
    plan = make_plan(seed, 600, 2.0)
    workers = {fault.which for fault in plan.in_turn if Kind.KILL_WORKER in fault.kinds}
    assert (workers, {fault.which for fault in plan.on_apis}) == (set(range(WORKERS)), set(range(APIS)))


def test_every_kind_of_fault_is_planned_sooner_or_later() -> None:
    planned = {kind for seed in range(20) for fault in make_plan(seed, 300, 2.0).in_turn for kind in fault.kinds}
    assert planned == set(Kind)
