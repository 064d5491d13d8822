"""Checks of Postgres: is what it has committed still there after a crash, is the schema there, and are connections left?"""

from __future__ import annotations

from collections.abc import Callable

from mollifier.doctor.facts import DatabaseFacts
from mollifier.doctor.findings import Judgement, critical, info, ok, warning
from mollifier.postgres.database import POOL_SIZE
from mollifier.postgres.worker import POOL_SIZE as JOBS_POOL_SIZE
from mollifier.settings import Settings, variable

VERSION_FLOOR = 14
NEAR = 0.8
"""The share of the connections at which it is time to act."""
_HANDLERS_PER_CONNECTION = 8
"""Handlers that may take turns on one connection; more wait for each other longer than for the database."""

WORKER_CONNECTIONS = POOL_SIZE + JOBS_POOL_SIZE + 1
"""What one worker process opens at most: its own pool, that of the jobs, and one to listen for jobs."""
API_CONNECTIONS = POOL_SIZE


def durability(facts: DatabaseFacts, settings: Settings) -> Judgement:
    """Is a commit a commit?"""
    off = [name for name, on in (("fsync", facts.fsync), ("full_page_writes", facts.full_page_writes)) if not on]
    if off:
        return critical(
            f"{' and '.join(off)} off",
            "a crash of its machine may leave the database beyond repair",
            "switch it on, and restart Postgres",
        )
    if facts.synchronous_commit == "off":
        worse = critical if settings.divert else warning
        return worse(
            "synchronous_commit is off",
            "a crash takes back commits of the last moments: runs that callers were told of, or that left the buffer",
            "set synchronous_commit to on (or local)",
        )
    return ok(f"fsync on, synchronous_commit {facts.synchronous_commit}")


def writable(facts: DatabaseFacts, _settings: Settings) -> Judgement:
    """Does it take writes?"""
    if facts.read_only:
        return critical(
            "read-only: a standby, or default_transaction_read_only is on",
            "no run can be created",
            f"let {variable('database_url')} name the primary (several hosts and target_session_attrs=read-write follow a failover)",
        )
    return ok("takes writes")


def version(facts: DatabaseFacts, _settings: Settings) -> Judgement:
    """Is it new enough?"""
    if facts.version < VERSION_FLOOR:
        return critical(
            f"PostgreSQL {facts.version}",
            "statements use what it does not have",
            f"use PostgreSQL {VERSION_FLOOR} or later",
        )
    return ok(f"PostgreSQL {facts.version}")


def migrations(facts: DatabaseFacts, _settings: Settings) -> Judgement:
    """Is the schema this release's?"""
    if facts.schema_fault is not None:
        return critical(facts.schema_fault, "statements fail on a schema they do not know", "upgrade this installation")
    if facts.pending:
        return critical(
            f"not applied: {', '.join(facts.pending)}", "triggers fail until they are", "run `mollifier migrate`"
        )
    return ok("the schema is up to date")


def connections(facts: DatabaseFacts, _settings: Settings) -> Judgement:
    """Is there room for the processes that run, and for one more of each?"""
    room = facts.max_connections - facts.reserved_connections
    what = f"{facts.connections} of {room} connections in use"
    each = f"a worker opens up to {WORKER_CONNECTIONS}, an API process up to {API_CONNECTIONS}"
    fix = "raise max_connections, run fewer processes, or put a pooler in session mode between"
    wanted = (facts.workers or 1) * WORKER_CONNECTIONS + API_CONNECTIONS
    if wanted > room:
        return warning(
            f"{what}; {facts.workers or 1} workers and one API process may want {wanted}",
            f"{each}; what is over the limit is refused, and its trigger fails",
            fix,
        )
    if facts.connections > room * NEAR:
        return warning(what, f"{each}; what is over the limit is refused, and its trigger fails", fix)
    return ok(f"{what}; {each}")


def pool(_facts: DatabaseFacts, settings: Settings) -> Judgement:
    """Do the drainer's handlers find connections?"""
    what = (
        f"{variable('drain_concurrency')} is {settings.drain_concurrency}, a worker's pool has {POOL_SIZE} connections"
    )
    if settings.drain_concurrency > POOL_SIZE * _HANDLERS_PER_CONNECTION:
        return warning(
            what,
            "handlers wait for each other's connection, the executing runs with them, and leases run out meanwhile",
            f"set it to {POOL_SIZE * _HANDLERS_PER_CONNECTION} or less, and start more workers",
        )
    return ok(what)


def transport(facts: DatabaseFacts, _settings: Settings) -> Judgement:
    """Can somebody on the way read or change what is recorded?"""
    if facts.address.reach == "local":
        return ok("on this machine")
    if facts.address.encrypted:
        return ok("TLS")
    level = warning if facts.address.reach == "public" else info
    return level(
        f"no TLS on {'a private network' if facts.address.reach == 'private' else 'an address that may be far away'}",
        "whoever is on the way reads and changes customers' payloads",
        f"add sslmode=verify-full to {variable('database_url')}",
    )


DATABASE_CHECKS: tuple[Callable[[DatabaseFacts, Settings], Judgement], ...] = (
    writable,
    version,
    migrations,
    durability,
    connections,
    pool,
    transport,
)
