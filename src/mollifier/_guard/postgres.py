"""Postgres, on a Unix socket; its cluster is made on the first start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from mollifier._guard.folders import POSTGRES_PORT, Folders, can
from mollifier._guard.parent import Parent
from mollifier._guard.server import ENVIRONMENT, Server, Steps


class Postgres(Server):
    """Without `durable` nothing is synced to disk: a crash of the machine, not one of the server, may cost the data."""

    name = "Postgres"
    stop_signal = signal.SIGINT  # "Fast": ends the sessions, then shuts down cleanly.

    def __init__(self, folders: Folders, programs: str, parent: Parent, *, durable: bool) -> None:
        super().__init__(folders.log("postgres"), folders.lock)
        self._folders = folders
        self._installed = Path(programs)
        self._parent = parent
        self._durable = durable

    def start(self) -> Steps:
        """See Server."""
        programs = self._programs()
        cluster = self._folders.data / "postgres"
        if not cluster.exists():
            yield from self._make_cluster(cluster, programs)
        # The lock on the data folder says that no process of an earlier start is left, whatever process now has the id in this file.
        (cluster / "postmaster.pid").unlink(missing_ok=True)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folders.run),
            "port": str(POSTGRES_PORT),
            "max_connections": "200",
            "shared_buffers": "128MB",
        }
        if not self._durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        words = [word for item in settings.items() for word in ("-c", "=".join(item))]
        self.spawn([str(programs / "postgres"), "-D", self._here(cluster), *words], cluster, self._folders.user)
        yield from self.until_it_answers()

    def answers(self) -> bool:
        """See Server."""
        address = f"host={self._folders.run} port={POSTGRES_PORT} user=mollifier dbname=postgres"
        command = [self._installed / "pg_isready", "--quiet", "--dbname", address]
        return subprocess.run(command, env=ENVIRONMENT, check=False).returncode == 0

    def _make_cluster(self, cluster: Path, programs: Path) -> Steps:
        """Make it under another name first, so that an interrupted initdb never passes for a cluster."""
        self._parent.tell(progress="creating the Postgres cluster")
        making = cluster.with_suffix(".new")
        shutil.rmtree(making, ignore_errors=True)
        self._folders.own(making, self._folders.user)
        choices = ["--username=mollifier", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        if not self._durable:
            choices.append("--no-sync")
        self.spawn([str(programs / "initdb"), "-D", self._here(making), *choices], making, self._folders.user)
        while (code := self.finished()) is None:
            yield
        if code:
            raise self.failure("could not create its cluster (initdb failed)")
        while not self.gone():
            yield
        making.rename(cluster)

    def _here(self, folder: Path) -> str:
        """Name the folder that a process starts in such that its user needs no way there through the folders above.

        The link leads to the folder itself and passes no other: root may keep data below a folder that is closed to everybody else.
        """
        link = "/proc/self/cwd"
        return link if self._folders.user is not None and Path(link).exists() else str(folder)

    def _programs(self) -> Path:
        """Return the folder of the programs; that of a copy where the servers' user cannot get at the installed ones.

        An environment below /root is the common case. The copy is about 35 MB, and goes when the stack goes.
        """
        if can(self._folders.user, self._installed / "postgres", os.R_OK | os.X_OK):
            return self._installed
        installed, package = self._installed.parent, self._installed.parent.parent
        copy = self._folders.programs / package.name / installed.name
        if not copy.exists():
            for libraries in (f"../{package.name}.libs", ".dylibs"):
                if (package / libraries).is_dir():
                    shutil.copytree(package / libraries, copy.parent / libraries)
            needless = shutil.ignore_patterns("*.a", "include", "pkgconfig", "pgxs")
            shutil.copytree(installed, copy, symlinks=True, ignore=needless)
            for path in (self._folders.programs, *self._folders.programs.rglob("*")):
                path.chmod(0o755)
        return copy / "bin"
