"""Waiting longer after each failure."""

from __future__ import annotations


class Backoff:
    """Doubles from `floor_ms` to `cap_ms` with each failure in a row; a success starts it anew."""

    def __init__(self, floor_ms: int = 100, cap_ms: int = 5_000) -> None:
        self._floor_ms = floor_ms
        self._cap_ms = cap_ms
        self._next_ms = floor_ms

    def next_ms(self) -> int:
        """Return how long to pause after this failure, milliseconds."""
        pause_ms = self._next_ms
        self._next_ms = min(self._cap_ms, pause_ms * 2)
        return pause_ms

    def reset(self) -> None:
        """Forget the failures so far."""
        self._next_ms = self._floor_ms
