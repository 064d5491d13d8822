"""Nothing that changes a store goes without its crash test: whoever adds a script or an operation of the engine finds it asked for here."""

from __future__ import annotations

from tests.core.support import SCRIPT_NAMES
from tests.crash import calls, drains
from tests.crash.points import OPERATIONS, Fault

READS = "asks and changes nothing: a crash around it is one after whatever was done before"
AGAIN = "puts right what is wrong whenever it is asked, and the next sweep asks again (tests/core/test_sweep.py)"
EXEMPT = {
    "valkey.mark": "leaves an entry as a pop leaves it, whose holder died before it did anything; whoever comes next creates the run",
    "valkey.prolong": "travels beside a call that dies anywhere, whose claim lives so much longer then",
    "valkey.repair": AGAIN,
    "valkey.report": "tells what was seen, changes nothing that is held, and is told again by the next sweep",
    "valkey.restore": AGAIN,
    "engine.find_by_keys": READS,
    "engine.get_children": READS,
    "engine.get_progress": READS,
    "engine.get_run": READS,
    "engine.get_runs": READS,
    "engine.list_runs": READS,
}


def crashed_at() -> set[str]:
    """Return what a process dies around in `test_kills.py`, which fails for a point that is never reached."""
    faults: list[Fault] = [fault for scene in (*calls.SCENES, *drains.SCENES) for fault in scene.faults]
    return {fault.point.rpartition(".")[0] for fault in faults if fault.point is not None}


def test_a_process_dies_around_every_script_and_every_operation_of_the_engine() -> None:
    everything = {f"valkey.{name}" for name in SCRIPT_NAMES} | {f"engine.{name}" for name in OPERATIONS}
    left_out = everything - crashed_at() - EXEMPT.keys()
    assert left_out == set(), "have a process die around it, in a scene of calls.py or drains.py, or say here why not"


def test_no_exemption_outlives_its_reason() -> None:
    names = {f"valkey.{name}" for name in SCRIPT_NAMES} | {f"engine.{name}" for name in OPERATIONS}
    assert EXEMPT.keys() <= names - crashed_at()
