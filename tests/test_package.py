import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mollifier"
SHIPPED = {".py", ".lua", ".sql", ".ini", ".mako", ".html", ".typed"}


def test_the_wheel_holds_every_source_file_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("mollifier/")}
    files = {f.relative_to(PACKAGE.parent).as_posix() for f in PACKAGE.rglob("*") if f.suffix in SHIPPED}
    assert held == files
