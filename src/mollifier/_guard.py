"""The guard: a process that owns the embedded servers, so that none of them outlives whoever asked for them.

The problem: Valkey and Postgres outlive a parent that dies of SIGKILL, because nobody is left to stop them. The guard runs in a session of its
own (a Ctrl-C in the terminal reaches neither it nor the servers), starts the servers as its children, and then waits on a pipe whose other end only
the parent holds. The kernel closes that end however the parent dies; the guard sees end-of-file, stops the servers, removes what was temporary, and
ends. Should the guard itself be killed, Linux signals the servers (PR_SET_PDEATHSIG).

`embedded.py` runs this file by its path, in an isolated interpreter without site-packages: standard library only, no import of the package.
Both ends speak JSON lines. The first line from the parent is an `Order`; later ones are `{"start": name}`, `{"stop": name, "kill": bool}` and
`{"end": true}`. Answers are any number of `{"progress": text}` and then one `{"ready": {...}}` or `{"failed": text}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

START_S = 60.0
STOP_S = 10.0
TURN_S = 0.01
POSTGRES_PORT = 5432  # Names the socket's file; nothing listens on the network.
SOCKET_PATH_BYTES = 100  # The kernels allow 104 to 108.
LOG_TAIL_BYTES = 3000

# The parent's environment could hold PGPORT, PGDATA, LC_ALL and the like, which Postgres obeys.
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

MARKER = "stack.json"
OWN_NAMES = ("valkey", "postgres", "postgres.new", "run", "programs")

Steps = Iterator[None]
"""Work that yields wherever it waits, so that servers start side by side in one thread (a guard that forks has no second one)."""


class Ended(Exception):  # noqa: N818 - not an error: the parent is gone, or asked for the end.
    """The guard's time is over."""


class Failed(Exception):  # noqa: N818 - carries the sentence that the parent raises as an error.
    """The parent's order cannot be carried out; the message says why and what to do."""


class User(NamedTuple):
    """Whom a server runs as when the guard is root."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Order:
    """What to start. `data=None` makes a temporary folder; a program of None leaves that server out."""

    data: str | None
    durable: bool
    fresh: bool
    valkey: str | None
    postgres: str | None
    claim_s: float


class Parent:
    """The process that asked for the servers: its lines on standard input, answers on standard output, and whether it still lives."""

    def __init__(self) -> None:
        self._pid = os.getppid()
        self._lines = b""
        self._signalled = False
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_signal)

    def _note_signal(self, *_: object) -> None:
        self._signalled = True

    def wait(self, seconds: float) -> None:
        """Wait for a line or for the time to pass. Raises Ended when the parent is gone or a signal came."""
        readable, _, _ = select.select([0, self._woken], [], [], seconds)
        if 0 in readable:
            chunk = os.read(0, 65536)
            if not chunk:
                raise Ended
            self._lines += chunk
        # A child that the parent forked may hold the pipe open beyond the parent's death: then the new parent's id tells.
        if self._signalled or os.getppid() != self._pid:
            raise Ended

    def next_line(self) -> dict[str, Any]:
        while b"\n" not in self._lines:
            self.wait(1.0)
        line, _, self._lines = self._lines.partition(b"\n")
        return json.loads(line)

    def tell(self, **message: object) -> None:
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(message).encode() + b"\n")


class Server:
    """One server's processes. `spawn` may be called again once they are gone."""

    def __init__(self, name: str, log: Path, stop_signal: signal.Signals, lock: int) -> None:
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self._log = log
        self._log_start = 0
        self._stop_signal = stop_signal
        self._lock = lock
        self._lives = -1

    def spawn(self, command: list[str], folder: Path, user: User | None) -> None:
        """Start the command in the folder.

        It inherits the folder's lock, so that no later stack takes the folder while a process of this one is left, and the writing end of a pipe, so
        that the end-of-file on the other tells when the last of its processes is gone.
        """
        self._lives, lives = os.pipe()
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=ENVIRONMENT,
                pass_fds=(self._lock, lives),
                start_new_session=True,
                preexec_fn=dies_with_guard(self._stop_signal),  # noqa: PLW1509 - the guard has one thread only.
                user=None if user is None else user.uid,
                group=None if user is None else user.gid,
                extra_groups=None if user is None else [],
            )
        os.close(lives)

    def gone(self) -> bool:
        if self.process is None:
            return True
        if select.select([self._lives], [], [], 0)[0]:
            self.process.wait()
            os.close(self._lives)
            self.process = None
            return True
        return False

    def finished(self) -> int | None:
        """Return the exit code of the process that was spawned, None while it runs."""
        return None if self.process is None else self.process.poll()

    def stop(self, *, kill: bool = False) -> Steps:
        """Stop it in its clean way, at once with `kill`, and by force once STOP_S have passed."""
        patience = time.monotonic() + (0 if kill else STOP_S)
        if self.process is not None and not kill:
            self._signal(self._stop_signal)
            self._signal(signal.SIGCONT)
        while not self.gone():
            if time.monotonic() >= patience:
                self._signal(signal.SIGKILL)
                patience += 1.0
            yield

    def _signal(self, number: signal.Signals) -> None:
        """Signal the server; SIGKILL goes to its children as well, which it could no longer tell."""
        if self.process is None or self.process.poll() is not None:
            return
        children = list(children_of(self.process.pid)) if number == signal.SIGKILL else []
        for pid in (self.process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def failure(self, what: str) -> Failed:
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - LOG_TAIL_BYTES))
            return Failed(f"{self.name} {what}. The end of its log:\n{log.read().decode(errors='replace').strip()}")
        return Failed(f"{self.name} {what}.")


