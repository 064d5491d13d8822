"""Bring the project's one virtual environment, `.venv`, up to date with `pyproject.toml` and the pins.

Run by the Makefile, which finds a Python from 3.11 on. The stamp `.venv/.stamp` is taken away before anything changes and
put back last, so an interrupted install never looks finished; a file lock lets several `make`s start at once. The stamp
holds the checkout's path, since the programs of a virtual environment stop working when it is moved.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".stamp"
PINS = ROOT / "requirements" / "dev.txt"
INPUTS = (ROOT / "pyproject.toml", PINS, Path(__file__).resolve())
OUTPUT_LINES_MAX = 30
# Variables of somebody's shell that would send packages elsewhere than .venv.
MISLEADING = {"PIP_PREFIX", "PIP_TARGET", "PIP_USER", "PYTHONHOME", "PYTHONPATH"}


class BootstrapError(Exception):
    """The environment cannot be made; the message says what to do."""


def say(line: str) -> None:
    """Tell the person at the terminal, on stderr: stdout belongs to the command that follows."""
    print(line, file=sys.stderr, flush=True)


def stamp_holds() -> bool:
    """Tell whether the stamp is this checkout's and newer than everything that it vouches for."""
    try:
        current = STAMP.read_text() == str(ROOT) and all(
            STAMP.stat().st_mtime >= path.stat().st_mtime for path in INPUTS
        )
    except FileNotFoundError:
        return False
    return current and usable()


def run(*command: str | Path) -> None:
    """Run a command, showing its output only when it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        say("\n".join(done.stdout.splitlines()[-OUTPUT_LINES_MAX:]))
        shown = " ".join(str(part) for part in command)
        raise BootstrapError(
            f"this command failed: {shown}\nIts last lines are above. Once the cause is mended, run make again."
        )


def pip(*arguments: str | Path) -> None:
    """Run the environment's pip, quietly."""
    run(PYTHON, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *arguments)


def usable() -> bool:
    """Tell whether `.venv` was made here and has a working Python (3.11 or later) and pip; if not, it is made anew."""
    if not PYTHON.exists():
        return False
    check = "import sys, pip; sys.exit(not (sys.version_info >= (3, 11) and sys.prefix == sys.argv[1]))"
    if subprocess.run(
        [PYTHON, "-c", check, VENV], check=False, capture_output=True, stdin=subprocess.DEVNULL
    ).returncode:
        return False
    # A moved environment still starts, but its programs name the Python at the old place.
    program = VENV / "bin" / "pip"
    return program.exists() and str(PYTHON.parent) in program.read_text()


def create() -> None:
    """Make an empty environment in the place of whatever is there."""
    if find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BootstrapError(
            f"{sys.executable} (Python {version}) comes without ensurepip, so it cannot make a virtual environment with pip.\n"
            f"On Debian or Ubuntu: apt-get install python{version}-venv. Or name another Python: make PYTHON=/path/to/python3"
        )
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    else:
        shutil.rmtree(VENV, ignore_errors=True)
    run(sys.executable, "-m", "venv", VENV)


def bring_up_to_date() -> None:
    """Install the pinned packages and the project itself, editable.

    An environment without a stamp was interrupted in the middle of something, so it is not built upon. One whose install failed in an
    orderly way keeps a stamp, which is nobody's path.
    """
    started = time.time()
    sound = STAMP.exists() and usable()
    STAMP.unlink(missing_ok=True)
    if sound:
        say("Bringing .venv up to date ...")
    else:
        say("Making .venv and installing what the project needs; the first time this takes about a minute ...")
        create()
    try:
        pip("install", "--requirement", PINS)
        pip("install", "--constraint", PINS, "--no-build-isolation", "--editable", ".[dev]")
        pip("check")
    except BootstrapError:
        STAMP.write_text("failed")
        raise
    STAMP.write_text(str(ROOT))
    os.utime(STAMP, (started, started))
    say(f".venv is ready ({time.time() - started:.0f} s).")


def main() -> int:
    """Do it once, however many callers ask at the same time."""
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another make that is installing ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not stamp_holds():
                bring_up_to_date()
        except BootstrapError as error:
            say(f"\nThe environment could not be made: {error}")
            return 1
        except KeyboardInterrupt:
            say("\nInterrupted; the next make carries on.")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
