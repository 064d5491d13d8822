"""What a benchmark answers, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """One measured number, its unit last in its name, and what is wanted of it where something is."""

    name: str
    value: float
    wanted: str = ""


class Report(msgspec.Struct, frozen=True):
    """The figures of one benchmark."""

    benchmark: str
    question: str
    figures: tuple[Figure, ...]


def percentile(sample: Sequence[float], percent: int) -> float:
    """Return the percentile of a sample (nearest rank)."""
    ordered = sorted(sample)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def median(sample: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(sample)


def show(report: Report) -> None:
    """Print a report for people."""
    print(f"\n{report.benchmark}: {report.question}")
    for figure in report.figures:
        value = (
            f"{figure.value:,.0f}"
            if abs(figure.value) >= 100 or figure.value == int(figure.value)
            else f"{figure.value:.3g}"
        )
        print(f"  {figure.name:<44} {value:>14}  {figure.wanted}".rstrip())
