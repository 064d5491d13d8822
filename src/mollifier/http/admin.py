"""The admin API: tenants and their keys, feature flags, the buffer and its dead letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, Router, delete, get, post, put
from litestar.params import Parameter

from mollifier.fields import Fields
from mollifier.http.api_keys import KEY_ROUTES
from mollifier.http.auth import require_admin
from mollifier.http.bodies import parsed
from mollifier.http.buffer import BUFFER_ROUTES
from mollifier.http.dead_letters import DEAD_LETTER_ROUTES
from mollifier.http.openapi import documented
from mollifier.http.raw_path import path_id, path_text
from mollifier.http.render import json_response
from mollifier.http.schemas import FlagsBody, NameBody, OptionalNameBody
from mollifier.http.services import services_of
from mollifier.postgres.flags import checked_flag_name
from mollifier.postgres.tenants import DEFAULT_ENVIRONMENT, NAME_LENGTH_MAX

Id = Annotated[str, Parameter(description="The id of what the path names before it")]
Flags = dict[str, Any]
ADMIN: Literal["adminToken"] = "adminToken"
AnyRequest = Request[Any, Any, Any]


class OrganizationBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One customer; `featureFlags` overrides the global flags for it."""

    id: str
    name: str
    created_at: datetime
    feature_flags: Any = None


class ProjectBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One project of an organization."""

    id: str
    org_id: str
    name: str
    created_at: datetime


class EnvironmentBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One environment of a project."""

    id: str
    project_id: str
    name: str
    created_at: datetime


@get("/organizations", summary="List organizations", operation_class=documented(key=ADMIN))
async def list_organizations(request: AnyRequest) -> Response[list[OrganizationBody]]:
    """List every organization, oldest first."""
    return _many(await services_of(request).tenants.list_organizations(), OrganizationBody)


@post(
    "/organizations",
    summary="Make an organization",
    operation_class=documented(HTTPStatus.UNPROCESSABLE_ENTITY, body=NameBody, key=ADMIN),
)
async def create_organization(request: AnyRequest) -> Response[OrganizationBody]:
    """Make an organization."""
    name = await parsed(request, _name)
    return _one(await services_of(request).tenants.create_organization(name), OrganizationBody, 201)


@get(
    "/organizations/{id:str}",
    summary="Read an organization",
    operation_class=documented(HTTPStatus.NOT_FOUND, key=ADMIN),
)
async def get_organization(request: AnyRequest, id: Id) -> Response[OrganizationBody]:  # noqa: A002 - the path's own word
    """Read an organization."""
    return _one(await services_of(request).tenants.get_organization(_org(id)), OrganizationBody)


@get(
    "/organizations/{id:str}/projects",
    summary="List projects",
    operation_class=documented(HTTPStatus.NOT_FOUND, key=ADMIN),
)
async def list_projects(request: AnyRequest, id: Id) -> Response[list[ProjectBody]]:  # noqa: A002 - as above
    """List the organization's projects, oldest first."""
    return _many(await services_of(request).tenants.list_projects(_org(id)), ProjectBody)


@post(
    "/organizations/{id:str}/projects",
    summary="Make a project",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=NameBody, key=ADMIN),
)
async def create_project(request: AnyRequest, id: Id) -> Response[ProjectBody]:  # noqa: A002 - as above
    """Make a project of the organization."""
    name = await parsed(request, _name)
    return _one(await services_of(request).tenants.create_project(_org(id), name), ProjectBody, 201)


@get(
    "/projects/{id:str}/environments",
    summary="List environments",
    operation_class=documented(HTTPStatus.NOT_FOUND, key=ADMIN),
)
async def list_environments(request: AnyRequest, id: Id) -> Response[list[EnvironmentBody]]:  # noqa: A002 - as above
    """List the project's environments, oldest first."""
    return _many(await services_of(request).tenants.list_environments(path_id(id, "project")), EnvironmentBody)


@post(
    "/projects/{id:str}/environments",
    summary="Make an environment",
    operation_class=documented(
        HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY, body=OptionalNameBody, key=ADMIN
    ),
)
async def create_environment(request: AnyRequest, id: Id) -> Response[EnvironmentBody]:  # noqa: A002 - as above
    """Make an environment of the project; without a name it is `prod`."""
    name = await parsed(request, lambda body: body.text("name", NAME_LENGTH_MAX) or DEFAULT_ENVIRONMENT)
    return _one(
        await services_of(request).tenants.create_environment(path_id(id, "project"), name), EnvironmentBody, 201
    )


