"""A trace as calls: which environment each arrival goes to, and when it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mollifier.play.client import Call, Marker
from mollifier.play.trace import Arrival, Survey, TraceError, read_trace, survey

ENVIRONMENTS_MAX = 1000
PEAK_WINDOW_MS = 200


@dataclass(frozen=True, kw_only=True)
class Score:
    """A trace and how to play it: at `speed` times its own, over `environments`, or one for each value of `env_column` where that is None."""

    path: Path
    speed: float = 1.0
    environments: int | None = None
    time_column: str | None = None
    env_column: str | None = None
    limit: int | None = None

    def arrivals(self) -> Iterator[Arrival]:
        """Read the trace. Raises TraceError."""
        return read_trace(self.path, time_column=self.time_column, env_column=self.env_column, limit=self.limit)

    def survey(self) -> Survey:
        """Read the whole trace once, so that nothing in it can stop the play halfway. Raises TraceError.

        Its peak is the most calls that will leave within PEAK_WINDOW_MS.
        """
        seen = survey(self.arrivals(), window_ns=max(1, int(PEAK_WINDOW_MS * 1_000_000 * self.speed)))
        if self.environments is None and len(seen.envs) > ENVIRONMENTS_MAX:
            detail = f"column {self.env_column!r} has {len(seen.envs)} values, each an environment: spread them over fewer with --envs"
            raise TraceError(self.path, None, detail)
        return seen

    def environments_of(self, seen: Survey) -> int:
        """Return over how many environments the arrivals are spread."""
        return self.environments or len(seen.envs) or 1

    def calls(self, seen: Survey, marker: Marker) -> Iterator[Call]:
        """Yield the calls. Arrivals take turns among the environments; with a column, each of its values has a fixed one."""
        environments = self.environments_of(seen)
        places = {env: place % environments for place, env in enumerate(seen.envs)}
        for number, arrival in enumerate(self.arrivals()):
            place = number % environments if arrival.env is None else places[arrival.env]
            yield Call(number, arrival.offset_ns / 1e9 / self.speed, place, marker.body(number, arrival.payload))
