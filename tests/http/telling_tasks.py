"""A task that tells what it was given, in the error that it raises."""

from __future__ import annotations


def tell(payload: object) -> None:
    """Fail, saying with what."""
    raise ValueError(f"cannot work with {payload!r}")
