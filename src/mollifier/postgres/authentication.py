"""Authentication: which environment an API key belongs to.

Answers are kept for two seconds and then asked for anew; for two more the old answer serves while the new one is under way, so
that nobody in a burst waits for the database, however slow it is. Whoever comes with a key that nobody has used for those four waits for
the new answer, for a second at most if there is an old one. A revoked key stops working in four, a rotated one when its overlap has passed.
While the database cannot be reached, or takes more than that second, an answer that it gave in the last hour stands: triggers keep coming in,
and may be buffered, through an outage.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from sqlalchemy import ARRAY, Double, Text, bindparam, extract, func, select, update

from mollifier.deadline import within
from mollifier.errors import EngineUnavailableError
from mollifier.model import Environment
from mollifier.postgres.api_keys import key_hash
from mollifier.postgres.background import keep
from mollifier.postgres.database import Database
from mollifier.postgres.tables import api_keys, environments, organizations, projects

LIFETIME_S = 2.0
SERVES_WHILE_ASKED_S = 4.0
STANDS_THROUGH_OUTAGE_S = 3600.0
REFRESH_DEADLINE_MS = 1_000.0
KNOWN_MAX = 10_000
UNKNOWN_MAX = 1_000
RECORD_INTERVAL_S = 30.0

_QUERY = (
    select(
        api_keys.c.id.label("key_id"),
        api_keys.c.key_hash,
        # By the database's clock; this process counts on from when it asked.
        extract("epoch", api_keys.c.expires_at - func.now()).cast(Double).label("expires_in_s"),
        environments.c.id,
        environments.c.name,
        projects.c.id.label("project_id"),
        organizations.c.id.label("org_id"),
        organizations.c.feature_flags,
    )
    .join_from(api_keys, environments)
    .join(projects)
    .join(organizations)
    .where(
        api_keys.c.key_hash == bindparam("hash"),
        api_keys.c.revoked_at.is_(None),
        api_keys.c.expires_at.is_(None) | (api_keys.c.expires_at > func.now()),
    )
)


class Identity(NamedTuple):
    """Which of an environment's keys it is; `key_id` is not the key."""

    environment: Environment
    key_id: str


class _Answer(NamedTuple):
    environment: Environment | None
    key_id: str
    asked_at: float
    fresh_until: float
    expires_at: float = math.inf
    in_outage: bool = False

    def has_expired(self, now: float) -> bool:
        """Tell whether the key's overlap has passed; nothing prolongs it, so the database need not be asked."""
        return now >= self.expires_at


class Authenticator:
    """Answers from memory where it can. `clock` counts seconds, from any start.

    Known and unknown keys are kept apart, so that guessing evicts no customer.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._known: OrderedDict[bytes, _Answer] = OrderedDict()
        self._unknown: OrderedDict[bytes, _Answer] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[_Answer]] = {}
        self._used: set[str] = set()

    async def authenticate(self, api_key: str) -> Environment | None:
        """Return the key's environment; see `identify`."""
        identity = await self.identify(api_key)
        return None if identity is None else identity.environment

    async def identify(self, api_key: str) -> Identity | None:
        """Return whose key it is, or None for a key that is unknown, revoked or expired.

        Raises EngineUnavailableError when the database cannot be reached and never answered for this key.
        """
        digest = key_hash(api_key)
        answer = self._known.get(digest) or self._unknown.get(digest)
        if answer is not None and answer.has_expired(self._clock()):
            return None
        if answer is None or answer.fresh_until <= self._clock():
            asking = self._refreshing(digest, answer)
            if answer is None or not self._serves_meanwhile(answer):
                # One caller's going away must not fail the others.
                answer = await asyncio.shield(asking)
        if answer.environment is None:
            return None
        self._used.add(answer.key_id)
        return Identity(answer.environment, answer.key_id)

    def forget(self) -> None:
        """Ask the database anew for every key: call it when this process has changed keys or flags."""
        self._known.clear()
        self._unknown.clear()

    async def record_use(self) -> None:
        """Write down when keys were last used, for all keys used since the last time."""
        used, self._used = self._used, set()
        if not used:
            return
        statement = update(api_keys).where(api_keys.c.id == func.any(bindparam("ids", type_=ARRAY(Text))))
        try:
            async with self._database.statement() as connection:
                await connection.execute(statement.values(last_used_at=func.now()), {"ids": sorted(used)})
        except EngineUnavailableError:
            self._used |= used
            raise

    async def keep_recording(self, every_s: float = RECORD_INTERVAL_S) -> None:
        """Record use every so often, and once more when cancelled; run it beside whatever authenticates."""
        try:
            await keep(self.record_use, what="record the use of API keys", every_s=every_s, first_after_s=every_s)
        finally:
            with suppress(EngineUnavailableError, TimeoutError):
                await within(REFRESH_DEADLINE_MS, self.record_use())

    def _serves_meanwhile(self, stale: _Answer) -> bool:
        """Tell whether a known key is let in by its old answer while a new one is under way."""
        age_s = self._clock() - stale.asked_at
        serves_s = STANDS_THROUGH_OUTAGE_S if stale.in_outage else SERVES_WHILE_ASKED_S
        return stale.environment is not None and age_s < serves_s

    def _refreshing(self, digest: bytes, stale: _Answer | None) -> asyncio.Task[_Answer]:
        """Ask the database, once for all who want to know of the same key."""
        asking = self._asking.get(digest)
        if asking is None:
            asking = asyncio.ensure_future(self._ask(digest, stale))
            self._asking[digest] = asking
            asking.add_done_callback(lambda done: self._answered(digest, done))
        return asking

    def _answered(self, digest: bytes, done: asyncio.Task[_Answer]) -> None:
        self._asking.pop(digest, None)
        if not done.cancelled():
            # Looked at here, since those who asked may be gone.
            done.exception()

    async def _ask(self, digest: bytes, stale: _Answer | None) -> _Answer:
        now = self._clock()
        stands = stale is not None and stale.environment is not None and now < stale.asked_at + STANDS_THROUGH_OUTAGE_S
        try:
            look_up = self._look_up(digest)
            answer = await (within(REFRESH_DEADLINE_MS, look_up) if stands else look_up)
        except (EngineUnavailableError, TimeoutError):
            if stale is None or not stands:
                raise
            answer = stale._replace(fresh_until=self._clock() + LIFETIME_S, in_outage=True)
        kept, bound = (self._known, KNOWN_MAX) if answer.environment else (self._unknown, UNKNOWN_MAX)
        for answers in (self._known, self._unknown):
            answers.pop(digest, None)
        kept[digest] = answer
        while len(kept) > bound:
            kept.popitem(last=False)
        return answer

    async def _look_up(self, digest: bytes) -> _Answer:
        asked_at = self._clock()
        async with self._database.statement() as connection:
            row = (await connection.execute(_QUERY, {"hash": digest})).one_or_none()
        # The index has compared the hash already; this comparison takes the same time for every key.
        if row is None or not hmac.compare_digest(row.key_hash, digest):
            return _Answer(None, "", asked_at, asked_at + LIFETIME_S)
        environment = Environment(
            id=row.id, name=row.name, project_id=row.project_id, org_id=row.org_id, org_flags=row.feature_flags
        )
        expires_at = math.inf if row.expires_in_s is None else asked_at + row.expires_in_s
        return _Answer(environment, row.key_id, asked_at, asked_at + LIFETIME_S, expires_at)
