"""A keyspace in memory: strings, hashes and sorted sets with lifetimes, and the commands that Mollifier sends outside its scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from redis.exceptions import ResponseError

from mollifier.server import Command

Fields = dict[str, bytes]
Members = dict[str, float]


class Store:
    """Typed values by key. `ends_ms` has the last millisecond of each key's life; a key that is not in it lives for ever.

    The clock is `now_us`, microseconds since the epoch; whoever moves it calls `expire`.
    """

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us
        self.strings: dict[str, bytes] = {}
        self.hashes: dict[str, Fields] = {}
        self.sets: dict[str, Members] = {}
        self.ends_ms: dict[str, int] = {}
        self.on_publish: Callable[[str], None] = _nobody_listens
        self._commands: Mapping[str, Callable[..., Any]] = {
            "EXISTS": lambda *keys: sum(map(self.exists, keys)),
            "GET": self.strings.get,
            "HGET": self._hget,
            "HGETALL": self._hgetall,
            "HMGET": self._hmget,
            "HRANDFIELD": self._hrandfield,
            "HSTRLEN": self._hstrlen,
            "PING": lambda: True,
            "SET": self._set,
            "TIME": lambda: [b"%d" % (self.now_us // 1_000_000), b"%d" % (self.now_us % 1_000_000)],
            "ZCARD": self._zcard,
            "ZMSCORE": self._zmscore,
            "ZRANGE": self._zrange,
        }

    @property
    def now_ms(self) -> int:
        return self.now_us // 1000

    def run(self, command: Command) -> Any:
        """Run one plain command and return its raw reply; one that the model does not know is an error, as on a server."""
        verb, *args = command
        run = self._commands.get(str(verb))
        if run is None:
            return ResponseError(f"the model has no command {verb!r}; teach it to {type(self).__name__}")
        return run(*args)

    def expire(self) -> None:
        """Take out every key whose life is over."""
        now_ms = self.now_ms
        for key in [key for key, end_ms in self.ends_ms.items() if end_ms < now_ms]:
            self.delete(key)

    def exists(self, key: str) -> int:
        return int(key in self.hashes or key in self.sets or key in self.strings)

    def delete(self, key: str) -> None:
        for values in (self.strings, self.hashes, self.sets):
            values.pop(key, None)
        self.ends_ms.pop(key, None)

    # --- what scripts write ----------------------------------------------------------------------------------------

    def put(self, key: str, value: bytes, end_ms: int | None = None) -> None:
        """Set a string, to live until the given moment; when that has come already, the key is gone."""
        self.delete(key)
        if end_ms is None or end_ms > self.now_ms:
            self.strings[key] = value
            self.live(key, end_ms)

    def live(self, key: str, end_ms: int | None) -> None:
        if end_ms is None:
            self.ends_ms.pop(key, None)
        else:
            self.ends_ms[key] = end_ms

    def add(self, key: str, member: str, score: float, end_ms: int | None) -> None:
        """Add a member to a set, which lives at least as long as what the member names (None: for ever)."""
        if key not in self.sets:
            self.sets[key] = {}
            self.live(key, end_ms)
        elif end_ms is None:
            self.ends_ms.pop(key, None)
        elif key in self.ends_ms:
            self.ends_ms[key] = max(self.ends_ms[key], end_ms)
        self.sets[key][member] = score

    def remove(self, key: str, *members: str) -> None:
        """Take members out of a set; an empty set is no key."""
        held = self.sets.get(key)
        if held is None:
            return
        for member in members:
            held.pop(member, None)
        if not held:
            self.delete(key)

    def increment(self, key: str) -> int:
        number = int(self.strings.get(key, b"0")) + 1
        self.strings[key] = b"%d" % number
        return number

    def ordered(self, key: str) -> list[str]:
        """The members of a set by score, and by name where scores are equal."""
        held = self.sets.get(key)
        return sorted(held, key=lambda member: (held[member], member.encode())) if held else []

    # --- commands --------------------------------------------------------------------------------------------------

    def _hget(self, key: str, field: str) -> Any:
        return self.hashes.get(key, {}).get(field)

    def _hmget(self, key: str, *fields: str) -> Any:
        return [self._hget(key, field) for field in fields]

    def _hrandfield(self, key: str, number: int, _with_values: str) -> Any:
        """Any fields will do: the first ones."""
        return [
            part for name, value in list(self.hashes.get(key, {}).items())[:number] for part in (name.encode(), value)
        ]

    def _zcard(self, key: str) -> int:
        return len(self.sets.get(key, {}))

    def _hstrlen(self, key: str, field: str) -> Any:
        return len(self._hget(key, field) or b"")

    def _zmscore(self, key: str, *members: str) -> Any:
        return [self.sets.get(key, {}).get(member) for member in members]

    def _hgetall(self, key: str) -> Any:
        if key in self.strings or key in self.sets:
            return ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return {name.encode(): value for name, value in self.hashes.get(key, {}).items()}

    def _set(self, key: str, value: Any, *options: Any) -> Any:
        if options == ("NX",):
            if key in self.strings:
                return None
        elif options:
            return ResponseError(f"the model sets no key with {options}")
        self.put(key, str(value).encode())
        return True

    def _zrange(self, key: str, start: Any, stop: Any, *options: Any) -> Any:
        members = self.ordered(key)
        if "BYSCORE" not in options:
            stop = len(members) if stop == -1 else stop + 1
            return [member.encode() for member in members[start:stop]]
        scores = self.sets.get(key, {})
        if "REV" in options:
            members.reverse()
            start, stop = stop, start
        chosen = [member for member in members if _is_within(scores[member], start, stop)]
        if "LIMIT" in options:
            offset, count = options[options.index("LIMIT") + 1 :][:2]
            chosen = chosen[offset : offset + count]
        if "WITHSCORES" in options:
            return [part for member in chosen for part in (member.encode(), b"%d" % scores[member])]
        return [member.encode() for member in chosen]


def _is_within(score: float, start: Any, stop: Any) -> bool:
    """Return whether the score lies between two bounds; one that begins with a parenthesis is left out itself."""
    after = score > float(start[1:]) if str(start).startswith("(") else score >= float(start)
    before = score < float(stop[1:]) if str(stop).startswith("(") else score <= float(stop)
    return after and before


def _nobody_listens(channel: str) -> None:
    """Publish to nobody."""
