"""The trip evaluator: what its docstring promises, at exact moments and by the real server's clock."""

from __future__ import annotations

import itertools
from typing import Protocol

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mollifier.errors import BufferUnavailableError
from mollifier.keys import Keyspace
from mollifier.model import GateInputs, Verdict
from mollifier.scripts import Scripts
from mollifier.server import Server
from mollifier.settings import Settings
from mollifier.trip import SUB_BUCKETS, TripEvaluator
from tests.core.support import ENV, ORG, execute, lifetime_ms, until
from tests.core.virtual_time import Model, VirtualEvaluator, Window, most_in_any_span

START_US = 1_800_000_000_000_000
MS = 1000
KEYSPACE = Keyspace(4)
HERE = GateInputs(org_id=ORG, env_id=ENV)

envs = (f"env-{number}" for number in itertools.count())


class Make(Protocol):
    """An algorithm's way of counting."""

    def __call__(self, window_ms: int = 200, *, threshold: int, hold_ms: int = 500) -> Window: ...


def sliding(window_ms: int = 200, *, threshold: int, hold_ms: int = 500) -> Window:
    bucket_us = window_ms * MS // SUB_BUCKETS
    return Window(bucket_us=bucket_us, buckets=SUB_BUCKETS + 1, threshold=threshold, hold_ms=hold_ms)


def fixed(window_ms: int = 200, *, threshold: int, hold_ms: int = 500) -> Window:
    return Window(bucket_us=window_ms * MS, buckets=1, threshold=threshold, hold_ms=hold_ms)


both = pytest.mark.parametrize("make", [sliding, fixed])
virtual = pytest.mark.leaves_keys("virtual:*", "rate:*", "tripped:*")


@pytest.fixture
def evaluator(redis_client: Redis) -> VirtualEvaluator:
    return VirtualEvaluator(redis_client)


def at(*offsets_ms: float) -> list[int]:
    return [START_US + round(offset * MS) for offset in offsets_ms]


def tripped(verdicts: list[Verdict]) -> list[bool]:
    return [verdict.tripped for verdict in verdicts]


# --- at exact moments ----------------------------------------------------------------------------------------------


@virtual
@both
async def test_a_count_exactly_at_the_threshold_does_not_trip_and_one_more_does(
    evaluator: VirtualEvaluator, make: Make
) -> None:
    verdicts = await evaluator.arrive(ENV, make(threshold=5), at(0, 0, 0, 0, 0, 0))
    assert verdicts == [Verdict(tripped=count > 5, count=count) for count in range(1, 7)]


@virtual
@both
async def test_a_tripped_environment_is_held_for_hold_ms_and_then_passes(
    evaluator: VirtualEvaluator, make: Make
) -> None:
    window = make(threshold=2, hold_ms=500)
    assert tripped(await evaluator.arrive(ENV, window, at(0, 0, 0))) == [False, False, True]
    assert tripped(await evaluator.arrive(ENV, window, at(500, 501))) == [True, False]


@virtual
@both
async def test_each_further_overage_starts_the_hold_anew(evaluator: VirtualEvaluator, make: Make) -> None:
    window = make(threshold=2, hold_ms=500)
    await evaluator.arrive(ENV, window, at(0, 0, 0))
    await evaluator.arrive(ENV, window, at(400, 400, 400))
    assert tripped(await evaluator.arrive(ENV, window, at(899, 901))) == [True, False]


@virtual
@both
async def test_triggers_within_the_threshold_do_not_prolong_the_hold(evaluator: VirtualEvaluator, make: Make) -> None:
    window = make(threshold=2, hold_ms=500)
    await evaluator.arrive(ENV, window, at(0, 0, 0))
    assert tripped(await evaluator.arrive(ENV, window, at(300, 501))) == [True, False]


@virtual
async def test_held_triggers_count_towards_the_rate(evaluator: VirtualEvaluator) -> None:
    window = sliding(threshold=2, hold_ms=10)
    verdicts = await evaluator.arrive(ENV, window, at(0, 0, 0, 100, 150, 250, 290))
    assert [verdict.count for verdict in verdicts] == [1, 2, 3, 4, 5, 3, 4]
    assert tripped(verdicts) == [False, False, True, True, True, True, True]


@virtual
async def test_around_the_edge_of_a_window_no_more_than_the_threshold_pass(evaluator: VirtualEvaluator) -> None:
    late = [199 + n / 100 for n in range(100)]
    early = [201 + n / 100 for n in range(100)]
    verdicts = await evaluator.arrive(ENV, sliding(threshold=100), at(*late, *early))
    assert tripped(verdicts).count(False) == 100


@virtual
async def test_the_fixed_window_lets_twice_the_threshold_through_around_its_edge(evaluator: VirtualEvaluator) -> None:
    verdicts = await evaluator.arrive(ENV, fixed(threshold=100), at(*([199.5] * 100), *([200.5] * 100)))
    assert tripped(verdicts).count(False) == 200


