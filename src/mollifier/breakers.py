"""The breakers in front of the buffer's server, one for each kind of patience with it.

All of them have the same server behind them, yet one breaker would not do. The gate has 25 ms for a question of a few bytes, a write of three
megabytes has ten times as long, and a read may take longer still: a server that is too slow for the gate may be quick enough for a
read, and a write that is too slow may be too large. So each kind counts its own failures:

- `server` is what the gate and the limits of API keys ask through. It is the measure of the server: a trigger is held only where the
  gate has just been answered, so while this one is open triggers pay nothing.
- `claims` stands behind it: a claim would wait longer for the same server, and a trigger pays nothing only if nobody waits.
- `accepts` counts writes alone. That they fail, be it for their size or for want of a confirmation, blinds no gate. They are no longer
  tried then, but for one now and then, which finds out: nothing else could.
- `reads` is for those who read and change held runs. They need an answer, so they are given more time before they get a 503.

Wherever a small question can tell, PINGs within the asker's own deadline find out whether the server answers again, beside the triggers:
none of them waits for that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from mollifier.backoff import Backoff
from mollifier.buffer import Buffer
from mollifier.circuit import Circuit
from mollifier.deadline import PAUSES_MS, Breaker, within
from mollifier.settings import Settings
from mollifier.telemetry import Telemetry

_WRITE_PAUSES_MS = (200, 5_000)
"""A write that finds out makes its trigger wait."""
_PINGS = 5
"""All of them have to be answered in time: in a busy process, whose deadlines last longer, one may be by chance."""
_READ_DEADLINES = 4


class Breakers:
    """The breakers of one process in front of one buffer's server, which is None where none is configured.

    `monotonic` returns seconds, `jitter` a number in [0, 1).
    """

    def __init__(
        self,
        buffer: Buffer | None,
        settings: Callable[[], Settings],
        telemetry: Telemetry,
        *,
        monotonic: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self._buffer = buffer
        self._telemetry = telemetry
        self._monotonic = monotonic
        self._jitter = jitter
        self.server = Breaker(self._circuit("buffer", PAUSES_MS), probe=self._ping(lambda: settings().gate_deadline_ms))
        self.claims = Breaker(
            self._circuit("claim", PAUSES_MS),
            probe=self._ping(lambda: settings().gate_deadline_ms),
            behind=self.server,
        )
        self.accepts = Breaker(self._circuit("accept", _WRITE_PAUSES_MS))
        self.reads = Breaker(self._circuit("read", PAUSES_MS), probe=self._ping(lambda: read_deadline_ms(settings())))

    def close(self) -> None:
        """Have nobody find out any more."""
        for breaker in (self.server, self.claims, self.accepts, self.reads):
            breaker.close()

    def _circuit(self, name: str, pauses_ms: tuple[int, int]) -> Circuit:
        return Circuit(
            Backoff(*pauses_ms),
            monotonic=self._monotonic,
            jitter=self._jitter,
            on_change=partial(self._telemetry.breaker_changed, name),
        )

    def _ping(self, deadline_ms: Callable[[], float]) -> Callable[[], Awaitable[object]]:
        async def ping() -> None:
            if (buffer := self._buffer) is not None:
                for _ in range(_PINGS):
                    await within(deadline_ms(), buffer.ping())

        return ping


def read_deadline_ms(settings: Settings) -> float:
    """Return how long one round trip may take that reads or changes held runs."""
    return _READ_DEADLINES * settings.accept_deadline_ms
