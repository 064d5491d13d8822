"""The tasks of `mollifier dev`, the demo and `replay --embedded`. They are ordinary tasks, as one's own would be."""

from __future__ import annotations

import asyncio
from typing import Any


def echo(payload: Any) -> Any:
    """Return the payload."""
    return payload


async def sleep(payload: Any) -> dict[str, float]:
    """Sleep for as many seconds as the payload says: a number, or an object with `seconds`. Raises ValueError for anything else."""
    asked: Any = payload.get("seconds") if isinstance(payload, dict) else payload  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked < float("inf"):
        raise ValueError('send how many seconds to sleep: {"payload": 1.5} or {"payload": {"seconds": 1.5}}')
    await asyncio.sleep(asked)
    return {"slept_s": float(asked)}
