"""Where a stack's files are, whose they are, and the lock that makes them one stack's."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import shutil
import tempfile
import time
from pathlib import Path

from mollifier._guard.parent import Failed, Order, Parent
from mollifier._guard.server import User

POSTGRES_PORT = 5432  # Names the socket's file; nothing listens on the network.
SOCKET_PATH_BYTES = 100  # The kernels allow 104 to 108.

MARKER = "stack.json"
OWN_NAMES = ("valkey", "postgres", "postgres.new", "run", "programs")


class Folders:
    """Where the stack's files are, and for whom.

    `data` holds what lasts. `run` holds the sockets; it is in `data`, unless the path is too long for a socket, has characters that Postgres or a URL
    would need quoted, or lies below a folder that the servers' user cannot enter: then it is in a folder of its own among the `temporary` ones.
    Root gives Postgres, which refuses to run as root, to the data folder's owner or else to `nobody`. No other folder is changed.
    """

    def __init__(self, data: str | None) -> None:
        self.temporary: list[Path] = []
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
        """Remove what is of no use to the next start."""
        self._remove_passing()
        for folder in self.temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_passing(self) -> None:
        for folder in self._passing:
            shutil.rmtree(folder, ignore_errors=True)

    def _make_temporary(self) -> Path:
        for root in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - mkdtemp makes a private folder in it.
            if suits_sockets(Path(root) / "mollifier-12345678") and can(self.user, Path(root), os.X_OK):
                folder = Path(tempfile.mkdtemp(prefix="mollifier-", dir=root))
                self.temporary.append(folder)
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
