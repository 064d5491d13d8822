"""The gate: its table by rows, what it asks whom, and that every failure lets the trigger pass."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import pytest

from mollifier.backoff import Backoff
from mollifier.circuit import Circuit
from mollifier.deadline import Breaker
from mollifier.errors import BufferUnavailableError
from mollifier.gate import REASON, Gate
from mollifier.model import Action, Decision, GateInputs, Verdict
from tests.core.support import ENV, ORG

HERE = GateInputs(org_id=ORG, env_id=ENV)
QUIET, BURST = Verdict(tripped=False, count=3), Verdict(tripped=True, count=101)


class Recorder:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.decisions: list[tuple[GateInputs, Decision]] = []
        self.failures: list[tuple[str, BaseException]] = []

    def decided(self, inputs: GateInputs, decision: Decision) -> None:
        self.decisions.append((inputs, decision))

    def failed_open(self, part: str, error: BaseException) -> None:
        self.failures.append((part, error))


class Evaluator:
    """Answers what the test wants and counts how often it was asked."""

    def __init__(self, answer: Callable[[], Awaitable[Verdict]] | Verdict) -> None:
        self._answer = answer
        self.asked = 0

    async def evaluate_many(self, inputs: Sequence[GateInputs]) -> Sequence[Verdict]:
        self.asked += 1
        verdict = self._answer if isinstance(self._answer, Verdict) else await self._answer()
        return [verdict] * len(inputs)


def refuse() -> bool:
    raise RuntimeError("no answer")


async def fail() -> Verdict:
    raise BufferUnavailableError("no answer")


async def hang() -> Verdict:
    await asyncio.Event().wait()
    raise AssertionError


async def hang_and_refuse_to_be_cancelled() -> Verdict:
    while True:
        try:
            await asyncio.sleep(1)
            return QUIET
        except asyncio.CancelledError:
            pass


async def be_cancelled_from_inside() -> Verdict:
    raise asyncio.CancelledError


class Row(NamedTuple):
    enabled: bool
    org_flag: bool
    shadow: bool
    burst: bool

    def __str__(self) -> str:
        named = zip(("enabled", "org-flag", "shadow", "burst"), self, strict=True)
        return " ".join(name if on else f"no-{name}" for name, on in named)


PASS, SHADOW, MOLLIFY = Action.PASS_THROUGH, Action.SHADOW_LOG, Action.MOLLIFY
ON, OFF = True, False

TABLE: dict[Row, tuple[Action, bool]] = {
    #   enabled, flag, shadow, burst -> action, evaluator asked
    Row(OFF, OFF, OFF, OFF): (PASS, False),
    Row(OFF, OFF, OFF, ON): (PASS, False),
    Row(OFF, OFF, ON, OFF): (PASS, False),
    Row(OFF, OFF, ON, ON): (PASS, False),
    Row(OFF, ON, OFF, OFF): (PASS, False),
    Row(OFF, ON, OFF, ON): (PASS, False),
    Row(OFF, ON, ON, OFF): (PASS, False),
    Row(OFF, ON, ON, ON): (PASS, False),
    Row(ON, OFF, OFF, OFF): (PASS, False),
    Row(ON, OFF, OFF, ON): (PASS, False),
    Row(ON, OFF, ON, OFF): (PASS, True),
    Row(ON, OFF, ON, ON): (SHADOW, True),
    Row(ON, ON, OFF, OFF): (PASS, True),
    Row(ON, ON, OFF, ON): (MOLLIFY, True),
    Row(ON, ON, ON, OFF): (PASS, True),
    Row(ON, ON, ON, ON): (MOLLIFY, True),
}


def gate_of(row: Row, evaluator: Evaluator | None, recorder: Recorder) -> Gate:
    return Gate(
        enabled=lambda: row.enabled,
        shadow_mode=lambda: row.shadow,
        flag=lambda _: row.org_flag,
        evaluator=evaluator,
        recorder=recorder,
    )


def test_the_table_has_every_row() -> None:
    assert set(TABLE) == {Row(*row) for row in itertools.product((ON, OFF), repeat=4)}


@pytest.mark.parametrize("row", TABLE, ids=str)
async def test_the_gate_decides_as_its_table_says(row: Row) -> None:
    action, asked = TABLE[row]
    evaluator, recorder = Evaluator(BURST if row.burst else QUIET), Recorder()
    decision = await gate_of(row, evaluator, recorder).decide(HERE)
    assert decision.action is action
    assert evaluator.asked == asked
    assert decision.reason == (REASON if action is not PASS else None)
    assert decision.enrolled == (row.enabled and row.org_flag)
    assert recorder.decisions == ([(HERE, decision)] if row.enabled else [])
    assert recorder.failures == []


async def test_switched_off_no_collaborator_is_asked_and_nothing_is_recorded() -> None:
    recorder = Recorder()
    evaluator = Evaluator(fail)
    gate = Gate(
        enabled=lambda: False,
        shadow_mode=refuse,
        flag=lambda _: refuse(),
        evaluator=evaluator,
        recorder=recorder,
        deadline_ms=refuse,
    )
    assert (await gate.decide(HERE)).action is PASS
    assert (evaluator.asked, recorder.decisions, recorder.failures) == (0, [], [])


@pytest.mark.parametrize("bypass", ["debounce", "one_time_token", "trigger_and_wait"])
@pytest.mark.parametrize("row", [row for row in TABLE if row.enabled], ids=str)
async def test_who_needs_a_synchronous_answer_passes_by_and_counts_against_no_rate(row: Row, bypass: str) -> None:
    evaluator, recorder = Evaluator(BURST), Recorder()
    inputs = GateInputs(
        org_id=ORG,
        env_id=ENV,
        debounce=bypass == "debounce",
        one_time_token=bypass == "one_time_token",
        trigger_and_wait=bypass == "trigger_and_wait",
    )
    decision = await gate_of(row, evaluator, recorder).decide(inputs)
    assert decision.action is PASS
    assert evaluator.asked == 0


# --- every failure fails open --------------------------------------------------------------------------------------


async def test_a_flag_that_cannot_be_resolved_counts_as_off() -> None:
    evaluator, recorder = Evaluator(BURST), Recorder()
    gate = Gate(
        enabled=lambda: True,
        shadow_mode=lambda: False,
        flag=lambda _: refuse(),
        evaluator=evaluator,
        recorder=recorder,
    )
    decision = await gate.decide(HERE)
    assert (decision.action, decision.enrolled, evaluator.asked) == (PASS, False, 0)
    assert [(part, str(error)) for part, error in recorder.failures] == [("flag", "no answer")]


async def test_in_shadow_mode_a_flag_that_cannot_be_resolved_is_watched_as_off() -> None:
    recorder = Recorder()
    gate = Gate(
        enabled=lambda: True,
        shadow_mode=lambda: True,
        flag=lambda _: refuse(),
        evaluator=Evaluator(BURST),
        recorder=recorder,
    )
    assert (await gate.decide(HERE)).action is SHADOW
    assert [part for part, _ in recorder.failures] == ["flag"]


@pytest.mark.parametrize(
    "answer", [fail, hang, hang_and_refuse_to_be_cancelled, be_cancelled_from_inside], ids=lambda a: a.__name__
)
async def test_an_evaluator_that_gives_no_answer_counts_as_no_burst(answer: Callable[[], Awaitable[Verdict]]) -> None:
    recorder = Recorder()
    gate = gate_of(Row(ON, ON, OFF, ON), Evaluator(answer), recorder)
    decision = await gate.decide(HERE)
    assert decision.action is PASS
    assert [part for part, _ in recorder.failures] == ["evaluator"]
    assert recorder.decisions == [(HERE, decision)]


async def test_an_evaluator_that_hangs_is_told_to_stop() -> None:
    cancelled = asyncio.Event()

    async def hang_until_cancelled() -> Verdict:
        try:
            return await hang()
        finally:
            cancelled.set()

    await gate_of(Row(ON, ON, OFF, ON), Evaluator(hang_until_cancelled), Recorder()).decide(HERE)
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_a_gate_whose_caller_goes_away_is_cancelled_and_not_failed_open() -> None:
    recorder = Recorder()
    deciding = asyncio.create_task(
        Gate(
            enabled=lambda: True,
            shadow_mode=lambda: True,
            flag=lambda _: True,
            evaluator=Evaluator(hang),
            recorder=recorder,
            deadline_ms=lambda: 60_000,
        ).decide(HERE)
    )
    await asyncio.sleep(0)
    deciding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deciding
    assert recorder.failures == []


async def test_a_missing_buffer_counts_as_no_burst_and_is_counted() -> None:
    recorder = Recorder()
    decision = await gate_of(Row(ON, ON, OFF, ON), None, recorder).decide(HERE)
    assert decision.action is PASS
    assert [part for part, _ in recorder.failures] == ["evaluator"]


@pytest.mark.parametrize("broken", ["enabled", "shadow_mode", "deadline_ms"])
async def test_settings_that_cannot_be_read_let_the_trigger_pass(broken: str) -> None:
    recorder = Recorder()
    gate = Gate(
        enabled=refuse if broken == "enabled" else lambda: True,
        shadow_mode=refuse if broken == "shadow_mode" else lambda: True,
        flag=lambda _: False,
        evaluator=Evaluator(BURST),
        recorder=recorder,
        deadline_ms=refuse if broken == "deadline_ms" else lambda: 25,
    )
    assert (await gate.decide(HERE)).action is PASS
    assert len(recorder.failures) == 1


async def test_an_evaluator_that_keeps_failing_is_not_asked_for_a_while_and_every_trigger_passes() -> None:
    now_s = 0.0
    evaluator, recorder = Evaluator(fail), Recorder()
    gate = Gate(
        enabled=lambda: True,
        shadow_mode=lambda: False,
        flag=lambda _: True,
        evaluator=evaluator,
        recorder=recorder,
        breaker=Breaker(Circuit(Backoff(1_000), failures=5, monotonic=lambda: now_s, jitter=lambda: 0.0)),
    )
    for _ in range(20):
        assert (await gate.decide(HERE)).action is PASS
    assert evaluator.asked == 5
    assert [part for part, _ in recorder.failures] == ["evaluator"] * 20
    now_s = 1.0
    await gate.decide(HERE)
    assert evaluator.asked == 6


# --- what is read when ---------------------------------------------------------------------------------------------


async def test_settings_are_read_at_each_decision() -> None:
    live = {"enabled": False, "shadow": False}
    flag = False
    gate = Gate(
        enabled=lambda: live["enabled"],
        shadow_mode=lambda: live["shadow"],
        flag=lambda _: flag,
        evaluator=Evaluator(BURST),
        recorder=Recorder(),
    )
    actions = [(await gate.decide(HERE)).action]
    live["enabled"] = True
    actions.append((await gate.decide(HERE)).action)
    live["shadow"] = True
    actions.append((await gate.decide(HERE)).action)
    flag = True
    actions.append((await gate.decide(HERE)).action)
    live["enabled"] = False
    actions.append((await gate.decide(HERE)).action)
    assert actions == [PASS, PASS, SHADOW, MOLLIFY, PASS]


async def test_the_decision_tells_the_count_it_was_made_on() -> None:
    decision = await gate_of(Row(ON, ON, OFF, ON), Evaluator(BURST), Recorder()).decide(HERE)
    assert (decision.count, decision.reason) == (101, "per_env_rate")


# --- many at once --------------------------------------------------------------------------------------------------


class CountingEvaluator:
    """Trips from the third trigger on; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Sequence[GateInputs]] = []

    async def evaluate_many(self, inputs: Sequence[GateInputs]) -> Sequence[Verdict]:
        self.asked.append(inputs)
        return [Verdict(tripped=count > 2, count=count) for count in range(1, len(inputs) + 1)]


