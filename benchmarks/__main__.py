"""Runs the benchmarks: `make bench`, `make bench ARGS="--json memory"`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import uvloop

from benchmarks import confirming, diverting, draining, idle, memory, off, outage, quiet, sweeping
from benchmarks.report import Report, show
from mollifier.embedded import EmbeddedStack, EmbeddedUnavailable

BENCHMARKS: dict[str, Callable[[str, float], Coroutine[Any, Any, Report]]] = {
    "off": off.measure,
    "quiet": quiet.measure,
    "memory": memory.measure,
    "idle": idle.measure,
    "diverting": diverting.measure,
    "draining": draining.measure,
    "confirming": confirming.measure,
    "sweeping": sweeping.measure,
    "outage": outage.measure,
}


def main() -> int:
    """Run the benchmarks that are named, or all of them, each on a server of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what Mollifier costs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--scale", type=float, default=1.0, help="do this much of the work (0.1 for a quick look)")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    reports: list[Report] = []
    try:
        for name in given.names or BENCHMARKS:
            with (
                EmbeddedStack(postgres=False, durable=False) as stack,
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                reports.append(runner.run(BENCHMARKS[name](stack.redis_url, given.scale)))
            if not given.json:
                show(reports[-1])
    except EmbeddedUnavailable as missing:
        print(missing, file=sys.stderr)
        return 1
    if given.json:
        print(msgspec.json.encode({report.benchmark: figures_of(report) for report in reports}).decode())
    return 0


def figures_of(report: Report) -> dict[str, float]:
    """Return the figures of a report by name."""
    return {figure.name: figure.value for figure in report.figures}


if __name__ == "__main__":
    sys.exit(main())
