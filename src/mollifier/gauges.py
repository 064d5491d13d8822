"""The last sweep as gauges. One process of all sweeps; the others show zeros, so a sum or a maximum over all of them is the buffer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from mollifier.sweeps import INDEXES, MISMATCHES, SweepReport

_NOTHING = SweepReport(at_ms=0)
_GAUGES: Mapping[str, tuple[str, str]] = {
    "stale": ("", "Entries that were due, and leases that were over, for longer than drainers at work let them"),
    "oldest": ("ms", "Age of the oldest entry that is due"),
    "held.entries": ("", "Held entries in all"),
    "held.size": ("By", "Bytes that held entries take in all"),
    "dead_letters": ("", "Dead letters that are kept"),
    "orphans": ("", "Runs that were named while their entry was gone, by where"),
    "mismatches": ("", "What did not fit together, by kind"),
}
"""Unit and description of each."""


class SweepGauges:
    """Shows `report`, and zeros while there is none: a series that was shown once falls back, it does not vanish."""

    def __init__(self, meter: Meter) -> None:
        self.report: SweepReport | None = None
        for name, (unit, description) in _GAUGES.items():
            callback = partial(self._observe, name)
            meter.create_observable_gauge(f"mollifier.sweep.{name}", [callback], unit, description)

    def _observe(self, name: str, _options: CallbackOptions) -> Sequence[Observation]:
        return _observations(self.report or _NOTHING)[name]


def _observations(report: SweepReport) -> Mapping[str, Sequence[Observation]]:
    return {
        "stale": [Observation(report.stale)],
        "oldest": [Observation(report.oldest_ms)],
        "held.entries": [Observation(report.entries)],
        "held.size": [Observation(report.held_bytes)],
        "dead_letters": [Observation(report.dead_letters)],
        "orphans": [Observation(report.orphans.get(index, 0), {"index": index}) for index in INDEXES],
        "mismatches": [Observation(report.mismatches.get(kind, 0), {"kind": kind}) for kind in MISMATCHES],
    }