async def test_triggers_that_come_together_are_decided_each_by_itself_for_one_question() -> None:
    evaluator, recorder = CountingEvaluator(), Recorder()
    gate = Gate(
        enabled=lambda: True,
        shadow_mode=lambda: True,
        flag=lambda one: one.org_id == ORG,
        evaluator=evaluator,
        recorder=recorder,
    )
    waiting = GateInputs(org_id=ORG, env_id=ENV, trigger_and_wait=True)
    stranger = GateInputs(org_id="other", env_id="other")
    inputs = [HERE, waiting, HERE, HERE, stranger]

    decisions = await gate.decide_many(inputs)

    assert [decision.action for decision in decisions] == [PASS, PASS, PASS, MOLLIFY, SHADOW]
    assert [decision.enrolled for decision in decisions] == [True, True, True, True, False]
    assert [decision.count for decision in decisions] == [1, None, 2, 3, 4]
    assert evaluator.asked == [[HERE, HERE, HERE, stranger]]
    assert recorder.decisions == list(zip(inputs, decisions, strict=True))


async def test_an_evaluator_that_fails_lets_all_triggers_that_came_together_pass_and_is_counted_once() -> None:
    recorder = Recorder()
    decisions = await gate_of(Row(ON, ON, OFF, ON), Evaluator(fail), recorder).decide_many([HERE] * 3)
    assert [decision.action for decision in decisions] == [PASS] * 3
    assert len(recorder.failures) == 1
    assert len(recorder.decisions) == 3


async def test_an_evaluator_that_gives_another_number_of_verdicts_counts_as_no_burst() -> None:
    class Short:
        async def evaluate_many(self, inputs: Sequence[GateInputs]) -> Sequence[Verdict]:
            return [BURST]

    recorder = Recorder()
    gate = Gate(
        enabled=lambda: True,
        shadow_mode=lambda: False,
        flag=lambda _: True,
        evaluator=Short(),
        recorder=recorder,
    )
    decisions = await gate.decide_many([HERE, HERE])
    assert [decision.action for decision in decisions] == [PASS, PASS]
    assert [part for part, _ in recorder.failures] == ["evaluator"]


async def test_nobody_is_asked_about_no_triggers() -> None:
    evaluator = CountingEvaluator()
    gate = Gate(
        enabled=lambda: True, shadow_mode=lambda: True, flag=lambda _: True, evaluator=evaluator, recorder=Recorder()
    )
    assert await gate.decide_many([]) == []
    assert evaluator.asked == []
