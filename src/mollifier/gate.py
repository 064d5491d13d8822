"""2. The gate: decides `pass_through`, `shadow_log` or `mollify` for each trigger by itself; many at once cost what one costs.

The cascade, in order: switched off, caller that needs a synchronous answer, organization not enrolled and nobody watching, no
burst, and only then the two actions. Every collaborator's failure fails open: a setting that cannot be read counts as off, a
resolver that raises as flag off, an evaluator that is missing, raises or misses its deadline as no burst. One that keeps failing is
not asked for a while. The gate itself never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Protocol

from mollifier.deadline import Breaker, within
from mollifier.errors import BufferUnavailableError
from mollifier.model import Action, Decision, GateInputs, Verdict
from mollifier.trip import Evaluator

REASON = "per_env_rate"
_QUIET = Verdict(tripped=False, count=0)
_PASS = Decision(action=Action.PASS_THROUGH)


class Recorder(Protocol):
    """Where decisions and failures are counted. It is called on the trigger path and must not raise."""

    def decided(self, inputs: GateInputs, decision: Decision) -> None:
        """Count one decision."""
        ...

    def failed_open(self, part: str, error: BaseException) -> None:
        """Count and log one failure of the gate's `part`."""
        ...


class Gate:
    """Asks its collaborators in order; all of them are injected.

    `enabled`, `shadow_mode` and `deadline_ms` are read at each decision. `evaluator` is None when no buffer is configured.
    """

    def __init__(
        self,
        *,
        enabled: Callable[[], bool],
        shadow_mode: Callable[[], bool],
        flag: Callable[[GateInputs], bool],
        evaluator: Evaluator | None,
        recorder: Recorder,
        deadline_ms: Callable[[], float] = lambda: 25,
        breaker: Breaker | None = None,
    ) -> None:
        self._enabled = enabled
        self._shadow_mode = shadow_mode
        self._flag = flag
        self._evaluator = evaluator
        self._recorder = recorder
        self._deadline_ms = deadline_ms
        self._breaker = breaker or Breaker()

    async def decide(self, inputs: GateInputs) -> Decision:
        """Decide one trigger; see `decide_many`."""
        (decision,) = await self.decide_many([inputs])
        return decision

    async def decide_many(self, inputs: Sequence[GateInputs]) -> list[Decision]:
        """Decide triggers that come together, each as if the others had come before it; one deadline holds for all.

        Off, it touches nothing and records nothing; otherwise every decision is recorded once.
        """
        if not self._ask("settings", self._enabled):
            return [_PASS] * len(inputs)
        decisions = await self._cascade(inputs)
        for one, decision in zip(inputs, decisions, strict=True):
            self._recorder.decided(one, decision)
        return decisions

    async def _cascade(self, inputs: Sequence[GateInputs]) -> list[Decision]:
        enrolled = [self._ask("flag", partial(self._flag, one)) for one in inputs]
        watched = cache(lambda: self._ask("settings", self._shadow_mode))
        counted = [i for i, one in enumerate(inputs) if not one.bypasses and (enrolled[i] or watched())]
        decisions = [Decision(action=Action.PASS_THROUGH, enrolled=flag) for flag in enrolled]
        verdicts = await self._evaluate([inputs[i] for i in counted])
        for i, verdict in zip(counted, verdicts, strict=True):
            decisions[i] = _decision(verdict, enrolled=enrolled[i])
        return decisions

    def _ask(self, part: str, question: Callable[[], bool]) -> bool:
        """Return the answer; a question that raises is answered no."""
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - the gate fails open whatever a collaborator raises
            self._recorder.failed_open(part, error)
            return False

    async def _evaluate(self, inputs: Sequence[GateInputs]) -> Sequence[Verdict]:
        if not inputs:
            return []
        try:
            evaluator = self._evaluator
            if evaluator is None:
                raise BufferUnavailableError("there is no evaluator: no buffer is configured")
            deadline_ms = self._deadline_ms()
            verdicts = await self._breaker.ask(lambda: within(deadline_ms, evaluator.evaluate_many(inputs)))
            if len(verdicts) != len(inputs):
                raise ValueError(f"the evaluator was asked for {len(inputs)} verdicts and gave {len(verdicts)}")
        except Exception as error:  # noqa: BLE001 - the gate fails open whatever a collaborator raises
            self._recorder.failed_open("evaluator", error)
            return [_QUIET] * len(inputs)
        return verdicts


def _decision(verdict: Verdict, *, enrolled: bool) -> Decision:
    if not verdict.tripped:
        return Decision(action=Action.PASS_THROUGH, enrolled=enrolled, count=verdict.count)
    action = Action.MOLLIFY if enrolled else Action.SHADOW_LOG
    return Decision(action=action, reason=REASON, enrolled=enrolled, count=verdict.count)
