"""Durations and moments as callers write them: `1h30m`, `2d`, `2030-01-31T12:00:00Z`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

DURATION_MAX = timedelta(days=3650)
"""No duration is longer, so that adding one to a moment of this millennium cannot overflow."""

YEARS = (1970, 2999)
"""Moments lie in these years (UTC), first and last included."""

DURATION_FORMS = (
    "a duration such as 30s, 10m, 1h30m, 2d or 1w (units w, d, h, m, s in this order, whole numbers, at most 3650 days)"
)
MOMENT_FORMS = (
    "a date such as 2030-01-31 or 2030-01-31T12:00:00Z (ISO 8601, UTC unless it says otherwise, years 1970 to 2999)"
)

_DURATION = re.compile(r"(?=[0-9])(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)
_MOMENT = re.compile(
    r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d{1,9})?)?(?:Z|[+-]\d{2}(?::?\d{2})?)?)?", re.ASCII
)
_UNITS = (("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
_LONGEST = 64


def parse_duration(text: str) -> timedelta:
    """Return the duration, of whole seconds. Raises ValueError, whose message shows the accepted forms."""
    found = _DURATION.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise ValueError(f"expected {DURATION_FORMS}")
    seconds = sum(int(count) * unit for count, (_, unit) in zip(found.groups("0"), _UNITS, strict=True))
    if seconds > DURATION_MAX.total_seconds():
        raise ValueError(f"is too long; expected {DURATION_FORMS}")
    return timedelta(seconds=seconds)


def format_duration(seconds: int) -> str:
    """Return what `parse_duration` reads back: the largest units first, `0s` for none."""
    text = ""
    rest = seconds
    for name, unit in _UNITS:
        count, rest = divmod(rest, unit)
        text += f"{count}{name}" if count else ""
    return text or "0s"


def parse_moment(text: str) -> datetime:
    """Return the moment in UTC; one without a time zone is in UTC. Raises ValueError, whose message shows the accepted forms."""
    if _MOMENT.fullmatch(text):
        try:
            moment = datetime.fromisoformat(text)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        else:
            if YEARS[0] <= moment.year <= YEARS[1]:
                return moment
    raise ValueError(f"expected {MOMENT_FORMS}")
