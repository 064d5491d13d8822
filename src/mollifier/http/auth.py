"""Whose request is it? API keys name an environment, the admin token opens the admin API."""

from __future__ import annotations

import hmac
from hashlib import sha256
from http import HTTPStatus
from typing import Any

from litestar import Request

from mollifier.http.problems import RefusedError
from mollifier.http.rate_limit import spend
from mollifier.http.services import services_of
from mollifier.model import Environment
from mollifier.settings import variable

_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="mollifier"'}


async def environment_of(request: Request[Any, Any, Any]) -> Environment:
    """Return the environment that the request's API key belongs to. Raises RefusedError: 401, or 429 over the key's limit."""
    key = _bearer(request)
    if key is None:
        detail = "No API key: send it as `Authorization: Bearer <environment API key>`."
        raise RefusedError(HTTPStatus.UNAUTHORIZED, detail, _CHALLENGE, field="authorization")
    identity = await services_of(request).authenticator.identify(key)
    if identity is None:
        detail = "This API key is unknown or revoked; an administrator can make another one."
        raise RefusedError(HTTPStatus.UNAUTHORIZED, detail, _CHALLENGE, field="authorization")
    if services_of(request).settings.request_limit is not None:
        await spend(request, identity.environment.org_id, identity.key_id)
    return identity.environment


def require_admin(request: Request[Any, Any, Any]) -> None:
    """Let the administrator pass. Raises RefusedError: 403 where there is none, 401 for another token."""
    token = services_of(request).settings.admin_token
    if token is None:
        detail = f"The admin API is closed: set {variable('admin_token')} and restart the API to open it."
        raise RefusedError(HTTPStatus.FORBIDDEN, detail)
    # Of one length, so that not even the token's is told by how long the comparison takes. Headers arrive as Latin-1, whatever was sent.
    given = sha256((_bearer(request) or "").encode("latin-1")).digest()
    if not hmac.compare_digest(given, sha256(token.encode()).digest()):
        detail = "Send the admin token as `Authorization: Bearer <admin token>`."
        raise RefusedError(HTTPStatus.UNAUTHORIZED, detail, _CHALLENGE, field="authorization")


def _bearer(request: Request[Any, Any, Any]) -> str | None:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    credentials = credentials.strip()
    return credentials if credentials and scheme.lower() == "bearer" else None
