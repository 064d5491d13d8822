"""What every part of the buffer stands on: one server, its scripts, its keys, the settings as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from redis.exceptions import RedisError

from mollifier.confirmation import ConfirmedScripts
from mollifier.errors import BufferRefusedError, BufferUnavailableError
from mollifier.keys import Keyspace, is_request_digest
from mollifier.scripts import Scripts
from mollifier.server import Server
from mollifier.settings import Settings

T = TypeVar("T")


class Part:
    """One part of a buffer on one server."""

    def __init__(self, server: Server, settings: Callable[[], Settings]) -> None:
        self._server = server
        self._settings = settings
        self._scripts = Scripts(server)
        self._confirmed = ConfirmedScripts(server.redis, settings)
        self.keyspace = Keyspace(settings().partitions)


def freed_by_failure(digests: Sequence[str]) -> list[str]:
    """Return those of an entry's bindings that end when the entry is given up."""
    return [digest for digest in digests if not is_request_digest(digest)]


def one(results: list[T | BufferUnavailableError]) -> T:
    """Return the one result of a batch of one; raise it when it is a failure."""
    (result,) = results
    if isinstance(result, BufferUnavailableError):
        raise result
    return result


def members_of(reply: Any) -> list[Any]:
    """Return what a sorted set was read to hold. Raises BufferUnavailableError where the server refused to read it."""
    if isinstance(reply, RedisError):
        raise BufferRefusedError(f"ZRANGE: {reply}")
    return reply


def scored(members: list[Any]) -> Iterator[tuple[int, str]]:
    """Return (score, run id) of a reply with scores: pairs in RESP3, a flat list in RESP2."""
    pairs = members if members and isinstance(members[0], list) else zip(members[::2], members[1::2], strict=True)
    return ((int(float(score)), run_id.decode()) for run_id, score in pairs)
