import io
import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


def event(name: str, number: int, sha: str | None = None) -> str:
    fields = {"event": name, "run_id": f"run_{number}", "payload_sha256": sha or f"{number:064x}", "payload_bytes": 100}
    return json.dumps(fields) + "\n"


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    """The logs of an API and of a worker that agree on three runs."""
    api, worker = tmp_path / "api.log", tmp_path / "worker.log"
    api.write_text('{"event": "started"}\n' + "".join(event("mollifier.buffered", n) for n in range(3)))
    worker.write_text("".join(event("mollifier.drained", n) for n in range(3)))
    return api, worker


def test_logs_that_agree_exit_0(cli: Cli, logs: tuple[Path, Path]) -> None:
    ended = cli("audit", *map(str, logs), "--json")
    assert ended.code == 0
    assert (ended.json["matched"], ended.json["missing"], ended.json["hash_mismatches"]) == (3, 0, 0)
    assert ended.json["clean"] is True


def test_people_see_a_table_and_nothing_on_stderr_when_all_is_well(cli: Cli, logs: tuple[Path, Path]) -> None:
    ended = cli("audit", *map(str, logs))
    assert (ended.code, ended.err) == (0, "")
    assert ["matched", "3"] in [line.split() for line in ended.out.splitlines()]


@pytest.mark.parametrize(("removed_from", "field"), [(1, "buffered_not_drained"), (0, "drained_not_buffered")])
def test_a_removed_line_names_its_run_and_exits_1(
    cli: Cli, logs: tuple[Path, Path], removed_from: int, field: str
) -> None:
    log = logs[removed_from]
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "run_1" not in line))
    ended = cli("audit", *map(str, logs), "--json")
    assert ended.code == 1
    assert ended.json[field] == ["run_1"]
    assert "1 missing" in ended.err
    assert "run_1" in cli("audit", *map(str, logs)).out


def test_a_flipped_hash_names_its_run_and_exits_1(cli: Cli, logs: tuple[Path, Path]) -> None:
    logs[1].write_text(
        logs[1].read_text().replace(event("mollifier.drained", 2), event("mollifier.drained", 2, "f" * 64))
    )
    ended = cli("audit", *map(str, logs), "--json")
    assert ended.code == 1
    (mismatch,) = ended.json["mismatched"]
    assert mismatch["run_id"] == "run_2"
    assert (mismatch["buffered"]["payload_sha256"], mismatch["drained"]["payload_sha256"]) == (f"{2:064x}", "f" * 64)
    assert "1 hash mismatch" in ended.err


def test_garbage_is_told_with_file_and_line_and_stops_nothing(cli: Cli, logs: tuple[Path, Path]) -> None:
    api, worker = logs
    api.write_bytes(api.read_bytes() + b"Traceback (most recent call last):\n\xff\xfe\n\n")
    ended = cli("audit", str(api), str(worker))
    assert ended.code == 0
    assert f"{api}:5 {api}:6" in ended.out
    told = cli("audit", str(api), str(worker), "--json").json
    assert told["unparsed"] == 2
    assert [(each["file"], each["line"]) for each in told["unparsed_lines"]] == [(str(api), 5), (str(api), 6)]


def test_a_torn_event_fails_the_audit(cli: Cli, logs: tuple[Path, Path]) -> None:
    logs[0].write_text(logs[0].read_text() + event("mollifier.buffered", 9)[:50])
    ended = cli("audit", *map(str, logs), "--json")
    assert (ended.code, ended.json["damaged"]) == (1, 1)
    assert "1 damaged event" in ended.err


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no events found"), ('{"event": "mollifier.would_mollify", "run_id": "run_1"}\n', "shadow mode")],
    ids=["empty", "shadow"],
)
def test_a_log_without_events_is_no_success(cli: Cli, tmp_path: Path, text: str, said: str) -> None:
    log = tmp_path / "api.log"
    log.write_text(text)
    ended = cli("audit", str(log))
    assert ended.code == 1
    assert said in ended.err


def test_a_log_comes_from_standard_input_as_well(
    cli: Cli, logs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(logs[0].read_bytes())))
    assert cli("audit", "-", str(logs[1]), "--json").json["matched"] == 3


@pytest.mark.parametrize("arguments", [[], ["missing.log"], ["."]], ids=["none", "missing", "folder"])
def test_a_log_that_cannot_be_read_is_bad_usage(cli: Cli, arguments: list[str]) -> None:
    ended = cli("audit", *arguments)
    assert (ended.code, ended.out) == (2, "")


def test_a_large_log_is_read_line_by_line(cli: Cli, tmp_path: Path) -> None:
    log, count = tmp_path / "all.log", 30_000
    with log.open("w") as lines:
        for number in range(count):
            lines.write(event("mollifier.buffered", number) + '{"event": "http.request", "status": 200}\n')
        for number in range(count - 1):
            lines.write(event("mollifier.drained", number))
    ended = cli("audit", str(log), "--json")
    assert ended.code == 1
    assert ended.json["matched"] == count - 1
    assert ended.json["buffered_not_drained"] == [f"run_{count - 1}"]


def test_a_long_list_of_runs_is_cut_for_people_and_whole_for_programs(cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    log.write_text("".join(event("mollifier.buffered", number) for number in range(100)))
    assert "and 80 more" in cli("audit", str(log)).out
    assert len(cli("audit", str(log), "--json").json["buffered_not_drained"]) == 100
