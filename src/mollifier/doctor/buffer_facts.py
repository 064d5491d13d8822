"""Asking the buffer's server about itself. Nothing is changed there, and nothing enumerated: no KEYS, no SCAN.

Whose keys are on it is told by drawing some at random, in the same round trip: of 256 drawn, one is foreign with a probability of
92 % where every hundredth key is.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

import msgspec
from redis.exceptions import RedisError

from mollifier import inspection
from mollifier.doctor.facts import Address, BufferFacts, Replica, Sample, reach
from mollifier.errors import BufferUnavailableError
from mollifier.keys import PARTITIONS, ROOT, SWEEPER_REPORT, WAKE, Keyspace
from mollifier.server import Command, Server
from mollifier.settings import Confirmation
from mollifier.sweeps import from_fields

T = TypeVar("T")

_DRAWN = 256
_PREFIXES = 3
_ASKED: tuple[tuple[str | int, ...], ...] = (
    ("INFO",),
    ("CONFIG", "GET", "appendfsync"),
    ("CONFIG", "GET", "save"),
    ("GET", PARTITIONS),
    ("DBSIZE",),
    ("PUBSUB", "NUMSUB", WAKE),
    ("HGETALL", SWEEPER_REPORT),
    # What every operation is made of: a script, on a key of ours.
    ("EVAL", "return redis.call('EXISTS', KEYS[1])", 1, PARTITIONS),
)


async def buffer_facts(
    server: Server, redis_url: str, clock: Callable[[], float], confirmation: Confirmation
) -> BufferFacts:
    """Ask the server. `clock` returns seconds since the epoch; `confirmation` is what accepts will be confirmed by.

    Raises BufferUnavailableError when it does not answer at all.
    """
    before_ms = clock() * 1000
    now_ms = await server.now_ms()
    after_ms = clock() * 1000
    info, fsync, snapshots, partitions, keys, listening, swept, script, confirmed, *drawn = await server.run_many(
        [*_ASKED, _waiting_for_nobody(confirmation), *[("RANDOMKEY",)] * _DRAWN]
    )
    facts = _told(_mapping(info), address_of(redis_url))
    recorded = None if isinstance(partitions, RedisError) else int(partitions or 0)
    sweep = from_fields(swept)
    return msgspec.structs.replace(
        facts,
        appendfsync=_configured(fsync),
        snapshots=_configured(snapshots),
        refused=str(script) if isinstance(script, RedisError) else None,
        unconfirming=str(confirmed) if isinstance(confirmed, RedisError) else None,
        partitions=recorded,
        keys=keys if isinstance(keys, int) else None,
        sample=_sample(drawn),
        counts=await _read(server, recorded, inspection.count),
        usage=await _read(server, recorded, inspection.usage),
        sweep=sweep,
        swept_ago_ms=None if sweep is None else now_ms - sweep.at_ms,
        drainers=None if isinstance(listening, RedisError) else int(listening[1]),
        ahead_ms=round(now_ms - (before_ms + after_ms) / 2),
        margin_ms=round((after_ms - before_ms) / 2) + 1,
    )


def _waiting_for_nobody(confirmation: Confirmation) -> Command:
    """Return the command by which accepts are confirmed, of a kind that is answered at once; where none is asked for, any."""
    if confirmation.aof:
        return ("WAITAOF", 0, 0, 0)
    return ("WAIT", 0, 0) if confirmation.replicas else ("PING",)


def address_of(redis_url: str) -> Address:
    """Read the address out of the URL."""
    parts = urlsplit(redis_url)
    local = parts.scheme == "unix"
    return Address(
        reach="local" if local else reach(parts.hostname or ""),
        encrypted=parts.scheme == "rediss",
        password=bool(parts.password or parse_qs(parts.query).get("password")),
    )


async def _read(server: Server, partitions: int | None, read: Callable[[Server, Keyspace], Awaitable[T]]) -> T | None:
    """Read by the layout that the buffer was made with, whatever the settings say; None where a server refuses."""
    if partitions is None:
        return None
    try:
        return await read(server, Keyspace(partitions))
    except BufferUnavailableError:
        return None


def _told(info: Mapping[str, Any], address: Address) -> BufferFacts:
    """Read what INFO says; a field that it leaves out is not known."""

    def number(name: str) -> int | None:
        value = info.get(name)
        return int(value) if isinstance(value, int | float) else None

    def flag(name: str) -> bool | None:
        value = number(name)
        return None if value is None else value != 0

    is_valkey = "valkey_version" in info or info.get("server_name") == "valkey"
    return BufferFacts(
        address=address,
        product="valkey" if is_valkey else "redis",
        version=_version(info.get("valkey_version") or info.get("redis_version")),
        cluster=flag("cluster_enabled"),
        aof=flag("aof_enabled"),
        write_failure=_write_failure(info),
        is_replica=info["role"] != "master" if "role" in info else None,
        replicas=_replicas(info) if "connected_slaves" in info else None,
        policy=info.get("maxmemory_policy"),
        evicted_keys=number("evicted_keys"),
        max_memory_bytes=number("maxmemory"),
        used_memory_bytes=number("used_memory"),
        system_memory_bytes=number("total_system_memory"),
        clients=number("connected_clients"),
        max_clients=number("maxclients"),
        other_databases=tuple(name for name in sorted(info) if re.fullmatch(r"db[1-9]\d*", name)),
    )


def _version(text: object) -> tuple[int, ...] | None:
    found = re.match(r"\d+(?:\.\d+)*", str(text or ""))
    return tuple(int(part) for part in found[0].split(".")) if found else None


def _write_failure(info: Mapping[str, Any]) -> str | None:
    failures = {
        "aof_last_write_status": "the last write to the append-only file failed",
        "aof_last_bgrewrite_status": "the last rewrite of the append-only file failed",
        "rdb_last_bgsave_status": "the last snapshot failed",
    }
    return next((what for name, what in failures.items() if info.get(name, "ok") != "ok"), None)


def _replicas(info: Mapping[str, Any]) -> tuple[Replica, ...]:
    found = [_mapping(info[name]) for name in sorted(info) if re.fullmatch(r"slave\d+", name)]
    return tuple(
        Replica(
            name=f"{each.get('ip')}:{each.get('port')}",
            online=each.get("state") == "online",
            lag_s=each["lag"] if isinstance(each.get("lag"), int) else None,
        )
        for each in found
    )


def _configured(reply: Any) -> str | None:
    """Return the value that CONFIG GET answers; None where it is refused, or knows no such parameter."""
    values = list(_mapping(reply).values())
    return _text(values[0]) if values else None


def _sample(drawn: list[Any]) -> Sample | None:
    keys = [_text(key) for key in drawn if isinstance(key, bytes | str)]
    if not keys and any(isinstance(reply, RedisError) for reply in drawn):
        return None
    foreign = [key for key in keys if not key.startswith(f"{ROOT}:")]
    # Only what stands before a colon is named: the rest of a key of somebody else's may be a secret.
    prefixes = sorted({key.partition(":")[0][:40] for key in foreign if ":" in key})
    return Sample(drawn=len(keys), foreign=len(foreign), prefixes=tuple(prefixes[:_PREFIXES]))


def _mapping(reply: Any) -> Mapping[Any, Any]:
    return cast("Mapping[Any, Any]", reply) if isinstance(reply, dict) else {}


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
