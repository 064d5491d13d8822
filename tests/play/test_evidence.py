"""What is read from metrics, logs and runs."""

import json
from pathlib import Path

import pytest

from mollifier.audit import BUFFERED, DRAINED, WOULD_MOLLIFY
from mollifier.play.client import Marker, percentile
from mollifier.play.demo import arrivals, densest
from mollifier.play.evidence import EvidenceError, parse_decisions
from mollifier.play.journal import Journal
from mollifier.play.waiting import until

METRICS = """\
# HELP mollifier_decisions_total What the gate decided
# TYPE mollifier_decisions_total counter
mollifier_decisions_total{enrolled="false",outcome="pass_through"} 3.0
mollifier_decisions_total{enrolled="true",org_id="a",outcome="mollify",reason="per_env_rate"} 4.0
mollifier_decisions_total{enrolled="true",org_id="b",outcome="mollify",reason="per_env_rate"} 5.0
# HELP mollifier_failed_open_total Failures
# TYPE mollifier_failed_open_total counter
mollifier_failed_open_total{part="buffer"} 2.0
# HELP mollifier_over_cap_total Over a cap
# TYPE mollifier_over_cap_total counter
mollifier_over_cap_total{cap="held_env_max_bytes",outcome="create"} 3.0
mollifier_over_cap_total{cap="held_max_bytes",outcome="create"} 4.0
mollifier_over_cap_total{cap="held_max_bytes",outcome="reject"} 1.0
"""


def test_decisions_are_summed_over_replicas_and_counted_from_a_moment_on() -> None:
    before = parse_decisions([METRICS, ""])
    after = parse_decisions([METRICS, METRICS, "# HELP other x\n# TYPE other gauge\nother 9\n"])
    assert (after.outcomes["pass_through"], after.outcomes["mollify"], dict(after.failed_open)) == (
        6,
        18,
        {"buffer": 4},
    )
    new = after.since(before)
    assert (new.outcomes["pass_through"], new.outcomes["shadow_log"], new.outcomes["mollify"]) == (3, 0, 9)
    assert (dict(new.mollified), dict(new.failed_open)) == ({"a": 4, "b": 5}, {"buffer": 2})
    assert dict(after.over_cap) == {"create": 14, "reject": 2}
    assert dict(new.over_cap) == {"create": 7, "reject": 1}


def event(name: str, run_id: str, env_id: str = "env", sha: str = "x") -> bytes:
    fields = {"event": name, "run_id": run_id, "env_id": env_id, "payload_sha256": sha, "payload_bytes": 1}
    return json.dumps(fields).encode() + b"\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def append(log: Path, *pieces: bytes) -> None:
    with log.open("ab") as file:
        file.write(b"".join(pieces))


def test_a_journal_begins_at_the_logs_end_and_follows_it(log: Path) -> None:
    append(log, event(BUFFERED, "old"))
    journal = Journal(log)
    append(log, event(BUFFERED, "a"), b"no json\n", event(WOULD_MOLLIFY, "c", "other"))
    first = journal.read()
    assert (first.buffered, first.drained, first.would_mollify) == (1, 0, 1)
    append(log, event(DRAINED, "a"))
    second = journal.read()
    assert (second.buffered, second.drained, second.matched) == (1, 1, 1)
    assert journal.counts["env"] == {BUFFERED: 1, DRAINED: 1}
    assert journal.counts["other"] == {WOULD_MOLLIFY: 1}


def test_half_a_line_waits_for_its_other_half(log: Path) -> None:
    journal = Journal(log)
    line = event(BUFFERED, "a")
    append(log, line[:20])
    assert journal.read().buffered == 0
    append(log, line[20:30])
    assert journal.read().buffered == 0
    append(log, line[30:], event(BUFFERED, "b"))
    assert journal.read().buffered == 2


def test_other_peoples_runs_are_left_out_where_the_log_is_shared(log: Path) -> None:
    journal = Journal(log)
    journal.only = {"ours"}.__contains__
    append(log, event(BUFFERED, "ours"), event(BUFFERED, "theirs"), event(DRAINED, "theirs"))
    assert (journal.read().buffered, journal.read().drained) == (1, 0)


def test_a_payload_that_changed_on_its_way_is_a_mismatch(log: Path) -> None:
    journal = Journal(log)
    append(log, event(BUFFERED, "a", sha="x"), event(DRAINED, "a", sha="y"))
    assert [mismatch.run_id for mismatch in journal.read().mismatches] == ["a"]


def test_a_log_that_is_gone_is_told(log: Path) -> None:
    with pytest.raises(EvidenceError, match="cannot be read"):
        Journal(log).read()


def test_a_marker_finds_its_calls_again_and_nobody_elses() -> None:
    marker = Marker("ab12")
    body = json.loads(marker.body(17, b'{"a":[1]}'))
    assert body["payload"] == {"a": [1]}
    assert marker.call_of(["x", *body["options"]["tags"]]) == 17
    assert Marker("cd34").call_of(body["options"]["tags"]) is None
    assert marker.call_of([]) is None


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 99, 0), ([5], 50, 5), ([3, 1, 2], 50, 2), (range(1, 101), 99, 99), (range(1, 101), 100, 100)],
)
def test_percentiles_are_by_nearest_rank(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


async def test_waiting_ends_when_it_is_done_or_nothing_has_moved_for_long() -> None:
    now_s, seen = 0.0, iter([5, 4, 4, 3, 3, 3, 3, 3, 3, 3])

    async def look() -> int:
        return next(seen)

    async def sleep(_: float) -> None:
        nonlocal now_s
        now_s += 1.0

    assert await until(look, lambda left: left == 4, lambda _: 3.0, clock=lambda: now_s, sleep=sleep) == 4
    assert await until(look, lambda left: left == 0, lambda _: 3.0, clock=lambda: now_s, sleep=sleep) == 3
    assert next(seen) == 3


def test_the_demos_arrivals_are_the_same_each_time_and_only_one_tenant_bursts() -> None:
    times = arrivals()
    assert times == arrivals()
    assert times == sorted(times)
    peaks = [densest([at_s for at_s, place in times if place == one], 0.2) for one in range(5)]
    assert peaks[0] > 200
    assert max(peaks[1:]) < 10
