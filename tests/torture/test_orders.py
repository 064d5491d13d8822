"""The orders: the same for the same seed, numbered without a gap, at the rate that was asked for, in bursts."""

from itertools import islice, pairwise, takewhile

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mollifier.play.torture.orders import Order, Want, make_orders, payload_of

SEEDS = st.integers(0, 10**9)


def orders(seed: int, seconds: float, rate_per_s: float = 50.0) -> list[Order]:
    return list(takewhile(lambda order: order.at_s < seconds, make_orders(seed, rate_per_s=rate_per_s, tenants=4)))


@given(SEEDS)
def test_a_seed_gives_the_same_orders_each_time(seed: int) -> None:
    assert orders(seed, 5) == orders(seed, 5)


@given(SEEDS)
def test_orders_come_in_the_order_of_their_times(seed: int) -> None:
    times = [order.at_s for order in orders(seed, 20)]
    assert times == sorted(times)


@given(SEEDS)
def test_every_call_has_a_number_of_its_own(seed: int) -> None:
    numbers = [order.number + place for order in orders(seed, 10) for place in range(order.calls)]
    assert numbers == list(range(len(numbers)))


@given(SEEDS)
def test_a_trial_is_one_call_s_unless_callers_share_a_key(seed: int) -> None:
    for order in orders(seed, 20):
        if order.want is Want.SHARED:
            assert order.trial <= order.number < order.trial + 3
        else:
            assert order.trial == order.number


@given(SEEDS, st.sampled_from([20.0, 50.0, 100.0]))
def test_as_many_requests_leave_each_second_as_were_asked_for(seed: int, rate_per_s: float) -> None:
    requests = len({order.trial for order in orders(seed, 60, rate_per_s)})
    assert 0.85 * rate_per_s < requests / 60 < 1.15 * rate_per_s


@given(SEEDS)
def test_most_of_them_come_in_bursts_of_one_tenant(seed: int) -> None:
    arrivals = sorted((order.tenant, order.at_s) for order in orders(seed, 30))
    close = sum(one[0] == other[0] and other[1] - one[1] < 0.02 for one, other in pairwise(arrivals))
    assert close > len(arrivals) / 2


@given(SEEDS, st.integers(0, 10**6))
def test_a_payload_is_json_that_names_its_trial(seed: int, trial: int) -> None:
    assert msgspec.json.decode(payload_of(seed, trial))["trial"] == trial


def test_every_way_of_sending_a_trigger_is_used() -> None:
    seen = {order.want for order in islice(make_orders(1, rate_per_s=50, tenants=4), 500)}
    assert seen == set(Want)