@virtual
@both
async def test_environments_are_counted_each_for_itself(evaluator: VirtualEvaluator, make: Make) -> None:
    window = make(threshold=1)
    assert tripped(await evaluator.arrive("a", window, at(0, 0))) == [False, True]
    assert await evaluator.arrive("b", window, at(0)) == [Verdict(tripped=False, count=1)]


@virtual
async def test_a_clock_set_back_a_little_forgets_nobody(evaluator: VirtualEvaluator) -> None:
    verdicts = await evaluator.arrive(ENV, sliding(threshold=2), at(50, 50, 0))
    assert tripped(verdicts) == [False, False, True]


@virtual
async def test_a_clock_set_back_by_far_holds_nobody_for_that_long(evaluator: VirtualEvaluator) -> None:
    window = sliding(threshold=2, hold_ms=1)
    await evaluator.arrive(ENV, window, at(60_000, 60_000))
    assert tripped(await evaluator.arrive(ENV, window, at(0, 0))) == [False, False]


@virtual
@pytest.mark.parametrize("order", [(sliding, fixed), (fixed, sliding)], ids=["to fixed", "to sliding"])
async def test_switching_the_algorithm_holds_nobody_below_the_threshold(
    evaluator: VirtualEvaluator, order: tuple[Make, Make]
) -> None:
    before, after = (make(threshold=5) for make in order)
    assert tripped(await evaluator.arrive(ENV, before, at(0, 0, 0, 0, 0))) == [False] * 5
    verdicts = await evaluator.arrive(ENV, after, at(1, 1, 1, 1, 1, 1))
    assert tripped(verdicts) == [False] * 5 + [True]


# --- any history ---------------------------------------------------------------------------------------------------

# Gaps that hit what is special about a window of 20 ms in buckets of 1 ms: nothing, a bucket, the window, just beside each.
special_gaps_us = st.sampled_from(
    [0, 1, 999, 1000, 1001, 10_000, 19_999, 20_000, 20_001, 20_999, 21_000, 21_001, 100_000]
)
histories = st.lists(special_gaps_us | st.integers(0, 3000) | st.integers(0, 30_000), min_size=1, max_size=80).map(
    lambda gaps: [START_US + offset for offset in itertools.accumulate(gaps)]
)


def make_window(make: Make, threshold: int, hold_ms: int) -> Window:
    return make(20, threshold=threshold, hold_ms=hold_ms)


windows = st.builds(make_window, st.sampled_from([sliding, fixed]), st.integers(1, 12), st.sampled_from([1, 5, 20, 50]))
any_history = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@virtual
@any_history
@given(window=windows, moments_us=histories)
async def test_the_script_answers_as_its_naive_model_does(
    evaluator: VirtualEvaluator, window: Window, moments_us: list[int]
) -> None:
    model = Model(window)
    expected = [model.arrive(moment_us) for moment_us in moments_us]
    assert await evaluator.arrive(next(envs), window, moments_us) == expected


@virtual
@any_history
@given(window=windows, moments_us=histories, number=st.integers(1, 30))
async def test_triggers_that_come_in_one_call_are_counted_as_if_one_had_come_after_the_other(
    evaluator: VirtualEvaluator, window: Window, moments_us: list[int], number: int
) -> None:
    model, env = Model(window), next(envs)
    for moment_us in moments_us:
        expected = [model.arrive(moment_us) for _ in range(number)]
        assert list(await evaluator.arrive_together(env, window, moment_us, number)) == expected


@virtual
@any_history
@given(threshold=st.integers(1, 12), hold_ms=st.sampled_from([1, 5, 50]), moments_us=histories)
async def test_in_any_span_of_one_window_at_most_threshold_triggers_pass(
    evaluator: VirtualEvaluator, threshold: int, hold_ms: int, moments_us: list[int]
) -> None:
    verdicts = await evaluator.arrive(next(envs), sliding(20, threshold=threshold, hold_ms=hold_ms), moments_us)
    passed = [moment for moment, verdict in zip(moments_us, verdicts, strict=True) if not verdict.tripped]
    assert most_in_any_span(passed, 20 * MS) <= threshold


@virtual
@any_history
@given(moments_us=histories)
@example(moments_us=at(*(n * 21 for n in range(10))))
async def test_an_environment_at_the_threshold_over_any_slightly_longer_span_never_trips(
    evaluator: VirtualEvaluator, moments_us: list[int]
) -> None:
    threshold = most_in_any_span(moments_us, 21 * MS)
    verdicts = await evaluator.arrive(next(envs), sliding(20, threshold=threshold), moments_us)
    assert not any(tripped(verdicts))


# --- by the server's clock -----------------------------------------------------------------------------------------


def real(redis: Redis, settings: Settings) -> TripEvaluator:
    return TripEvaluator(Scripts(Server(redis)), KEYSPACE, lambda: settings)


