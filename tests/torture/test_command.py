"""`mollifier torture`: a round of faults on a real system, and the accounts at its end."""

import signal

import pytest

from mollifier.cli import main
from mollifier.play.torture.plan import make_plan
from tests.play.conftest import descendants, embedded_servers, mollifier, started, stop, until, until_gone

__all__ = ["embedded_servers"]
PROMISED = {
    *("offered", "accepted", "rejected", "errors", "unknown", "created", "lost", "duplicated", "kills"),
    *("recovery_p99_s", "cancelled_executed", "left_in_buffer", "faults", "seed", "seconds"),
}
BAD = ("rejected", "lost", "duplicated", "corrupted", "cancelled_executed", "changes_lost", "left_in_buffer")


def test_a_round_of_faults_loses_nothing_and_does_nothing_twice() -> None:
    plan = make_plan(seed=4, seconds=6, lease_s=1.0)
    ended = mollifier("torture", "--seed", 4, "--minutes", 0.1, "--lease-s", 1, "--rate", 30, "--json")
    record = ended.record
    # How soon entries of a killed worker are settled says here more of the machine than of the system.
    late = [
        said
        for said in record["imbalances"]
        if said.startswith(f"{record['recovery_late']} entries of killed workers ")
    ]
    assert record["imbalances"] == late, ended
    assert (ended.code, record["balanced"]) == (int(bool(late)), not late)
    assert set(record) > PROMISED
    assert {name: record[name] for name in BAD} == dict.fromkeys(BAD, 0)
    assert record["offered"] == record["accepted"] + record["errors"] + record["unknown"] > 0
    assert sum(record["faults"].values()) == sum(len(fault.kinds) for fault in (*plan.in_turn, *plan.on_apis))
    assert all(record["kills"][kind] >= 1 for kind in ("api", "worker", "valkey", "postgres"))
    assert "the seed is 4" in ended.stderr


def test_an_interrupted_torture_leaves_nothing_behind() -> None:
    with started("torture", "--minutes", 5) as process:
        until(lambda: len(descendants(process.pid)) >= 6, "servers, API and worker processes did not start")
        left = descendants(process.pid)
        assert stop(process, signal.SIGINT) == 130
        until_gone(left)


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--lease-s", "0.1"], ["--rate", "0"], ["--seed", "x"]])
def test_what_cannot_be_is_exit_code_2_before_anything_starts(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["torture", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
