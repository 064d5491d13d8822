"""Tenants: organizations, their projects, their environments, and the environments' API keys."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

import msgspec
from sqlalchemy import Row, Table, case, func, literal, select, update
from sqlalchemy.dialects.postgresql import JSONB, insert

from mollifier.errors import ConflictError, FieldError, InvalidRequestError, NotFoundError
from mollifier.model import Tenant
from mollifier.postgres.api_keys import (
    OVERLAP_DEFAULT,
    ApiKey,
    NewApiKey,
    Rotation,
    api_key,
    insert_key,
    new_key,
    revoke,
    rotate,
)
from mollifier.postgres.database import Database
from mollifier.postgres.flags import checked_flag_name
from mollifier.postgres.tables import api_keys, environments, organizations, projects

DEFAULT_ENVIRONMENT = "prod"
NAME_LENGTH_MAX = 200
_ENVIRONMENT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


class Organization(msgspec.Struct, frozen=True, kw_only=True):
    """One customer; `feature_flags` is its override as stored."""

    id: str
    name: str
    created_at: datetime
    feature_flags: Any = None


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """One project of an organization."""

    id: str
    org_id: str
    name: str
    created_at: datetime


class TenantEnvironment(msgspec.Struct, frozen=True, kw_only=True):
    """One environment of a project, as administrators see it."""

    id: str
    project_id: str
    name: str
    created_at: datetime


class Tenants:
    """Makes and lists tenants. Each method raises EngineUnavailableError when the database cannot be reached."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_tenant(self, name: str, environment: str = DEFAULT_ENVIRONMENT) -> Tenant:
        """Make an organization with one project, one environment and one API key, all or nothing."""
        organization = {"id": _new_id("org"), "name": _checked_name(name)}
        project = {"id": _new_id("proj"), "organization_id": organization["id"], "name": organization["name"]}
        env = {"id": _new_id("env"), "project_id": project["id"], "name": _checked_environment_name(environment)}
        secret, key = new_key(env["id"], env["name"])
        async with self._database.transaction() as connection:
            for table, row in (
                (organizations, organization),
                (projects, project),
                (environments, env),
                (api_keys, key),
            ):
                await connection.execute(insert(table).values(row))
        return Tenant(org_id=organization["id"], project_id=project["id"], env_id=env["id"], api_key=secret)

    async def create_organization(self, name: str) -> Organization:
        """Make an organization. Raises InvalidRequestError (field `name`) for an empty or overlong name."""
        return _organization(await self._insert(organizations, {"id": _new_id("org"), "name": _checked_name(name)}))

    async def list_organizations(self) -> Sequence[Organization]:
        """Return every organization, oldest first."""
        return [_organization(row) for row in await self._all(organizations)]

    async def get_organization(self, org_id: str) -> Organization:
        """Return the organization. Raises NotFoundError."""
        return _organization(await self._one(organizations, "organization", org_id))

    async def create_project(self, org_id: str, name: str) -> Project:
        """Make a project. Raises NotFoundError for an unknown organization, InvalidRequestError (field `name`)."""
        row = {"id": _new_id("proj"), "organization_id": org_id, "name": _checked_name(name)}
        await self._one(organizations, "organization", org_id)
        return _project(await self._insert(projects, row))

    async def list_projects(self, org_id: str) -> Sequence[Project]:
        """Return the organization's projects, oldest first. Raises NotFoundError."""
        await self._one(organizations, "organization", org_id)
        return [_project(row) for row in await self._all(projects, organization_id=org_id)]

    async def create_environment(self, project_id: str, name: str = DEFAULT_ENVIRONMENT) -> TenantEnvironment:
        """Make an environment. Raises NotFoundError for an unknown project, ConflictError or InvalidRequestError (field `name`)."""
        row = {"id": _new_id("env"), "project_id": project_id, "name": _checked_environment_name(name)}
        await self._one(projects, "project", project_id)
        statement = insert(environments).values(row).on_conflict_do_nothing().returning(*environments.c)
        async with self._database.statement() as connection:
            made = (await connection.execute(statement)).one_or_none()
        if made is None:
            raise ConflictError(f"This project has an environment {name!r} already; choose another name.", "name")
        return _environment(made)

    async def list_environments(self, project_id: str) -> Sequence[TenantEnvironment]:
        """Return the project's environments, oldest first. Raises NotFoundError."""
        await self._one(projects, "project", project_id)
        return [_environment(row) for row in await self._all(environments, project_id=project_id)]

    async def organization_of(self, env_id: str) -> str:
        """Return the id of the organization that the environment belongs to. Raises NotFoundError."""
        environment = await self._one(environments, "environment", env_id)
        return (await self._one(projects, "project", environment.project_id)).organization_id

    async def create_key(self, env_id: str) -> NewApiKey:
        """Make an API key for the environment. Raises NotFoundError."""
        environment = await self._one(environments, "environment", env_id)
        async with self._database.statement() as connection:
            return await insert_key(connection, env_id, environment.name)

    async def list_keys(self, env_id: str) -> Sequence[ApiKey]:
        """Return the environment's keys, revoked and expired ones too, oldest first. Raises NotFoundError."""
        await self._one(environments, "environment", env_id)
        return [api_key(row) for row in await self._all(api_keys, environment_id=env_id)]

    async def rotate_key(self, env_id: str, key_id: str, overlap: timedelta = OVERLAP_DEFAULT) -> Rotation:
        """Make a key in the place of another, which goes on working for the overlap. See `api_keys.rotate` for what it raises."""
        environment = await self._one(environments, "environment", env_id)
        async with self._database.transaction() as connection:
            return await rotate(connection, env_id, environment.name, key_id, overlap)

    async def revoke_key(self, env_id: str, key_id: str) -> ApiKey:
        """Revoke the key for good; a revoked one stays as it is. Raises NotFoundError."""
        async with self._database.statement() as connection:
            return await revoke(connection, env_id, key_id)

    async def get_flags(self, org_id: str) -> Mapping[str, Any]:
        """Return the organization's own flags; empty when what is stored is no mapping. Raises NotFoundError."""
        stored = (await self.get_organization(org_id)).feature_flags
        return cast("Mapping[str, Any]", stored) if isinstance(stored, Mapping) else {}

    async def set_flags(self, org_id: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Set these flags of the organization and leave its others; return all. Raises NotFoundError."""
        checked = {checked_flag_name(name): value for name, value in values.items()}
        return await self._change_flags(org_id, _flags_or_empty().concat(literal(checked, JSONB)))

    async def unset_flag(self, org_id: str, name: str) -> Mapping[str, Any]:
        """Take away one flag of the organization, if it is there; return the rest. Raises NotFoundError."""
        return await self._change_flags(org_id, _flags_or_empty().op("-")(name))

    async def _change_flags(self, org_id: str, value: Any) -> Mapping[str, Any]:
        change = update(organizations).where(organizations.c.id == org_id).values(feature_flags=value)
        async with self._database.statement() as connection:
            flags = (await connection.execute(change.returning(organizations.c.feature_flags))).scalar_one_or_none()
        if flags is None:
            raise NotFoundError("organization", org_id, "id")
        return flags

    async def _insert(self, table: Table, row: Mapping[str, Any]) -> Row[Any]:
        async with self._database.statement() as connection:
            return (await connection.execute(insert(table).values(row).returning(*table.c))).one()

    async def _all(self, table: Table, **where: str) -> Sequence[Row[Any]]:
        query = select(table).filter_by(**where).order_by(table.c.created_at, table.c.id)
        async with self._database.statement() as connection:
            return (await connection.execute(query)).all()

    async def _one(self, table: Table, kind: str, id: str) -> Row[Any]:  # noqa: A002 - the column's own word
        async with self._database.statement() as connection:
            row = (await connection.execute(select(table).where(table.c.id == id))).one_or_none()
        if row is None:
            raise NotFoundError(kind, id, "id")
        return row


def _flags_or_empty() -> Any:
    """What is stored, or an empty object where it is none: an override that does not parse counts as absent."""
    stored = organizations.c.feature_flags
    return case((func.jsonb_typeof(stored) == "object", stored), else_=literal({}, JSONB))


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _checked_name(name: str) -> str:
    stripped = name.strip()
    if not 0 < len(stripped) <= NAME_LENGTH_MAX or not stripped.isprintable():
        raise InvalidRequestError(FieldError("name", f"must be 1 to {NAME_LENGTH_MAX} printable characters"))
    return stripped


def _checked_environment_name(name: str) -> str:
    if not _ENVIRONMENT_NAME.fullmatch(name):
        raise InvalidRequestError(
            FieldError("name", f"must be 1 to 40 of a-z, 0-9 and inner hyphens, as in 'prod'; is {name!r}")
        )
    return name


def _organization(row: Row[Any]) -> Organization:
    return Organization(id=row.id, name=row.name, created_at=row.created_at, feature_flags=row.feature_flags)


def _project(row: Row[Any]) -> Project:
    return Project(id=row.id, org_id=row.organization_id, name=row.name, created_at=row.created_at)


def _environment(row: Row[Any]) -> TenantEnvironment:
    return TenantEnvironment(id=row.id, project_id=row.project_id, name=row.name, created_at=row.created_at)
