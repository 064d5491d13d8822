"""`mollifier replay --embedded`, from the trace to the books, at each step of the rollout."""

import signal
from pathlib import Path

import pytest

from mollifier.cli import main
from mollifier.play.trace import read_trace, survey
from tests.play.conftest import descendants, mollifier, rows, started, stop, until, until_gone

# Far below the default, so that a machine that is busy with other tests trips too.
# A fault of the gate must not depend on how busy the machine is that runs the tests.
EARLY = {"trip_threshold": "5", "gate_deadline_ms": "10000", "accept_deadline_ms": "10000"}
AT_FAULT = ("rejected", "errors", "lost", "duplicated", "hash_mismatches", "left_in_buffer", "failed_open")
COUNTS = {"offered", "accepted", "pass_through", "shadow_log", "mollify", "buffered", "drained", "runs_created"}
PROMISED = {*COUNTS, *AT_FAULT, "p50_ms", "p99_ms", "lag_p99_ms", "seconds"}


def test_in_monitor_mode_a_burst_goes_to_both_stores_and_both_agree(trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "all.log"
    arguments = ("--embedded", "--replicas", 2, "--envs", 2, "--log-file", log, "--json")
    ended = mollifier("replay", trace, *arguments, **EARLY, redis_url="redis://production")
    assert ended.code == 0, ended
    record = ended.record
    assert set(record) > PROMISED
    assert (record["balanced"], record["mode"]) == (True, "monitor")
    assert record["offered"] == record["accepted"] == record["runs_created"] == rows(trace)
    assert record["mollify"] == record["buffered"] == record["drained"] > 0
    assert record["pass_through"] == rows(trace) - record["mollify"]
    assert [record[name] for name in AT_FAULT] == [0] * len(AT_FAULT)
    assert "ignored: MOLLIFIER_REDIS_URL" in ended.stderr
    audit = mollifier("audit", log, "--json")
    assert (audit.code, audit.record["matched"]) == (0, record["mollify"])


def test_in_shadow_mode_a_burst_is_only_logged(trace: Path) -> None:
    ended = mollifier("replay", trace, "--embedded", "--mode", "shadow", "--json", **EARLY)
    assert ended.code == 0, ended
    record = ended.record
    assert record["shadow_log"] == record["would_mollify"] > 0
    assert (record["mollify"], record["buffered"], record["drained"]) == (0, 0, 0)
    assert record["runs_created"] == rows(trace)


# Drained one by one, so that runs are held for long enough to be sampled.
SLOWLY = {"drain_concurrency": "1", "drain_batch_size": "1"}


@pytest.mark.parametrize(
    "outage", [(), ("--speed", "0.15", "--outage", "shutdown"), ("--speed", "0.15", "--outage", "freeze")], ids=" ".join
)
def test_in_divert_mode_held_runs_are_as_others_and_no_outage_of_the_database_costs_one(
    trace: Path, outage: tuple[str, ...]
) -> None:
    ended = mollifier("replay", trace, "--embedded", "--mode", "divert", *outage, "--json", **EARLY, **SLOWLY)
    assert ended.code == 0, ended
    record = ended.record
    assert record["offered"] == record["accepted"] == record["runs_created"] == rows(trace)
    assert record["mollify"] > 0
    assert record["buffered"] == record["drained"] == record["mollify"] + (record["sheltered"] or 0)
    assert [record[name] for name in AT_FAULT] == [0] * len(AT_FAULT)
    assert (record["attempts_used_up"], record["sampled_faults"]) == (0, 0)
    assert ("Postgres is back" in ended.stderr) == bool(outage)
    if not outage:
        assert record["sheltered"] is None
        assert record["sampled"] == record["sampled_retrieved"] > 0
        assert min(record["sampled_tagged"], record["sampled_cancelled"]) > 0
    else:
        assert record["sheltered"] > 0


def test_switched_off_nothing_is_decided_and_the_buffers_server_sees_nobody(trace: Path) -> None:
    ended = mollifier("replay", trace, "--embedded", "--mode", "off", "--limit", 40, "--speed", 4, "--json", **EARLY)
    assert ended.code == 0, ended
    record = ended.record
    assert record["buffer_connections"] == 0
    assert (record["pass_through"], record["shadow_log"], record["mollify"], record["buffered"]) == (0, 0, 0, 0)
    assert record["runs_created"] == record["offered"] == 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.csv", "--embedded"], "missing.csv: cannot be read"),
        ([__file__, "--embedded"], "test_replay_command.py, line "),
        (["TRACE"], "give --embedded, or --url and --api-key"),
        (["TRACE", "--embedded", "--url", "http://x"], "--embedded starts a stack of its own"),
        (["TRACE", "--url", "http://x", "--api-key", "k"], "--admin-token and --database-url"),
        (["TRACE", "--url", "http://x", "--api-key", "k", "--mode", "off"], "--mode and --replicas are for --embedded"),
        (["TRACE", "--url", "http://x", "--api-key", "k", "--outage", "freeze"], "--outage is for --embedded"),
        (["TRACE", "--embedded", "--outage", "flood"], "--outage"),
        (["TRACE", "--embedded", "--outage", "freeze"], "it has to be 12 s or longer; lower --speed"),
        (["TRACE", "--embedded", "--time-column", "When"], "no column 'When'"),
        (["TRACE", "--embedded", "--speed", "0"], "--speed"),
    ],
)
def test_what_cannot_be_played_is_exit_code_2_before_anything_starts(
    trace: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["replay", *(str(trace) if word == "TRACE" else word for word in arguments)])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_interrupted_replay_leaves_nothing_behind(trace: Path) -> None:
    with started("replay", trace, "--embedded", "--speed", 0.01) as process:
        until(lambda: len(descendants(process.pid)) >= 4, "servers, API and worker did not start")
        left = descendants(process.pid)
        assert stop(process, signal.SIGINT) == 130
        until_gone(left)


def test_a_real_trace_is_as_dense_as_it_is_said_to_be() -> None:
    real = Path(__file__).parents[3] / "shared" / "traces" / "azure_llm_code_2023.csv"
    if not real.exists():
        pytest.skip("the trace azure_llm_code_2023.csv is not beside the repository")
    seen = survey(read_trace(real), window_ns=2_000_000_000)
    assert (seen.arrivals, seen.span_ns // 10**9, seen.peak) == (8819, 3435, 132)
