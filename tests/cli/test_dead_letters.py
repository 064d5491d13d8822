"""`mollifier dead-letters`, against a buffer in which something died."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
from redis import Redis

from mollifier import snapshots
from mollifier.buffer import Buffer
from mollifier.keys import Keyspace
from mollifier.model import EntryKind, Snapshot
from mollifier.server import Server, connect
from mollifier.settings import Settings
from tests.cli.conftest import Cli
from tests.core.support import take

T = TypeVar("T")
PAYLOAD = b'{"of": "a trigger"}'

pytestmark = pytest.mark.leaves_keys


class Store:
    """The buffer's server, for code that blocks."""

    def __init__(self, url: str) -> None:
        self._url = url

    def do(self, operation: Callable[[Buffer], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            async with connect(self._url) as redis:
                return await operation(Buffer(Server(redis), lambda: Settings(redis_url=self._url)))

        return asyncio.run(run())

    def kill(self, *run_ids: str, org: str = "org_a", env: str = "env_a", payload: bytes = PAYLOAD) -> None:
        """Hold runs, and give up their entries one after the other."""

        async def dying(buffer: Buffer) -> None:
            for run_id in run_ids:
                moment = datetime(2026, 1, 2, tzinfo=UTC)
                snapshot = Snapshot(
                    run_id=run_id, org_id=org, env_id=env, task_id="echo", created_at=moment, payload=payload
                )
                await buffer.accept(run_id, env, org, snapshots.encode(snapshot), kind=EntryKind.HELD)
                assert await buffer.fail(await take(buffer, env, org), "ValueError: no room") == "held"

        self.do(dying)

    def evict(self, run_id: str, org: str = "org_a") -> None:
        key = Keyspace(Settings().partitions).of(org).entry(run_id)
        with Redis.from_url(self._url) as client:  # pyright: ignore[reportUnknownMemberType] - untyped options
            assert client.delete(key) == 1

    def left(self) -> list[str]:
        """The runs of the dead letters there are."""

        async def listing(buffer: Buffer) -> list[str]:
            return sorted(letter.run_id for letter in (await buffer.list_letters(limit=1000)).letters)

        return self.do(listing)

    def queued(self) -> int:
        async def counting(buffer: Buffer) -> int:
            return (await buffer.counts()).queued

        return self.do(counting)


@pytest.fixture
def store(redis_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MOLLIFIER_REDIS_URL", redis_url)
    return Store(redis_url)


def answering(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have somebody at the terminal type this."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_letters_are_listed_newest_first_with_what_they_died_of(cli: Cli, store: Store) -> None:
    store.kill("run_a", "run_b")
    store.kill("run_c", org="org_c", env="env_c")
    listed = cli("dead-letters", "list", "--json").json
    assert {each["run_id"] for each in listed} == {"run_a", "run_b", "run_c"}
    assert [each["died_at"] for each in listed] == sorted((each["died_at"] for each in listed), reverse=True)
    (theirs,) = cli("dead-letters", "list", "--org", "org_c", "--json").json
    assert theirs["accepted_at"] is not None
    del theirs["accepted_at"], theirs["died_at"], theirs["payload_bytes"]
    assert theirs == {
        "run_id": "run_c",
        "reason": "failed",
        "org_id": "org_c",
        "env_id": "env_c",
        "task_id": "echo",
        "kind": "held",
        "attempts": 1,
        "reclaims": 0,
        "error": "ValueError: no room",
    }
    shown = cli("dead-letters", "list", "--env", "env_a").out.splitlines()
    assert shown[0].split()[:2] == ["run_id", "reason"]
    assert sorted(row.split()[0] for row in shown[1:]) == ["run_a", "run_b"]


def test_a_list_is_cut_off_where_it_is_told_and_says_so(cli: Cli, store: Store) -> None:
    store.kill("run_a", "run_b", "run_c")
    cut = cli("dead-letters", "list", "--limit", "2", "--json")
    assert len(cut.json) == 2
    assert "--all" in cut.err
    whole = cli("dead-letters", "list", "--limit", "3", "--json")
    assert (len(whole.json), whole.err) == (3, "")
    assert len(cli("dead-letters", "list", "--limit", "1", "--all", "--json").json) == 3


def test_without_dead_letters_that_is_said(cli: Cli, store: Store) -> None:
    assert cli("dead-letters", "list", "--json").json == []
    listed = cli("dead-letters", "list")
    assert (listed.code, listed.out, listed.err) == (
        0,
        "",
        "There are no dead letters. What failed and could be recorded is a run in SYSTEM_FAILURE.\n",
    )
    for verb, done in (("replay", "replayed"), ("delete", "deleted")):
        ended = cli("dead-letters", verb, "--all", "--json")
        assert (ended.code, ended.json) == (0, {done: [], "refused": []})


def test_a_letter_is_shown_with_its_payload(cli: Cli, store: Store) -> None:
    store.kill("run_a")
    shown = cli("dead-letters", "show", "run_a", "--json").json
    assert (shown["payload"], shown["payload_type"]) == (PAYLOAD.decode(), "application/json")
    assert PAYLOAD.decode() in cli("dead-letters", "show", "run_a").out
    ended = cli("dead-letters", "show", "run_b")
    assert (ended.code, ended.out) == (1, "")
    assert "there is no dead letter 'run_b'; `mollifier dead-letters list`" in ended.err


def test_what_a_customer_sent_does_not_steer_the_terminal(cli: Cli, store: Store) -> None:
    store.kill("run_a", payload="a\x1b]0;title\x07 b\x9b2J \N{SNOWMAN}\n\tc".encode())
    shown = cli("dead-letters", "show", "run_a").out
    assert "a\\x1b]0;title\\x07 b\\x9b2J \N{SNOWMAN}" in shown
    assert "\x1b" not in shown


def test_letters_are_replayed_by_name_and_what_cannot_be_is_told(cli: Cli, store: Store) -> None:
    store.kill("run_a", "run_b", "run_gone")
    store.evict("run_gone")
    ended = cli("dead-letters", "replay", "run_a", "run_gone", "run_x", "--json")
    assert (ended.code, ended.json["replayed"]) == (1, ["run_a"])
    assert {each["run_id"]: each["error"].split(":")[0] for each in ended.json["refused"]} == {
        "run_gone": "nothing is left of it to replay",
        "run_x": "there is no dead letter of this run",
    }
    assert "1 replayed, 2 refused" in ended.err
    assert (store.left(), store.queued()) == (["run_b", "run_gone"], 1)
    ended = cli("dead-letters", "replay", "run_b")
    assert (ended.code, ended.out.split()) == (0, ["run_b", "replayed"])


def test_all_letters_of_an_owner_are_replayed(cli: Cli, store: Store) -> None:
    store.kill("run_a", "run_b")
    store.kill("run_c", org="org_c", env="env_c")
    assert cli("dead-letters", "replay", "--all", "--env", "env_c", "--json").json["replayed"] == ["run_c"]
    ended = cli("dead-letters", "replay", "--all", "--json")
    assert (ended.code, sorted(ended.json["replayed"])) == (0, ["run_a", "run_b"])
    assert (store.left(), store.queued()) == ([], 3)


@pytest.mark.parametrize(("typed", "goes"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_nothing_is_deleted_before_somebody_says_yes(
    cli: Cli, store: Store, monkeypatch: pytest.MonkeyPatch, typed: str, goes: bool
) -> None:
    store.kill("run_a", "run_b")
    answering(monkeypatch, typed)
    ended = cli("dead-letters", "delete", "--all", "--json")
    assert "Delete 2 dead letters for good?" in ended.err
    assert ended.code == (0 if goes else 1)
    assert store.left() == ([] if goes else ["run_a", "run_b"])
    assert (sorted(ended.json["deleted"]) if goes else ended.out) == (["run_a", "run_b"] if goes else "")


def test_letters_are_deleted_without_asking_where_that_is_said(cli: Cli, store: Store) -> None:
    store.kill("run_a", "run_b")
    store.kill("run_c", org="org_c", env="env_c")
    store.evict("run_a")
    ended = cli("dead-letters", "delete", "run_a", "run_x", "--yes", "--json")
    assert (ended.code, ended.json["deleted"]) == (1, ["run_a"])
    assert cli("dead-letters", "delete", "--all", "--org", "org_a", "-y", "--json").json["deleted"] == ["run_b"]
    assert store.left() == ["run_c"]


def test_an_event_for_each_goes_to_the_log(cli: Cli, store: Store, tmp_path: Path) -> None:
    store.kill("run_a", "run_b", payload=b'"a secret"')
    log = tmp_path / "events.log"
    cli("dead-letters", "replay", "run_a", "--log-file", str(log))
    cli("dead-letters", "delete", "run_b", "--yes", "--log-file", str(log))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(each["event"], each["run_id"], each["org_id"], each["env_id"]) for each in events] == [
        ("mollifier.dead_letter_replayed", "run_a", "org_a", "env_a"),
        ("mollifier.dead_letter_deleted", "run_b", "org_a", "env_a"),
    ]
    assert "secret" not in log.read_text()


def test_bad_usage_exits_2_and_changes_nothing(cli: Cli, store: Store, subtests: pytest.Subtests) -> None:
    store.kill("run_a")
    for arguments, said in (
        ((), "--all"),
        (("run_a", "--all"), "--all"),
        (("run_a", "--org", "org_a"), "--org"),
        (("run_a", "--env", "env_a"), "--env"),
    ):
        for verb in ("replay", "delete"):
            with subtests.test(f"{verb} {arguments}"):
                ended = cli("dead-letters", verb, *arguments)
                assert (ended.code, ended.out) == (2, "")
                assert said in ended.err
    assert cli("dead-letters", "list", "--limit", "0").code == 2
    assert store.left() == ["run_a"]


def test_a_buffer_that_is_not_configured_not_there_or_of_another_layout_is_told(
    cli: Cli, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.do(lambda buffer: buffer.claim_layout())
    monkeypatch.setenv("MOLLIFIER_PARTITIONS", "8")
    ended = cli("dead-letters", "list")
    assert (ended.code, "MOLLIFIER_PARTITIONS" in ended.err) == (2, True)
    monkeypatch.setenv("MOLLIFIER_REDIS_URL", "unix:///nowhere/valkey.sock")
    assert cli("dead-letters", "list").code == 1
    monkeypatch.delenv("MOLLIFIER_REDIS_URL")
    ended = cli("dead-letters", "list")
    assert (ended.code, "MOLLIFIER_REDIS_URL" in ended.err) == (2, True)
