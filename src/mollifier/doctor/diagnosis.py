"""From servers to findings: facts first, all at once, then every check over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from mollifier.doctor.buffer_checks import BUFFER_CHECKS
from mollifier.doctor.buffer_facts import buffer_facts
from mollifier.doctor.database_checks import DATABASE_CHECKS
from mollifier.doctor.database_facts import database_facts
from mollifier.doctor.facts import BufferFacts, DatabaseFacts, Facts, Unreachable
from mollifier.doctor.findings import Finding, Judgement, critical
from mollifier.doctor.system_checks import SYSTEM_CHECKS
from mollifier.errors import MollifierError
from mollifier.postgres.database import Database
from mollifier.server import Server
from mollifier.settings import Settings, variable

DEADLINE_S = 10.0

T = TypeVar("T")


async def diagnose(
    settings: Settings,
    *,
    server: Server | None,
    database: Database | None,
    starting: bool = False,
    deadline_s: float = DEADLINE_S,
    clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """Look at the servers that are given and at the settings, and return one finding per check, those that are fine included.

    Whatever a server does within `deadline_s` is a finding; nothing is raised for it. `starting` tells that a worker with these
    settings starts in this process. `clock` returns seconds since the epoch.
    """
    buffer, postgres = await asyncio.gather(
        _asked(server and buffer_facts(server, settings.redis_url or "", clock, settings.confirmation), deadline_s),
        _asked(database and database_facts(database, clock), deadline_s),
    )
    return examine(Facts(settings=settings, buffer=buffer, database=postgres, starting=starting))


def examine(facts: Facts) -> list[Finding]:
    """Judge the facts: the system's findings, then the buffer's, then the database's."""
    found = [_finding("system", check.__name__, check(facts)) for check in SYSTEM_CHECKS]
    match facts.buffer:
        case BufferFacts() as buffer:
            found += [_finding("buffer", check.__name__, check(buffer, facts.settings)) for check in BUFFER_CHECKS]
        case Unreachable(reason):
            found.append(_unreachable("buffer", reason, variable("redis_url"), "triggers pass, in every burst"))
        case None:
            pass
    match facts.database:
        case DatabaseFacts() as database:
            found += [
                _finding("database", check.__name__, check(database, facts.settings)) for check in DATABASE_CHECKS
            ]
        case Unreachable(reason):
            found.append(
                _unreachable("database", reason, variable("database_url"), "no run can be created or executed")
            )
        case None:
            pass
    return found


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Order findings for a reader: the worst first, otherwise as they came."""
    return sorted(findings, key=lambda finding: -finding.severity.rank)


async def _asked(question: Awaitable[T] | None, deadline_s: float) -> T | Unreachable | None:
    if question is None:
        return None
    try:
        async with asyncio.timeout(deadline_s):
            return await question
    except TimeoutError:
        return Unreachable(f"no answer within {deadline_s:g} s")
    except MollifierError as error:
        return Unreachable(str(error))


def _unreachable(part: str, reason: str, name: str, why: str) -> Finding:
    fix = f"see whether it runs, and whether {name} names it with a user that may log in"
    return _finding(part, "reachable", critical(f"cannot be asked: {reason}", why, fix))


def _finding(part: str, check: str, judged: Judgement) -> Finding:
    return Finding(check=f"{part}.{check}", severity=judged.severity, what=judged.what, why=judged.why, fix=judged.fix)