@get("/flags", summary="Read the global flags", operation_class=documented(key=ADMIN))
async def get_flags(request: AnyRequest) -> Response[Flags]:
    """Read the flags of everybody."""
    return json_response(await services_of(request).flags.refresh())


@put(
    "/flags",
    summary="Set global flags",
    operation_class=documented(HTTPStatus.UNPROCESSABLE_ENTITY, body=FlagsBody, key=ADMIN),
)
async def put_flags(request: AnyRequest) -> Response[Flags]:
    """Set the flags that the body names and leave the others; live everywhere within five seconds."""
    values = await parsed(request, _flags)
    return json_response(await services_of(request).flags.set(values))


@delete("/flags/{name:str}", status_code=200, summary="Take away a global flag", operation_class=documented(key=ADMIN))
async def delete_flag(request: AnyRequest, name: Id) -> Response[Flags]:
    """Take away one flag, if it is there; the answer has the rest."""
    return json_response(await services_of(request).flags.unset(path_text(name, "name")))


@get(
    "/organizations/{id:str}/flags",
    summary="Read an organization's flags",
    operation_class=documented(HTTPStatus.NOT_FOUND, key=ADMIN),
)
async def get_org_flags(request: AnyRequest, id: Id) -> Response[Flags]:  # noqa: A002 - as above
    """Read the organization's own flags."""
    return json_response(await services_of(request).tenants.get_flags(_org(id)))


@put(
    "/organizations/{id:str}/flags",
    summary="Set an organization's flags",
    operation_class=documented(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY, body=FlagsBody, key=ADMIN),
)
async def put_org_flags(request: AnyRequest, id: Id) -> Response[Flags]:  # noqa: A002 - as above
    """Set the flags that the body names and leave the others; live everywhere within five seconds."""
    values = await parsed(request, _flags)
    return await _org_flags(request, await services_of(request).tenants.set_flags(_org(id), values))


@delete(
    "/organizations/{id:str}/flags/{name:str}",
    status_code=200,
    summary="Take away an organization's flag",
    operation_class=documented(HTTPStatus.NOT_FOUND, key=ADMIN),
)
async def delete_org_flag(request: AnyRequest, id: Id, name: Id) -> Response[Flags]:  # noqa: A002 - as above
    """Take away one flag of the organization, if it is there; the answer has the rest."""
    return await _org_flags(request, await services_of(request).tenants.unset_flag(_org(id), path_text(name, "name")))


async def _guard(request: AnyRequest) -> None:
    require_admin(request)


admin_api = Router(
    "/admin/api/v1",
    route_handlers=[
        *(list_organizations, create_organization, get_organization, list_projects, create_project),
        *(list_environments, create_environment),
        *(get_flags, put_flags, delete_flag, get_org_flags, put_org_flags, delete_org_flag),
        *KEY_ROUTES,
        *BUFFER_ROUTES,
        *DEAD_LETTER_ROUTES,
    ],
    before_request=_guard,
    tags=["Administration"],
)


async def _org_flags(request: AnyRequest, flags: Mapping[str, Any]) -> Response[Flags]:
    # What is remembered of an environment includes its organization's flags.
    services_of(request).authenticator.forget()
    return json_response(flags)


def _one(found: msgspec.Struct, shape: type[msgspec.Struct], status_code: int = 200) -> Response[Any]:
    return json_response(shape(**_fields(found)), status_code)


def _many(found: Sequence[msgspec.Struct], shape: type[msgspec.Struct]) -> Response[Any]:
    return json_response([shape(**_fields(one)) for one in found])


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    return msgspec.structs.asdict(struct)


def _name(body: Fields) -> str:
    return body.required("name", lambda name: body.text(name, NAME_LENGTH_MAX)) or ""


def _org(segment: str) -> str:
    return path_id(segment, "organization")


def _flags(body: Fields) -> Flags:
    return {checked_flag_name(name): body.value(name) for name in body.names()}
