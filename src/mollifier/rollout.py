"""The steps of the rollout as the embedded commands take them: which flag and which settings make a step."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Mode(StrEnum):
    """A step of the rollout: off, watched (shadow), written to both stores (monitor), held (divert)."""

    OFF = "off"
    SHADOW = "shadow"
    MONITOR = "monitor"
    DIVERT = "divert"

    @property
    def enrolls(self) -> bool:
        """Whether the organization's flag is on."""
        return self in (Mode.MONITOR, Mode.DIVERT)

    @property
    def settings(self) -> dict[str, bool]:
        """The fields of `Settings` that make this step."""
        return {
            "enabled": self is not Mode.OFF,
            "shadow_mode": self is Mode.SHADOW,
            "divert": self is Mode.DIVERT,
        }

    def under(self, settings: Mapping[str, bool]) -> Mode:
        """Return the step that an organization of this one is at where these fields overrule its own."""
        fields = {**self.settings, **settings}
        if not fields["enabled"]:
            return Mode.OFF
        if self.enrolls:
            return Mode.DIVERT if fields["divert"] else Mode.MONITOR
        return Mode.SHADOW