LONG = Settings(trip_window_ms=60_000, trip_threshold=3, hold_ms=60_000)


@pytest.mark.parametrize("algorithm", ["sliding", "fixed"])
async def test_the_evaluator_counts_and_trips_on_the_real_server(redis_client: Redis, algorithm: str) -> None:
    # An hour's window has no edge during the test, save once an hour for the fixed one: then the count starts anew and is asked again.
    evaluator = real(
        redis_client,
        Settings(
            trip_algorithm="fixed" if algorithm == "fixed" else "sliding",
            trip_window_ms=3_600_000,
            trip_threshold=3,
            hold_ms=60_000,
        ),
    )
    verdicts = [await evaluator.evaluate(HERE) for _ in range(4)]
    if verdicts[-1].count != 4:
        verdicts = [await evaluator.evaluate(GateInputs(org_id=ORG, env_id="again")) for _ in range(4)]
    assert verdicts == [Verdict(tripped=count > 3, count=count) for count in range(1, 5)]


async def test_triggers_of_several_environments_that_come_together_are_counted_each_in_its_own(
    redis_client: Redis,
) -> None:
    there = GateInputs(org_id="other", env_id="other")
    verdicts = await real(redis_client, LONG).evaluate_many([HERE, HERE, there, HERE, HERE])
    assert [verdict.count for verdict in verdicts] == [1, 2, 1, 3, 4]
    assert tripped(list(verdicts)) == [False, False, False, False, True]


async def test_replicas_share_one_count(redis_url: str, redis_client: Redis) -> None:
    async with Redis.from_url(redis_url) as other_client:  # pyright: ignore[reportUnknownMemberType] - untyped options
        one, other = real(redis_client, LONG), real(other_client, LONG)
        verdicts = [await evaluator.evaluate(HERE) for evaluator in (one, other, one, other)]
    assert verdicts == [Verdict(tripped=count > 3, count=count) for count in range(1, 5)]


async def test_environments_with_awkward_ids_are_counted_each_for_itself(redis_client: Redis) -> None:
    evaluator = real(redis_client, LONG)
    for env in ("a", "a:b", ":", "{a}", "}", "é", "e\u0301", "rate", "tripped"):
        assert await evaluator.evaluate(GateInputs(org_id=ORG, env_id=env)) == Verdict(tripped=False, count=1)


async def test_what_is_counted_lives_one_window_and_what_holds_lives_one_hold(redis_client: Redis) -> None:
    evaluator = real(redis_client, Settings(trip_window_ms=10_000, trip_threshold=1, hold_ms=5_000))
    await evaluator.evaluate(HERE)
    await evaluator.evaluate(HERE)
    keys = KEYSPACE.of(ORG)
    assert 9_000 < (await lifetime_ms(redis_client, keys.rate(ENV)) or 0) <= 10_500
    assert 4_000 < (await lifetime_ms(redis_client, keys.tripped(ENV)) or 0) <= 5_000


async def test_an_idle_environment_leaves_nothing_behind(redis_client: Redis) -> None:
    evaluator = real(redis_client, Settings(trip_window_ms=10, trip_threshold=1, hold_ms=10))
    for _ in range(5):
        await evaluator.evaluate(HERE)

    async def nothing_is_left() -> bool:
        return await execute(redis_client, "DBSIZE") == 0

    await until(nothing_is_left)


async def test_triggers_pass_again_once_the_hold_ran_out(redis_client: Redis) -> None:
    evaluator = real(redis_client, Settings(trip_window_ms=20, trip_threshold=1, hold_ms=20))
    keys = KEYSPACE.of(ORG)
    while not (await evaluator.evaluate(HERE)).tripped:
        pass

    async def hold_and_window_ran_out() -> bool:
        return await execute(redis_client, "EXISTS", keys.tripped(ENV), keys.rate(ENV)) == 0

    await until(hold_and_window_ran_out)
    assert await evaluator.evaluate(HERE) == Verdict(tripped=False, count=1)


async def test_settings_are_read_at_each_evaluation(redis_client: Redis) -> None:
    threshold = 1
    evaluator = TripEvaluator(
        Scripts(Server(redis_client)),
        KEYSPACE,
        lambda: Settings(trip_window_ms=60_000, trip_threshold=threshold, hold_ms=1),
    )
    await evaluator.evaluate(HERE)
    threshold = 2
    assert not (await evaluator.evaluate(HERE)).tripped


async def test_a_count_that_does_not_parse_is_an_error_and_not_a_crash(redis_client: Redis) -> None:
    await execute(redis_client, "HSET", KEYSPACE.of(ORG).rate(ENV), "not a bucket", "not a count")
    await execute(redis_client, "EXPIRE", KEYSPACE.of(ORG).rate(ENV), 60)
    with pytest.raises(BufferUnavailableError):
        await real(redis_client, LONG).evaluate(HERE)
