"""What was promised of runs, and whether it was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from tests.crash.ground import Ground


@dataclass
class Promise:
    """What must become of the run that one call asked for.

    `answers` are the ids that the caller was told, `counted` how often at least and at most its metadata was incremented. One that
    `is_dead` becomes no run: it stays in the buffer as a dead letter, or was deleted as one.
    """

    answers: set[str] = field(default_factory=set[str])
    status: str = "COMPLETED"
    tags: set[str] = field(default_factory=set[str])
    counted: tuple[int, int] = (0, 0)
    delayed_until: datetime | None = None
    is_dead: bool = False


class Book:
    """The promises made to one caller, by the marker that each of its calls bears as a tag and in its payload."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.promises: dict[str, Promise] = {}
        self.complaints: list[str] = []

    def marker(self, mark: str) -> str:
        """Return what nobody else's call bears."""
        return f"{self.name}-{mark}"

    def of(self, mark: str) -> Promise:
        """Return what is promised to the call with this mark."""
        return self.promises.setdefault(self.marker(mark), Promise())

    def broken(self, found: Mapping[str, Sequence[Mapping[str, Any]]], executed: Counter[str]) -> list[str]:
        """Return what is wrong with the runs that there are, by marker, once everything has been drained and executed."""
        broken = list(self.complaints)
        for marker, promise in self.promises.items():
            runs = found[marker]
            if [run["id"] for run in runs] != sorted(() if promise.is_dead else promise.answers):
                broken.append(f"{marker}: answered {promise.answers}, there are {[run['id'] for run in runs]}")
                continue
            for run in runs:
                seen, right = _seen(run, promise, executed), _right(marker, promise)
                counted = msgspec.json.decode(run["metadata"] or b"{}").get("n", 0)
                if seen != right or not promise.counted[0] <= counted <= promise.counted[1]:
                    broken.append(f"{marker}: promised {right}, counted {promise.counted}; there is {seen}, {counted}")
        return broken


def _seen(run: Mapping[str, Any], promise: Promise, executed: Counter[str]) -> Mapping[str, Any]:
    return {
        "payload": msgspec.json.decode(run["payload"])["marker"],
        "status": run["status"],
        "executions": executed[run["id"]],
        "missing tags": promise.tags - {*run["tags"]},
        "delayed until": run["delayed_until"] if promise.delayed_until is not None else None,
    }


def _right(marker: str, promise: Promise) -> Mapping[str, Any]:
    return {
        "payload": marker,
        "status": promise.status,
        "executions": int(promise.status == "COMPLETED"),
        "missing tags": set[str](),
        "delayed until": promise.delayed_until,
    }


async def all_kept(ground: Ground, books: Iterable[Book]) -> bool:
    """Return whether every promise in these books was kept; raise an AssertionError that tells which were not."""
    read = tuple(books)
    found = await ground.runs_tagged([marker for book in read for marker in book.promises])
    executed = ground.executed()
    broken = [complaint for book in read for complaint in book.broken(found, executed)]
    if broken:
        raise AssertionError("\n".join(broken))
    return True