def children_of(pid: int) -> Iterator[int]:
    """Yield the ids of a process's children (Linux; elsewhere they end by themselves when they notice that it is gone)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                yield int(stat.parent.name)


def dies_with_guard(number: signal.Signals) -> Callable[[], object] | None:
    """Return what a child calls to be sent the signal when the guard dies (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    pr_set_pdeathsig = 1
    return lambda: prctl(pr_set_pdeathsig, int(number))


class Folders:
    """Where the stack's files are, and for whom.

    `data` holds what lasts. `scratch` holds the sockets, and is `data` itself unless its path is too long for a socket, has characters that Postgres
    or a URL would need quoted, or lies below a folder that the servers' user cannot enter; then it is a temporary folder. Root gives Postgres, which
    refuses to run as root, to the data folder's owner or else to `nobody`. No folder outside of these is changed.
    """

    def __init__(self, data: str | None) -> None:
        self._temporary: list[Path] = []
        self._passing: list[Path] = []
        self.user = unprivileged(None)
        self.data = self._make_temporary() if data is None else Path(data).absolute()
        self.lock = -1

    def open(self, order: Order, parent: Parent) -> None:
        """Lock the data folder, find a place for the sockets, and clear what an earlier guard could not remove."""
        self._claim(parent, order.claim_s)
        self.user = unprivileged(self.data)
        self.valkey_user = self.user if self.data.stat().st_uid else None
        self._check(fresh=order.fresh)
        fits = suits_sockets(self.data) and can(self.user, self.data, os.X_OK)
        scratch = self.data if fits else self._make_temporary()
        self.run, self.programs = scratch / "run", scratch / "programs"
        self._passing = [self.run, self.programs]
        self._remove_passing()
        write_marker(self.data / MARKER, {"layout": 1, "guard_pid": os.getpid()})
        self.own(self.run, self.user)

    def own(self, folder: Path, user: User | None) -> Path:
        """Make sure that this folder of ours exists, is private, and belongs to the user."""
        folder.mkdir(mode=0o700, exist_ok=True)
        if user is not None:
            os.chown(folder, *user)
        return folder

    def log(self, name: str) -> Path:
        """Return the path for a server's log, with the one of the last start kept beside it."""
        path = self.data / f"{name}.log"
        with contextlib.suppress(FileNotFoundError):
            path.replace(path.with_suffix(".log.old"))
        return path

    def remove(self) -> None:
        self._remove_passing()
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_passing(self) -> None:
        for folder in self._passing:
            shutil.rmtree(folder, ignore_errors=True)

    def _make_temporary(self) -> Path:
        for root in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - mkdtemp makes a private folder in it.
            if suits_sockets(Path(root) / "mollifier-12345678") and can(self.user, Path(root), os.X_OK):
                folder = Path(tempfile.mkdtemp(prefix="mollifier-", dir=root))
                self._temporary.append(folder)
                if self.user is not None:
                    folder.chmod(0o711)
                return folder
        raise Failed(
            "No temporary folder has a path short enough for a socket and open to the servers' user: set TMPDIR."
        )

    def _claim(self, parent: Parent, seconds: float) -> None:
        """Lock the data folder itself: that leaves no lock file which another user could not open."""
        deadline, told = time.monotonic() + seconds, False
        while True:
            self.data.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.data.mkdir(mode=0o700)
                if os.geteuid() == 0:
                    self.data.chmod(0o711)
            self.lock = os.open(self.data, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Nobody has put another folder in its place meanwhile.
                if os.path.samestat(os.fstat(self.lock), self.data.stat()):
                    return
            os.close(self.lock)
            if time.monotonic() > deadline:
                raise Failed(
                    f"The data folder {self.data} is in use by another stack{self._holder()}: stop that one, or choose another folder."
                )
            if not told:
                told = True
                parent.tell(progress=f"waiting for another stack on {self.data} to end")
            parent.wait(0.05)

    def _holder(self) -> str:
        try:
            return f" (guard process {json.loads((self.data / MARKER).read_text())['guard_pid']})"
        except (OSError, ValueError, KeyError):
            return ""

    def _check(self, *, fresh: bool) -> None:
        present = [name for name in OWN_NAMES if (self.data / name).exists()]
        if present and not (self.data / MARKER).exists():
            raise Failed(f"{self.data / present[0]} was not made by an embedded stack: choose another data folder.")
        if fresh:
            for name in present:
                shutil.rmtree(self.data / name)


def write_marker(path: Path, content: dict[str, object]) -> None:
    """Replace the file rather than write into it: it may be another user's."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.replace(path)


def suits_sockets(folder: Path) -> bool:
    longest = f"{folder}/run/.s.PGSQL.{POSTGRES_PORT}.lock"
    return len(os.fsencode(longest)) < SOCKET_PATH_BYTES and bool(re.fullmatch(r"[\w/.+@-]+", longest, re.ASCII))


def unprivileged(data: Path | None) -> User | None:
    """Return whom root runs Postgres as: the owner of the data folder, or `nobody`. None when the guard is not root."""
    if os.geteuid() != 0:
        return None
    if data is not None and (owner := data.stat()).st_uid != 0:
        return User(owner.st_uid, owner.st_gid)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise Failed(
            "Postgres refuses to run as root, and there is no user `nobody`: start this as another user."
        ) from None
    return User(nobody.pw_uid, nobody.pw_gid)


def can(user: User | None, path: Path, mode: int) -> bool:
    """Tell whether the user may use the path, by asking the kernel as that user (modes alone do not tell of ACLs)."""
    if user is None:
        return os.access(path, mode)
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    try:
        os.setgroups([])
        os.setgid(user.gid)
        os.setuid(user.uid)
        os._exit(0 if os.access(path, mode) else 1)
    finally:
        os._exit(2)


class Guard:
    """The servers of one stack, and the steps that start them."""

    def __init__(self, order: Order, parent: Parent, folders: Folders) -> None:
        self.order = order
        self.parent = parent
        self.folders = folders
        self.socket = folders.run / "valkey.sock"
        self.servers: dict[str, Server] = {}
        if order.valkey is not None:
            self.servers["valkey"] = Server("Valkey", folders.log("valkey"), signal.SIGTERM, folders.lock)
        if order.postgres is not None:
            self.servers["postgres"] = Server("Postgres", folders.log("postgres"), signal.SIGINT, folders.lock)

    def start(self, name: str) -> Steps:
        self.parent.tell(progress=f"starting {self.servers[name].name}")
        return self._start_valkey() if name == "valkey" else self._start_postgres()

    def _start_valkey(self) -> Steps:
        server, user = self.servers["valkey"], self.folders.valkey_user
        folder = self.folders.own(self.folders.data / "valkey", user)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "yes" if self.order.durable else "no",
        }
        command = [str(self.order.valkey), *(word for name, value in options.items() for word in (f"--{name}", value))]
        server.spawn(command, folder, user)
        yield from self._until(server, self._valkey_answers)

    def _valkey_answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            client.connect(str(self.socket))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")  # -LOADING while it reads its append-only file.
        return False

    def _start_postgres(self) -> Steps:
        server, folders = self.servers["postgres"], self.folders
        programs = self._programs(Path(str(self.order.postgres)))
        cluster = folders.data / "postgres"
        if not cluster.exists():
            self.parent.tell(progress="creating the Postgres cluster")
            yield from self._init_cluster(server, programs)
        # The lock on the data folder says that no process of an earlier start is left, whatever process now has the number in this file.
        (cluster / "postmaster.pid").unlink(missing_ok=True)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(folders.run),
            "port": str(POSTGRES_PORT),
            "max_connections": "200",
            "shared_buffers": "128MB",
        }
        if not self.order.durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        words = [word for item in settings.items() for word in ("-c", "=".join(item))]
        server.spawn([str(programs / "postgres"), "-D", self._here(cluster), *words], cluster, folders.user)
        yield from self._until(server, self._postgres_answers)

    def _init_cluster(self, server: Server, programs: Path) -> Steps:
        """Make the cluster under another name first, so that an interrupted initdb never passes for one."""
        making = self.folders.data / "postgres.new"
        shutil.rmtree(making, ignore_errors=True)
        self.folders.own(making, self.folders.user)
        choices = ["--username=mollifier", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        if not self.order.durable:
            choices.append("--no-sync")
        server.spawn([str(programs / "initdb"), "-D", self._here(making), *choices], making, self.folders.user)
        while (code := server.finished()) is None:
            yield
        if code:
            raise server.failure("could not create its cluster (initdb failed)")
        while not server.gone():
            yield
        making.rename(self.folders.data / "postgres")

    def _here(self, folder: Path) -> str:
        """Name the folder that a process starts in such that the servers' user needs no way to it through the folders above.

        This link leads to the folder itself and passes no other: root may keep data below a folder that is closed to everybody else.
        """
        link = "/proc/self/cwd"
        return link if self.folders.user is not None and Path(link).exists() else str(folder)

    def _postgres_answers(self) -> bool:
        program = Path(str(self.order.postgres)) / "pg_isready"
        address = f"host={self.folders.run} port={POSTGRES_PORT} user=mollifier dbname=postgres"
        return subprocess.run([program, "--quiet", "--dbname", address], env=ENVIRONMENT, check=False).returncode == 0

    def _programs(self, programs: Path) -> Path:
        """Return the folder of Postgres's programs; a copy where the servers' user cannot get at the installed ones.

        An environment below /root is the common case. The copy is about 35 MB, and goes when the stack goes.
        """
        if can(self.folders.user, programs / "postgres", os.R_OK | os.X_OK):
            return programs
        installed, package = programs.parent, programs.parent.parent
        copy = self.folders.programs / package.name / installed.name
        if not copy.exists():
            for library in (f"../{package.name}.libs", ".dylibs"):
                if (package / library).is_dir():
                    shutil.copytree(package / library, copy.parent / library)
            needless = shutil.ignore_patterns("*.a", "include", "pkgconfig", "pgxs")
            shutil.copytree(installed, copy, symlinks=True, ignore=needless)
            for path in (self.folders.programs, *self.folders.programs.rglob("*")):
                path.chmod(0o755)
        return copy / "bin"

    def _until(self, server: Server, answers: Callable[[], bool]) -> Steps:
        deadline = time.monotonic() + START_S
        while not answers():
            if server.finished() is not None:
                raise server.failure("ended while starting")
            if time.monotonic() > deadline:
                raise server.failure(f"did not answer within {START_S:.0f} s")
            yield

    def carry_out(self, *tasks: Steps) -> None:
        """Run the steps side by side, for as long as the parent lives."""
        waiting = list(tasks)
        while waiting := [steps for steps in waiting if next(steps, True) is None]:
            self.parent.wait(TURN_S)

    def serve(self) -> None:
        """Start everything, then do what the parent asks until it ends."""
        self.carry_out(*(self.start(name) for name in self.servers))
        self.parent.tell(ready=self.state())
        while True:
            line = self.parent.next_line()
            try:
                self._obey(line)
            except Failed as failure:
                self.parent.tell(failed=str(failure))
            else:
                self.parent.tell(ready=self.state())

    def _obey(self, line: dict[str, Any]) -> None:
        match line:
            case {"stop": str(name), "kill": bool(kill)}:
                self.carry_out(self.servers[name].stop(kill=kill))
            case {"start": str(name)}:
                server = self.servers[name]
                if server.finished() is not None:
                    # It died by itself: its last processes may still be on their way out.
                    self.carry_out(server.stop(kill=True))
                if server.gone():
                    self.carry_out(self.start(name))
            case _:
                raise Ended

    def state(self) -> dict[str, object]:
        pids = {name: server.process.pid for name, server in self.servers.items() if server.process is not None}
        folders = self.folders
        return {"data": str(folders.data), "run": str(folders.run), "socket": str(self.socket), "pids": pids}

    def close(self) -> None:
        """Stop every server, whether or not the parent still lives."""
        stopping = [server.stop() for server in self.servers.values()]
        while stopping := [steps for steps in stopping if next(steps, True) is None]:
            time.sleep(TURN_S)


def main() -> Literal[0, 1]:
    parent = Parent()
    with contextlib.ExitStack() as at_end:
        try:
            order = Order(**parent.next_line())
            folders = Folders(order.data)
            at_end.callback(folders.remove)
            folders.open(order, parent)
            os.umask(0o077)
            guard = Guard(order, parent, folders)
            at_end.callback(guard.close)
            guard.serve()
        except Ended:
            return 0
        except Failed as failure:
            parent.tell(failed=str(failure))
        except OSError as error:
            parent.tell(failed=f"{error}. Run this as a user who may use that path, or choose another data folder.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
