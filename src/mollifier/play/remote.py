"""A system that runs already, as somewhere to play."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from mollifier.errors import FieldError, InvalidRequestError
from mollifier.model import Tenant
from mollifier.play.session import System
from mollifier.play.stage import Stage, add_environment
from mollifier.postgres.authentication import Authenticator
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants


class Remote(NamedTuple):
    """An API that runs already, by the URLs of its replicas, and the means to ask what it did; `log` is of all its processes."""

    urls: Sequence[str]
    api_key: str
    admin_token: str
    database_url: str
    log: Path | None


@asynccontextmanager
async def remote_stage(remote: Remote, environments: int) -> AsyncGenerator[Stage]:
    """Make the system ready to be played on: environments beyond the key's own are added to its project, and stay.

    Raises InvalidRequestError (field `--api-key`) for a key that the database does not know.
    """
    async with Database(remote.database_url, pool_size=2) as database:
        known = await Authenticator(database).authenticate(remote.api_key)
        if known is None:
            detail = "the database knows no such key, or it was revoked; is --database-url that of this API?"
            raise InvalidRequestError(FieldError("--api-key", detail))
        first = Tenant(org_id=known.org_id, project_id=known.project_id, env_id=known.id, api_key=remote.api_key)
        name = f"replay-{secrets.token_hex(4)}"
        more = [await add_environment(Tenants(database), first, f"{name}-{n}") for n in range(2, environments + 1)]
    system = System(
        api_urls=remote.urls,
        admin_token=remote.admin_token,
        database_url=remote.database_url,
        log=remote.log,
        mode=None,
        shared=True,
    )
    yield Stage(system, [first, *more])
