"""Mollifier smooths bursts of job triggers: it notices them, holds the overflow, and drains it fairly.

The names below are the library; `mollifier.engine.RunEngine` is the protocol that joins it to an application's own run engine.
"""

from mollifier.buffer import Buffer
from mollifier.drainer import Drainer
from mollifier.engine import RunEngine
from mollifier.errors import MollifierError
from mollifier.facade import Mollifier
from mollifier.gate import Gate
from mollifier.model import Decision, Entry, GateInputs, Snapshot
from mollifier.settings import Settings
from mollifier.trigger import TriggerService
from mollifier.trip import TripEvaluator

__all__ = [  # noqa: RUF022 - grouped as the data flows
    # the whole
    "Mollifier",
    "Settings",
    "MollifierError",
    # trigger
    "TriggerService",
    "Snapshot",
    # gate
    "Gate",
    "GateInputs",
    "Decision",
    "TripEvaluator",
    # buffer, drainer
    "Buffer",
    "Entry",
    "Drainer",
    # engine
    "RunEngine",
]
