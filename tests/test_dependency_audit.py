"""What `make audit` makes of the answers of the database of advisories."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Package = dict[str, Any]
SCRIPT = Path(__file__).parent.parent / "scripts" / "audit.py"
VULNERABLE: Package = {
    "name": "a",
    "version": "1",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}],
}
SOUND: Package = {"name": "b", "version": "1", "vulns": []}
UNKNOWN: Package = {"name": "c", "skip_reason": "not found"}
ANSWERS: list[tuple[list[Package], list[str], int, str]] = [
    ([SOUND], [], 0, "1 of 1 packages audited, 0 vulnerabilities"),
    ([VULNERABLE, SOUND], [], 1, "a 1: PYSEC-1, fixed in 2"),
    ([VULNERABLE], ["CVE-1"], 0, "0 vulnerabilities"),
    ([UNKNOWN, SOUND], [], 0, "does not answer for them: c"),
]


def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("packages", "accepted", "status", "said"), ANSWERS)
def test_only_a_known_vulnerability_that_is_not_accepted_fails_the_audit(
    capsys: pytest.CaptureFixture[str], packages: list[Package], accepted: list[str], status: int, said: str
) -> None:
    assert audit().report(packages, accepted) == status
    assert said in "".join(capsys.readouterr())
