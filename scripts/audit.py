"""Ask the database of advisories which of the pinned packages have known vulnerabilities; `make audit`, and part of `make check`.

A vulnerability that is known is a failure, unless `ACCEPTED` says why it is none here. What the database does not answer for, because
it cannot be reached or does not know a package, is named and is no failure: checks must not depend on a service being up.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements" / "dev.txt"
NAMED_MAX = 5

ACCEPTED: Mapping[str, str] = {}
"""Advisories by their id that do not apply here, each with the reason."""


def audited() -> list[dict[str, Any]] | None:
    """Return what is known of each pinned package; None where the database gave no answer at all."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--disable-pip", "--no-deps"]
    options = ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    asked = subprocess.run([*command, *options], check=False, capture_output=True, text=True)
    try:
        return json.loads(asked.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"audit skipped: {last}", file=sys.stderr)
        return None


def report(packages: Sequence[Mapping[str, Any]], accepted: Collection[str]) -> int:
    """Print one line for each vulnerability and one for what is not known; return the status to exit with, 1 for the former."""
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        (package, advisory)
        for package in packages
        for advisory in package.get("vulns", ())
        if not {advisory["id"], *advisory.get("aliases", ())} & {*accepted}
    ]
    for package, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}", file=sys.stderr)
    if unknown:
        others = len(unknown) - NAMED_MAX
        names = ", ".join(unknown[:NAMED_MAX]) + (f" and {others} others" if others > 0 else "")
        print(f"not audited, for the database of advisories does not answer for them: {names}", file=sys.stderr)
    print(f"{len(packages) - len(unknown)} of {len(packages)} packages audited, {len(found)} vulnerabilities.")
    return 1 if found else 0


def main() -> int:
    """Ask and report."""
    packages = audited()
    return 0 if packages is None else report(packages, ACCEPTED)


if __name__ == "__main__":
    sys.exit(main())
