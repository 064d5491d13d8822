import os
import pty
import subprocess
import sys

import pytest

from mollifier.embedded import EmbeddedStack
from mollifier.postgres.migrate import migrate
from tests.cli.conftest import Cli
from tests.conftest import skipping_without_wheels


@pytest.fixture
def both(configured: Cli, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """As `configured`, with the buffer's server too; both servers of the tests keep nothing on disk."""
    monkeypatch.setenv("MOLLIFIER_REDIS_URL", redis_url)
    return configured


def test_servers_that_would_lose_data_exit_2_with_the_findings_the_worst_first(
    both: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLLIFIER_DIVERT", "1")
    ended = both("doctor")
    assert ended.code == 2
    header, *rows = [line.split()[:2] for line in ended.out.splitlines()]
    assert header[0] == "severity"
    assert ["critical", "buffer.persistence"] in rows
    order = ["critical", "warning", "unknown", "info", "ok"]
    assert [level for level, _ in rows] == sorted((level for level, _ in rows), key=order.index)
    assert "appendonly yes" in ended.out
    assert "2 critical" in ended.err


def test_the_findings_are_printed_as_json_with_what_to_do(both: Cli) -> None:
    ended = both("doctor", "--json")
    assert ended.code == 2
    told = ended.json
    assert told["worst"] == "critical"
    found = {each["check"]: each for each in told["findings"]}
    assert found["buffer.persistence"]["severity"] == "warning"
    assert found["buffer.persistence"]["fix"].startswith("set appendonly yes")
    counts = {level: told[level] for level in ("ok", "info", "unknown", "warning", "critical")}
    assert sum(counts.values()) == len(told["findings"])
    assert counts["critical"] == 1


def test_warnings_alone_exit_1_and_none_0(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with skipping_without_wheels(), EmbeddedStack() as stack:
        migrate(stack.database_url)
        monkeypatch.setenv("MOLLIFIER_DATABASE_URL", stack.database_url)
        monkeypatch.setenv("MOLLIFIER_REDIS_URL", stack.redis_url)
        ended = cli("doctor", "--json")
        warned = [each["check"] for each in ended.json["findings"] if each["severity"] == "warning"]
        assert (ended.code, warned) == (1, ["system.drainers"])

        monkeypatch.setattr("mollifier.doctor.database_facts.count_workers", one_worker)
        assert cli("doctor").code == 0


async def one_worker(_: object) -> int:
    return 1


def test_a_person_at_a_terminal_is_shown_a_table_that_fits(both: Cli, redis_url: str, database_url: str) -> None:
    master, slave = pty.openpty()
    settings = {"MOLLIFIER_DATABASE_URL": database_url, "MOLLIFIER_REDIS_URL": redis_url, "COLUMNS": "100"}
    command = [sys.executable, "-m", "mollifier", "doctor"]
    environment = os.environ | settings | {"TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=environment)
    os.close(slave)
    written = b""
    try:
        while part := os.read(master, 65536):
            written += part
    except OSError:
        pass  # Linux says so when the other end is closed.
    os.close(master)
    assert process.wait() == 2
    assert b"-> set appendonly yes" in b" ".join(written.split())
    assert b"why it matters" not in written


def test_nothing_configured_is_critical_and_names_the_variable(cli: Cli) -> None:
    ended = cli("doctor")
    assert ended.code == 2
    assert "MOLLIFIER_DATABASE_URL is not set" in ended.out


def test_a_bad_setting_exits_2_before_anything_is_examined(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLLIFIER_PARTITIONS", "0")
    ended = cli("doctor")
    assert (ended.code, ended.out) == (2, "")
    assert "MOLLIFIER_PARTITIONS" in ended.err
