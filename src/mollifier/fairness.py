"""4. Fair draining: whom to serve next, and how much of each. Pure code: no I/O, no clock.

The problem. One tenant's queue is ten thousand deep, another's holds one entry. Served in order of arrival, or a whole batch at a
time, the light one waits for the heavy one. Served by environments, an organization gets more by having more of them.

What is done here. Two levels rotate: organizations, and within each its environments; a tick serves one environment per
organization. Rotating in fixed slices (first 500, next 500, ...) would keep everybody's place within a slice, so the head of a
slice would always go first; here the start moves on by one participant each tick, so every participant reaches every position.
The cursor is the *name* that came first last time, not an index, so that joining and leaving shift nobody's turn. The free
capacity of a tick is dealt one by one around the rotation, at most a batch each: nobody gets a second entry before everybody
has got a first.

    tick 1:  A B C D      tick 2:  B C D A      tick 3:  C D A B

A single entry waits at most for one tick per organization ahead of it, however deep their queues are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from mollifier.buffer import Ready


class Rotation:
    """Remembers who came first, per level; forgets organizations that have nothing due."""

    def __init__(self) -> None:
        self._first_org = ""
        self._served_env: dict[str, str] = {}

    def plan(
        self, ready: Mapping[str, Sequence[str]], *, capacity: int, batch_size: int, max_orgs: int
    ) -> list[tuple[Ready, int]]:
        """Deal `capacity` entries over the environments that are ready (environment ids by organization id).

        Returns the environments to serve in order, one per organization, each with its share (1 to `batch_size`); the organizations
        are the first `max_orgs` of the rotation. Calling it is one tick: the rotation moves on.
        """
        organizations = _rotated(sorted(org for org, envs in ready.items() if envs), self._first_org)
        if not organizations or capacity <= 0:
            return []
        self._first_org = organizations[0]
        turn = organizations[: min(max_orgs, capacity)]
        served = {org: _rotated(sorted(ready[org]), self._served_env.get(org, ""))[0] for org in turn}
        self._served_env = {org: env for org, env in self._served_env.items() if org in ready} | served
        shares = deal(len(turn), capacity, batch_size)
        return [(Ready(org, served[org]), share) for org, share in zip(turn, shares, strict=True)]


def deal(participants: int, capacity: int, most: int) -> list[int]:
    """Deal `capacity` one by one around the participants, at most `most` each; the first ones get what does not divide."""
    share, rest = divmod(min(capacity, participants * most), participants)
    return [share + (position < rest) for position in range(participants)]


def _rotated(names: list[str], last_first: str) -> list[str]:
    """Return the sorted names, beginning with the one after `last_first` and wrapping around."""
    start = bisect_right(names, last_first) % len(names) if names else 0
    return names[start:] + names[:start]
