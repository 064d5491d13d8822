"""Logging what may happen a thousand times a second: the first at once, then a line a second that says how many more there were."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

EVERY_S = 1.0

Later = Callable[[float, Callable[[], None]], object]
"""Has something called so many seconds later."""


@dataclass
class _Quiet:
    """A while in which one kind of message is only counted, and how it last read."""

    ends_s: float
    more: int
    fields: Mapping[str, Any]


def on_running_loop(delay_s: float, call: Callable[[], None]) -> None:
    """Have it called by the running loop; outside of one, whoever says the next message tells of those before it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    loop.call_later(delay_s, call)


class RepeatedLog:
    """Warns through `log`. Each line's field `times` says for how many it stands, so their sum is the exact number.

    Messages of one kind share a line, which has the fields of the latest. `monotonic` returns seconds, `later` sets a timer.
    """

    def __init__(
        self, log: logging.Logger, *, monotonic: Callable[[], float] = time.monotonic, later: Later = on_running_loop
    ) -> None:
        self._log = log
        self._monotonic = monotonic
        self._later = later
        self._quiet: dict[tuple[str, str], _Quiet] = {}

    def tell(self, event: str, kind: str = "", /, **fields: Any) -> None:
        """Say it now, or count it where the same kind of this event was said within the last second. Kinds have to be few."""
        now_s = self._monotonic()
        quiet = self._quiet.get((event, kind))
        if quiet is not None and now_s < quiet.ends_s:
            quiet.more += 1
            quiet.fields = fields
        else:
            self._say(event, kind, fields, 1 + (quiet.more if quiet else 0), now_s)

    def flush(self) -> None:
        """Tell of what was only counted so far: nothing is to follow."""
        for (event, kind), quiet in list(self._quiet.items()):
            self._tell_of_the_rest(event, kind, quiet)

    def _say(self, event: str, kind: str, fields: Mapping[str, Any], times: int, now_s: float) -> None:
        self._log.warning(event, extra={"fields": {**fields, "times": times}})
        quiet = self._quiet[event, kind] = _Quiet(now_s + EVERY_S, 0, fields)
        self._later(EVERY_S, partial(self._tell_of_the_rest, event, kind, quiet))

    def _tell_of_the_rest(self, event: str, kind: str, quiet: _Quiet) -> None:
        if self._quiet.get((event, kind)) is not quiet:
            # A later message was faster than this timer, and has told of these.
            return
        if quiet.more:
            self._say(event, kind, quiet.fields, quiet.more, self._monotonic())
        else:
            del self._quiet[event, kind]
