"""Telemetry: bounded labels, spans of one trace, and events whose hashes an audit can join."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime
from typing import Any

import pytest
from opentelemetry import trace

from mollifier.errors import BufferUnavailableError
from mollifier.model import Action, Decision, Entry, EntryKind, EntryState, GateInputs, Snapshot
from mollifier.telemetry import EVENTS_LOGGER, Telemetry, describe, sha256
from tests.core.observed import Observed, labels

PAYLOAD = b'{"of": "the snapshot"}'
SNAPSHOT = Snapshot(
    run_id="run_1", org_id="org_1", env_id="env_1", task_id="task", created_at=datetime(2030, 1, 1, tzinfo=UTC)
)
ENTRY = Entry(
    run_id="run_1",
    env_id="env_1",
    org_id="org_1",
    kind=EntryKind.AUDIT,
    state=EntryState.DRAINING,
    sequence=1,
    attempts=1,
    accepted_at_ms=0,
    payload=PAYLOAD,
    dwell_ms=1234,
)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def observed() -> Observed:
    return Observed()


# --- decisions -----------------------------------------------------------------------------------------------------

MOLLIFY = Decision(action=Action.MOLLIFY, reason="per_env_rate", enrolled=True, count=101)
SHADOW = Decision(action=Action.SHADOW_LOG, reason="per_env_rate", enrolled=False, count=101)


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (Decision(action=Action.PASS_THROUGH), labels(outcome="pass_through", enrolled="false")),
        (
            Decision(action=Action.PASS_THROUGH, enrolled=True),
            labels(outcome="pass_through", enrolled="true", org_id="org_1"),
        ),
        (SHADOW, labels(outcome="shadow_log", reason="per_env_rate", enrolled="false")),
        (MOLLIFY, labels(outcome="mollify", reason="per_env_rate", enrolled="true", org_id="org_1")),
    ],
    ids=["pass", "enrolled pass", "shadow", "mollify"],
)
def test_a_decision_is_counted_under_bounded_labels(
    observed: Observed, decision: Decision, expected: frozenset[tuple[str, Any]]
) -> None:
    observed.telemetry.decided(GateInputs(org_id="org_1", env_id="env_1", task_id="task"), decision)
    assert observed.points("mollifier.decisions") == {expected: 1}


def test_organizations_that_are_not_enrolled_share_their_labels(observed: Observed) -> None:
    for number in range(50):
        inputs = GateInputs(org_id=f"org_{number}", env_id=f"env_{number}", task_id=f"task_{number}")
        observed.telemetry.decided(inputs, Decision(action=Action.PASS_THROUGH))
        observed.telemetry.decided(inputs, SHADOW)
    assert sorted(observed.points("mollifier.decisions").values()) == [50, 50]


@pytest.mark.parametrize("decision", [MOLLIFY, SHADOW, Decision(action=Action.PASS_THROUGH, enrolled=True)])
def test_no_label_ever_names_an_environment_or_a_task(observed: Observed, decision: Decision) -> None:
    inputs = GateInputs(org_id="org_1", env_id="env_1", task_id="task_1")
    observed.telemetry.decided(inputs, decision)
    values = {value for point in observed.points("mollifier.decisions") for _, value in point}
    assert not values & {"env_1", "task_1"}


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_failure_that_was_survived_is_counted_and_logged(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    observed.telemetry.sheltered(2)
    observed.telemetry.failed_open("evaluator", BufferUnavailableError("refused"))
    assert observed.points("mollifier.sheltered") == {labels(): 2}
    assert observed.points("mollifier.failed_open") == {labels(part="evaluator"): 1}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert fields_of(record) == {"part": "evaluator", "error": "BufferUnavailableError: refused", "times": 1}


def test_triggers_over_a_cap_are_counted_by_cap_and_the_log_names_the_setting_and_one_environment(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        observed.telemetry.over_cap([SNAPSHOT, SNAPSHOT], "held_org_max_bytes", "reject")
        observed.telemetry.over_cap([SNAPSHOT], "held_max_bytes", "create")
    assert observed.points("mollifier.over_cap") == {
        labels(cap="held_org_max_bytes", outcome="reject"): 2,
        labels(cap="held_max_bytes", outcome="create"): 1,
    }
    said = [record.__dict__["fields"] for record in caplog.records if record.message == "mollifier.over_cap"]
    assert said[0] == {
        "cap": "MOLLIFIER_HELD_ORG_MAX_BYTES",
        "outcome": "reject",
        "env_id": "env_1",
        "org_id": "org_1",
        "times": 1,
    }
    assert [fields["cap"] for fields in said[1:]] == ["MOLLIFIER_HELD_MAX_BYTES"]


def test_a_drainers_fault_is_counted_and_logged(observed: Observed, caplog: pytest.LogCaptureFixture) -> None:
    observed.telemetry.faulted("pop", BufferUnavailableError("refused"))
    assert observed.points("mollifier.drain.faults") == {labels(operation="pop"): 1}
    (record,) = caplog.records
    assert fields_of(record) == {"operation": "pop", "error": "BufferUnavailableError: refused", "times": 1}


def test_a_settled_entry_is_counted_and_its_dwell_measured_once_it_is_acked(observed: Observed) -> None:
    observed.telemetry.settled("requeued", 700)
    observed.telemetry.settled("acked", 1234)
    assert observed.points("mollifier.drain.entries") == {labels(outcome="requeued"): 1, labels(outcome="acked"): 1}
    assert observed.points("mollifier.drain.dwell") == {labels(): 1234}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("why"), "ValueError: why"),
        (ValueError(""), "ValueError: "),
        (ValueError("first\nsecond"), "ValueError: first"),
        (ValueError("\n"), "ValueError: "),
        (TimeoutError(), "TimeoutError: "),
    ],
    ids=str,
)
def test_an_error_is_described_in_one_line(error: Exception, said: str) -> None:
    assert describe(error) == said


def test_a_long_error_is_cut() -> None:
    assert len(describe(ValueError("x" * 10_000))) == 500


# --- events --------------------------------------------------------------------------------------------------------

IDENTITY = {"run_id": "run_1", "env_id": "env_1", "org_id": "org_1", "task_id": "task"}
HASHED = {"payload_bytes": len(PAYLOAD), "payload_sha256": hashlib.sha256(PAYLOAD).hexdigest()}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = record.__dict__["fields"]
    return fields


def the_event(caplog: pytest.LogCaptureFixture) -> tuple[str, dict[str, Any]]:
    (record,) = [record for record in caplog.records if record.name == EVENTS_LOGGER]
    return record.getMessage(), fields_of(record)


def test_would_mollify_names_the_run_and_hashes_its_payload(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    observed.telemetry.would_mollify(SNAPSHOT, PAYLOAD)
    assert the_event(caplog) == ("mollifier.would_mollify", IDENTITY | HASHED)


def test_buffered_names_the_run_and_hashes_its_payload(observed: Observed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    observed.telemetry.buffered(SNAPSHOT, PAYLOAD)
    assert the_event(caplog) == ("mollifier.buffered", IDENTITY | HASHED)


def test_drained_hashes_what_came_out_and_tells_dwell_and_attempts(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, EVENTS_LOGGER)
    observed.telemetry.drained(SNAPSHOT, ENTRY)
    assert the_event(caplog) == ("mollifier.drained", IDENTITY | HASHED | {"dwell_ms": 1234, "attempts": 2})


def test_the_hash_is_sha_256_of_the_bytes() -> None:
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# --- spans ---------------------------------------------------------------------------------------------------------


def test_a_span_is_part_of_the_callers_trace(observed: Observed) -> None:
    with observed.telemetry.span("mollifier.drain", {"mollifier.dwell_ms": 5}, TRACEPARENT):
        pass
    (span,) = observed.spans()
    assert format(span.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert format(span.parent.span_id, "016x") == "b7ad6b7169203331"
    assert dict(span.attributes) == {"mollifier.dwell_ms": 5}


def test_without_a_callers_trace_a_span_is_part_of_the_current_one(observed: Observed) -> None:
    with observed.telemetry.span("outer"), observed.telemetry.span("inner"):
        pass
    inner, outer = observed.spans()
    assert inner.parent.span_id == outer.context.span_id


@pytest.mark.parametrize("traceparent", ["", "garbage", "00-00000000000000000000000000000000-0000000000000000-00"])
def test_a_traceparent_that_does_not_parse_leaves_the_span_in_the_current_trace(
    observed: Observed, traceparent: str
) -> None:
    with observed.telemetry.span("outer"), observed.telemetry.span("inner", traceparent=traceparent):
        pass
    inner, outer = observed.spans()
    assert inner.context.trace_id == outer.context.trace_id


@pytest.mark.parametrize(
    ("telemetry", "traces"),
    [
        (Telemetry(), False),
        (Telemetry(tracer_provider=trace.NoOpTracerProvider()), False),
        (Observed().telemetry, True),
    ],
    ids=["no provider", "one that makes none", "one that keeps them"],
)
def test_it_traces_where_spans_may_go_anywhere(telemetry: Telemetry, traces: bool) -> None:
    assert telemetry.traces is traces


def test_without_providers_nothing_is_measured_and_nothing_fails() -> None:
    telemetry = Telemetry()
    telemetry.decided(GateInputs(org_id="org", env_id="env"), MOLLIFY)
    telemetry.settled("acked", 1)
    with telemetry.span("span"):
        pass
