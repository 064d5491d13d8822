"""The admin API's keys: making, rotating and revoking what environments authenticate with."""

from __future__ import annotations

from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.params import Parameter

from mollifier.fields import Fields
from mollifier.http.bodies import parsed
from mollifier.http.openapi import documented
from mollifier.http.raw_path import path_id
from mollifier.http.render import json_response
from mollifier.http.schemas import RotationBody
from mollifier.http.services import services_of
from mollifier.postgres.api_keys import OVERLAP_DEFAULT, ApiKey

_SHOWN_ONCE = {"Cache-Control": "no-store"}

EnvId = Annotated[str, Parameter(description="The environment's id")]
KeyId = Annotated[str, Parameter(description="The key's id, which is not the key")]


class KeyBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """An API key as far as it is known: `prefix` tells it apart; `key`, the key itself, is there only when it was just made."""

    id: str
    env_id: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None = None
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    key: str | None = None


class KeyRotation(msgspec.Struct, frozen=True):
    """The new key, and the one that it replaces, which works until its `expiresAt`."""

    created: KeyBody
    replaced: KeyBody


@get(
    "/environments/{id:str}/keys",
    summary="List API keys",
    operation_class=documented(HTTPStatus.NOT_FOUND, key="adminToken"),
)
async def list_keys(request: Request[Any, Any, Any], id: EnvId) -> Response[list[KeyBody]]:  # noqa: A002 - the path's own word
    """List the environment's keys, revoked and expired ones too, oldest first."""
    return json_response([_shown(key) for key in await services_of(request).tenants.list_keys(_env(id))])


@post(
    "/environments/{id:str}/keys",
    summary="Make an API key",
    operation_class=documented(HTTPStatus.NOT_FOUND, key="adminToken"),
)
async def create_key(request: Request[Any, Any, Any], id: EnvId) -> Response[KeyBody]:  # noqa: A002 - as above
    """Make an API key; the answer shows it this once."""
    made = await services_of(request).tenants.create_key(_env(id))
    return json_response(_shown(made.key, made.secret), 201, headers=_SHOWN_ONCE)


@post(
    "/environments/{id:str}/keys/{keyId:str}/rotate",
    summary="Rotate an API key",
    operation_class=documented(
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        body=RotationBody,
        key="adminToken",
    ),
)
async def rotate_key(request: Request[Any, Any, Any], id: EnvId, keyId: KeyId) -> Response[KeyRotation]:  # noqa: A002 - as above
    """Make a key in the place of another, which goes on working until the overlap has passed; the answer shows the new one this once.

    A key is rotated once: after that, rotate the newer one, or revoke this one to end it early.
    """
    overlap = await parsed(request, _overlap)
    services = services_of(request)
    rotation = await services.tenants.rotate_key(_env(id), path_id(keyId, "API key", "keyId"), overlap)
    services.authenticator.forget()
    made = _shown(rotation.created.key, rotation.created.secret)
    return json_response(KeyRotation(made, _shown(rotation.replaced)), 201, headers=_SHOWN_ONCE)


@delete(
    "/environments/{id:str}/keys/{keyId:str}",
    status_code=200,
    summary="Revoke an API key",
    operation_class=documented(HTTPStatus.NOT_FOUND, key="adminToken"),
)
async def revoke_key(request: Request[Any, Any, Any], id: EnvId, keyId: KeyId) -> Response[KeyBody]:  # noqa: A002 - as above
    """Revoke the key for good: it stops working here at once, and at other replicas within four seconds, while the database answers."""
    services = services_of(request)
    revoked = await services.tenants.revoke_key(_env(id), path_id(keyId, "API key", "keyId"))
    services.authenticator.forget()
    return json_response(_shown(revoked))


KEY_ROUTES = (list_keys, create_key, rotate_key, revoke_key)


def _env(segment: str) -> str:
    return path_id(segment, "environment")


def _overlap(body: Fields) -> timedelta:
    given = body.duration("overlap")
    return OVERLAP_DEFAULT if given is None else given


def _shown(key: ApiKey, secret: str | None = None) -> KeyBody:
    return KeyBody(**msgspec.structs.asdict(key), key=secret)
