"""Write `requirements/dev.txt`: every package the project needs, at the newest versions that work together.

Run by `make lock` with the oldest supported Python, since a version that installs there installs on the later ones too. What only some
Pythons or platforms need is named in `MARKERS`; everything else is pinned for all of them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements" / "dev.txt"
OLDEST_PYTHON = (3, 11)

# Installed while locking whatever the markers say, so that their versions are known.
MARKERS = {
    "async-timeout": "python_full_version < '3.11.3'",
    "uvloop": "sys_platform != 'win32'",
}

HEADER = """\
# Every package that developing and running Mollifier takes, pinned. Written by `make lock`, which takes the newest versions that
# pyproject.toml allows; to add a package, name it there and lock again. Markers come from scripts/lock.py.
"""


def pinned(line: str) -> str:
    """Give a line of `pip freeze` its marker, where it has one."""
    marker = MARKERS.get(line.partition("==")[0].lower())
    return f"{line}; {marker}" if marker else line


def main() -> int:
    """Resolve in a fresh environment and write down what came of it."""
    if sys.version_info[:2] != OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        print(
            f"The pins are made with Python {oldest}, the oldest supported: make lock PYTHON=python{oldest}",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        python = environment / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [python, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", f"{ROOT}[dev]", *MARKERS], check=True)
        frozen = subprocess.run([*pip, "freeze", "--exclude", "mollifier"], check=True, capture_output=True, text=True)
    lines = [pinned(line) for line in frozen.stdout.splitlines()]
    PINS.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages pinned in {PINS.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
