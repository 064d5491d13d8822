"""What was found out, as plain data: the checks see nothing else. None stands for what a server does not tell."""

from __future__ import annotations

import ipaddress
from typing import Literal

import msgspec

from mollifier.caps import Usage
from mollifier.inspection import Counts
from mollifier.settings import Settings
from mollifier.sweeps import SweepReport

Reach = Literal["local", "private", "public"]

_PRIVATE_SUFFIXES = (".internal", ".local", ".lan", ".localdomain")


class Address(msgspec.Struct, frozen=True):
    """How a server is reached."""

    reach: Reach
    encrypted: bool
    password: bool


class Unreachable(msgspec.Struct, frozen=True):
    """A server that was asked and gave no answer, or none that could be used."""

    reason: str


class Replica(msgspec.Struct, frozen=True):
    """One replica of the buffer's server, as that one sees it; `lag_s` is how long it has not been heard of."""

    name: str
    online: bool
    lag_s: int | None


class Sample(msgspec.Struct, frozen=True):
    """Keys drawn at random, how many of them are not Mollifier's, and what those begin with."""

    drawn: int
    foreign: int
    prefixes: tuple[str, ...] = ()


class BufferFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The buffer's server.

    `refused` is why a script may not run, `unconfirming` why no accept can be confirmed. `partitions` is 0 where no buffer was made yet.
    `sweep` is what the last sweep found, if there was one within a week, and `swept_ago_ms` how long ago it ended, both by the server's
    clock. `ahead_ms` is its clock minus this host's, give or take `margin_ms`.
    """

    address: Address
    product: Literal["valkey", "redis"] = "valkey"
    version: tuple[int, ...] | None = None
    cluster: bool | None = None

    # What survives
    aof: bool | None = None
    appendfsync: str | None = None
    snapshots: str | None = None
    write_failure: str | None = None
    is_replica: bool | None = None
    replicas: tuple[Replica, ...] | None = None

    # What fits
    policy: str | None = None
    evicted_keys: int | None = None
    max_memory_bytes: int | None = None
    used_memory_bytes: int | None = None
    system_memory_bytes: int | None = None
    clients: int | None = None
    max_clients: int | None = None

    # What is in it
    refused: str | None = None
    unconfirming: str | None = None
    partitions: int | None = None
    keys: int | None = None
    other_databases: tuple[str, ...] = ()
    sample: Sample | None = None
    counts: Counts | None = None
    usage: Usage | None = None
    sweep: SweepReport | None = None
    swept_ago_ms: int | None = None

    # Who is there
    drainers: int | None = None
    ahead_ms: int | None = None
    margin_ms: int = 0


class DatabaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Postgres. `pending` are migrations to be applied; `schema_fault` is why they cannot be told. `ahead_ms` as above."""

    address: Address
    version: int
    fsync: bool
    full_page_writes: bool
    synchronous_commit: str
    read_only: bool
    max_connections: int
    reserved_connections: int
    connections: int
    ahead_ms: int
    margin_ms: int = 0
    pending: tuple[str, ...] = ()
    schema_fault: str | None = None
    workers: int | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the checks may look at. `buffer` and `database` are None where they were not asked.

    `starting` says that a worker with these settings is about to start in this process: it counts as one that works and drains.
    """

    settings: Settings
    buffer: BufferFacts | Unreachable | None = None
    database: DatabaseFacts | Unreachable | None = None
    starting: bool = False


def reach(host: str) -> Reach:
    """Tell from a host's name how far away it may be: this machine, a private network, or anywhere.

    A name without a dot, as containers have, and those that only private networks resolve count as private.
    """
    host = host.strip("[]").rstrip(".").lower()
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return "local"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "private" if "." not in host or host.endswith(_PRIVATE_SUFFIXES) else "public"
    return "local" if address.is_loopback else "private" if address.is_private else "public"
