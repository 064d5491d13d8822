"""The doctor: what would lose data or hurt, found on the servers before it does, and what to do about it.

`diagnosis.diagnose` gathers facts (`buffer_facts.py`, `database_facts.py`, one round trip or two each, read-only) and judges them.
A check is a small function from facts to a judgement, without I/O: `buffer_checks.py`, `capacity_checks.py`, `database_checks.py`,
`system_checks.py`. What a server refuses to tell, as managed ones refuse CONFIG, is a None among the facts, and its check answers `unknown`.
"""

from mollifier.doctor.diagnosis import diagnose
from mollifier.doctor.findings import Finding, Severity, exit_code

__all__ = ["Finding", "Severity", "diagnose", "exit_code"]
