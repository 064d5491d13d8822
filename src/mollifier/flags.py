"""2. Feature flags: the organization's own override wins over the global row, which wins over the default (off).

Resolving is in memory: the override came with the authenticated environment, the global rows are refreshed in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mollifier.model import GateInputs

ORG_FLAG = "mollifierEnabled"


class FlagResolver:
    """Answers whether the organization of a trigger is enrolled.

    `global_flags` returns the global rows as last read (name -> JSON value).
    """

    def __init__(
        self, global_flags: Callable[[], Mapping[str, Any]], flag: str = ORG_FLAG, *, default: bool = False
    ) -> None:
        self._global_flags = global_flags
        self._flag = flag
        self._default = default

    def __call__(self, inputs: GateInputs) -> bool:
        """Return the flag for the trigger's organization; a value that is no boolean counts as absent."""
        own = _boolean(inputs.org_flags, self._flag)
        if own is not None:
            return own
        shared = _boolean(self._global_flags(), self._flag)
        return self._default if shared is None else shared


def _boolean(flags: Any, name: str) -> bool | None:
    if not isinstance(flags, Mapping):
        return None
    value: Any = flags.get(name)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return value if isinstance(value, bool) else None
