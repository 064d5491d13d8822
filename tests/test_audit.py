import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.audit import BUFFERED, DRAINED, PLACES_KEPT, Audit, Duplicate, Fingerprint, Mismatch, Report

SHA = "a" * 64
OTHER_SHA = "b" * 64


def event(name: str, run_id: str, sha: str = SHA, size: int = 10, **more: Any) -> bytes:
    fields = {"event": name, "run_id": run_id, "payload_sha256": sha, "payload_bytes": size, **more}
    return json.dumps(fields).encode() + b"\n"


def audited(*lines: bytes) -> Report:
    audit = Audit()
    audit.read("api.log", lines)
    return audit.report()


def test_a_run_that_was_buffered_and_drained_with_one_payload_matches() -> None:
    report = audited(event(BUFFERED, "run_1"), event(DRAINED, "run_1", dwell_ms=12, attempts=1))
    assert (report.buffered, report.drained, report.matched) == (1, 1, 1)
    assert report.is_clean


def test_logs_are_joined_across_files_whichever_is_read_first() -> None:
    audit = Audit()
    audit.read("worker.log", [event(DRAINED, "run_1"), event(DRAINED, "run_2")])
    audit.read("api.log", [event(BUFFERED, "run_2"), event(BUFFERED, "run_1")])
    assert audit.report().matched == 2
    assert audit.report().is_clean


def test_a_run_that_was_never_drained_is_named() -> None:
    report = audited(event(BUFFERED, "run_1"), event(BUFFERED, "run_2"), event(DRAINED, "run_2"))
    assert report.not_drained == ("run_1",)
    assert report.missing == 1
    assert not report.is_clean


def test_a_run_that_was_drained_without_having_been_buffered_is_named() -> None:
    report = audited(event(DRAINED, "run_1"))
    assert report.not_buffered == ("run_1",)
    assert not report.is_clean


@pytest.mark.parametrize(
    ("drained", "fingerprint"),
    [
        (event(DRAINED, "run_1", sha=OTHER_SHA), Fingerprint(OTHER_SHA, 10)),
        (event(DRAINED, "run_1", size=11), Fingerprint(SHA, 11)),
    ],
    ids=["hash", "size"],
)
def test_a_payload_that_came_out_changed_is_a_mismatch_and_no_match(drained: bytes, fingerprint: Fingerprint) -> None:
    report = audited(event(BUFFERED, "run_1"), drained)
    assert report.mismatches == (Mismatch("run_1", Fingerprint(SHA, 10), fingerprint),)
    assert report.matched == 0
    assert not report.is_clean


def test_an_entry_drained_once_more_after_a_crash_is_told_and_is_no_fault() -> None:
    report = audited(event(BUFFERED, "run_1"), event(DRAINED, "run_1"), event(DRAINED, "run_1", attempts=2))
    assert report.duplicates == (Duplicate("run_1", DRAINED, 2),)
    assert report.matched == 1
    assert report.is_clean


@pytest.mark.parametrize("hashes", [(SHA, OTHER_SHA), (OTHER_SHA, SHA)])
def test_a_repeated_event_hides_no_mismatch(hashes: Sequence[str]) -> None:
    report = audited(event(BUFFERED, "run_1"), *(event(DRAINED, "run_1", sha=sha) for sha in hashes))
    assert [mismatch.drained.payload_sha256 for mismatch in report.mismatches] == [OTHER_SHA]
    assert not report.is_clean


