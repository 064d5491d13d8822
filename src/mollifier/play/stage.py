"""An embedded stack with everything a play needs on it: schema, tenants, API and worker processes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mollifier.embedded import EmbeddedStack, Stack
from mollifier.flags import ORG_FLAG
from mollifier.model import Tenant
from mollifier.play.evidence import connections_received
from mollifier.play.session import System
from mollifier.postgres.database import Database
from mollifier.postgres.migrate import migrate_async
from mollifier.postgres.tenants import Tenants
from mollifier.processes import ChildEnvironment, Processes, running

Progress = Callable[[str], object]
T = TypeVar("T")


class Organization(NamedTuple):
    """An organization to be made, with so many environments."""

    name: str
    environments: int = 1


class Stage(NamedTuple):
    """Ready to be played on; `tenants` has one per environment, organization by organization, `processes` and `stack` what was started for it."""

    system: System
    tenants: Sequence[Tenant]
    processes: Processes | None = None
    stack: Stack | None = None

    async def alongside(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work. Raises ProcessError as soon as one of the processes ends."""
        return await (work if self.processes is None else self.processes.alongside(work))


@asynccontextmanager
async def embedded_stage(
    environment: ChildEnvironment,
    organizations: Sequence[Organization],
    *,
    log: Path,
    replicas: int = 1,
    on_progress: Progress,
) -> AsyncGenerator[Stage]:
    """Start everything, and stop it when the block is left. Nothing is kept but the log."""
    admin_token = environment.settings.admin_token or secrets.token_urlsafe(24)
    async with EmbeddedStack(durable=False, on_progress=on_progress) as stack:
        on_progress("creating the schema and the tenants")
        await migrate_async(stack.database_url)
        async with Database(stack.database_url, pool_size=2) as database:
            tenants = await make_tenants(Tenants(database), organizations, enroll=environment.mode.enrolls)
            connections_before = await connections_received(stack.redis_url)
            on_progress("starting API and worker")
            async with running(
                stack, environment, admin_token=admin_token, output=log, ports=[0] * replicas
            ) as processes:
                await processes.tasks_recorded(database)
                system = System(
                    api_urls=processes.api_urls,
                    admin_token=admin_token,
                    database_url=stack.database_url,
                    log=log,
                    mode=environment.mode,
                    redis_url=stack.redis_url,
                    connections_before=connections_before,
                )
                yield Stage(system, tenants, processes, stack)


async def make_tenants(tenants: Tenants, organizations: Sequence[Organization], *, enroll: bool) -> list[Tenant]:
    """Make the organizations with their environments, each with a key of its own; `enroll` switches their flags on."""
    made: list[Tenant] = []
    for organization in organizations:
        first = await tenants.create_tenant(organization.name)
        if enroll:
            await tenants.set_flags(first.org_id, {ORG_FLAG: True})
        more = range(2, organization.environments + 1)
        made += [first, *[await add_environment(tenants, first, f"prod-{number}") for number in more]]
    return made


async def add_environment(tenants: Tenants, beside: Tenant, name: str) -> Tenant:
    """Make one more environment in the project of this tenant, and a key for it."""
    environment = await tenants.create_environment(beside.project_id, name)
    key = await tenants.create_key(environment.id)
    return Tenant(org_id=beside.org_id, project_id=beside.project_id, env_id=environment.id, api_key=key.secret)
