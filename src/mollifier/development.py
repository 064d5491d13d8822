"""The stack that `mollifier dev` keeps running, and the tenant that is ready on it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from mollifier.child_environment import ChildEnvironment
from mollifier.embedded import EmbeddedStack
from mollifier.flags import ORG_FLAG
from mollifier.model import Tenant
from mollifier.postgres.authentication import Authenticator
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import migrate_async
from mollifier.postgres.tenants import Tenants
from mollifier.processes import running
from mollifier.rollout import Mode

CREDENTIALS = "credentials.json"
TENANT_NAME = "Development"


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept from start to start, readable by its owner alone."""

    tenant: Tenant
    admin_token: str


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """What a program needs to use the stack: the line that `--json` prints."""

    url: str
    api_key: str
    admin_token: str
    redis_url: str
    database_url: str


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A stack that is ready."""

    addresses: Addresses
    org_id: str
    mode: Mode
    data: Path
    log: Path


async def develop(
    data: Path,
    environment: ChildEnvironment,
    *,
    port: int,
    fresh: bool,
    log: Path,
    on_progress: Callable[[str], object],
    on_ready: Callable[[Started], None],
) -> int:
    """Run everything until cancelled. Raises EmbeddedError when the servers do not start, ProcessError when one of the processes ends."""
    async with EmbeddedStack(data, fresh=fresh, on_progress=on_progress) as stack:
        on_progress("bringing the schema up to date")
        await migrate_async(stack.database_url)
        async with Database(stack.database_url, pool_size=1) as database:
            credentials = await ready_tenant(database, data / CREDENTIALS, environment)
        on_progress("starting API and worker")
        _set_aside(log)
        async with running(
            stack, environment, admin_token=credentials.admin_token, output=log, ports=[port]
        ) as processes:
            async with Database(stack.database_url, pool_size=1) as database:
                await processes.tasks_recorded(database)
            addresses = Addresses(
                url=processes.api_urls[0],
                api_key=credentials.tenant.api_key,
                admin_token=credentials.admin_token,
                redis_url=stack.redis_url,
                database_url=stack.database_url,
            )
            on_ready(
                Started(
                    addresses=addresses,
                    org_id=credentials.tenant.org_id,
                    mode=environment.mode,
                    data=data,
                    log=log,
                )
            )
            await processes.watch()


async def ready_tenant(database: Database, file: Path, environment: ChildEnvironment) -> Credentials:
    """Return the tenant of the last start where the database still knows its key, else a new one, at the mode's step of the rollout.

    A configured admin token counts; otherwise it is kept with the key.
    """
    tenants = Tenants(database)
    kept = _read(file)
    if kept is None or await Authenticator(database).authenticate(kept.tenant.api_key) is None:
        kept = Credentials(tenant=await tenants.create_tenant(TENANT_NAME), admin_token=secrets.token_urlsafe(24))
    kept = msgspec.structs.replace(kept, admin_token=environment.settings.admin_token or kept.admin_token)
    _write(file, kept)
    await tenants.set_flags(kept.tenant.org_id, {ORG_FLAG: environment.mode.enrolls})
    return kept


def _set_aside(log: Path) -> None:
    """Keep the log of the last start beside that of this one."""
    with suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.old"))


def _read(file: Path) -> Credentials | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Credentials)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write(file: Path, credentials: Credentials) -> None:
    """Replace the file as a whole, so that no reader and no interruption meets half of it."""
    passing = file.with_suffix(".new")
    passing.unlink(missing_ok=True)
    descriptor = os.open(passing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as new:
        new.write(msgspec.json.encode(credentials))
    passing.replace(file)