@pytest.mark.parametrize(
    "garbage",
    [
        b"Traceback (most recent call last):\n",
        b'  File "mollifier/gate.py", line 3\n',
        b"\xff\xfe\x00\n",
        b'"only a text"\n',
        b"[1, 2]\n",
        b'{"event": "other"\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=["traceback", "source line", "binary", "text", "list", "torn", "nested"],
)
def test_a_line_that_is_no_json_object_is_told_with_its_place_and_stops_nothing(garbage: bytes) -> None:
    report = audited(event(BUFFERED, "run_1"), b"\n", garbage, event(DRAINED, "run_1"))
    assert report.unparsed == 1
    assert [(place.file, place.line) for place in report.unparsed_places] == [("api.log", 3)]
    assert report.is_clean


@pytest.mark.parametrize(
    "damaged",
    [
        event(BUFFERED, "run_2")[:-20],
        event(BUFFERED, "run_2").replace(b"run_id", b"run_di"),
        event(BUFFERED, ""),
        b'{"event": "mollifier.drained", "run_id": 7, "payload_sha256": "a", "payload_bytes": 1}',
        b'{"event": "mollifier.drained", "run_id": "run_2", "payload_sha256": null, "payload_bytes": 1}',
        b'{"event": "mollifier.drained", "run_id": "run_2", "payload_sha256": "a", "payload_bytes": true}',
    ],
    ids=["torn", "no run id", "empty run id", "run id of another type", "no hash", "no size"],
)
def test_an_event_that_does_not_read_as_one_fails_the_audit(damaged: bytes) -> None:
    report = audited(event(BUFFERED, "run_1"), event(DRAINED, "run_1"), damaged)
    assert [(place.file, place.line) for place in report.damaged_places] == [("api.log", 3)]
    assert report.unparsed == 0
    assert not report.is_clean


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "http.request", "run_id": 5}',
        b'{"event": {"name": "mollifier.buffered"}}',
        b'{"event": ["mollifier.buffered"]}',
        b'{"message": "mollifier.drained"}',
        b"{}",
    ],
)
def test_other_log_lines_are_passed_over(line: bytes) -> None:
    report = audited(line, event(BUFFERED, "run_1"), event(DRAINED, "run_1"))
    assert (report.unparsed, report.damaged) == (0, 0)
    assert report.is_clean


def test_an_audit_of_nothing_is_not_clean() -> None:
    report = audited(b'{"event": "mollifier.would_mollify", "run_id": "run_1"}')
    assert report.is_empty
    assert report.would_mollify == 1
    assert not report.is_clean


def test_the_places_that_are_kept_are_bounded_and_the_count_is_not() -> None:
    report = audited(*[b"garbage\n"] * (PLACES_KEPT + 5))
    assert report.unparsed == PLACES_KEPT + 5
    assert [place.line for place in report.unparsed_places] == list(range(1, PLACES_KEPT + 1))


run_ids = st.sampled_from([f"run_{n}" for n in range(6)])
events = st.tuples(st.sampled_from([BUFFERED, DRAINED]), run_ids, st.sampled_from([SHA, OTHER_SHA]))


@given(st.lists(events, max_size=30))
def test_every_run_is_matched_or_mismatched_or_missing_and_nothing_else(history: list[tuple[str, str, str]]) -> None:
    report = audited(*(event(name, run, sha) for name, run, sha in history))
    named = {run_id for _, run_id, _ in history}
    assert report.matched + len(report.mismatches) + report.missing == len(named)
    said = {run_id: {(name, sha) for name, run, sha in history if run == run_id} for run_id in named}
    whole = [run_id for run_id, says in said.items() if len(says) == 2 and len({name for name, _ in says}) == 2]
    assert report.matched == sum(len({sha for _, sha in said[run_id]}) == 1 for run_id in whole)


@given(st.lists(events, max_size=30), st.randoms())
def test_the_order_of_lines_changes_no_count(history: list[tuple[str, str, str]], random: Any) -> None:
    shuffled = random.sample(history, len(history))
    one, other = (audited(*(event(name, run, sha) for name, run, sha in lines)) for lines in (history, shuffled))
    assert (one.matched, one.missing, len(one.mismatches), len(one.duplicates)) == (
        other.matched,
        other.missing,
        len(other.mismatches),
        len(other.duplicates),
    )
