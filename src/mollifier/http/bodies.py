"""Request bodies: read within the limit, JSON only, and parsed by hand so that every mistake is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

from litestar import Request

from mollifier.fields import Fields, read_body
from mollifier.http.problems import RefusedError

T = TypeVar("T")

_JSON = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)


async def json_body(request: Request[Any, Any, Any]) -> bytes:
    """Return the body. Raises RefusedError (415) where it is not said to be JSON; the framework refuses one over the limit (413)."""
    content_type = request.headers.get("content-type", "")
    if not _JSON.fullmatch(content_type):
        said = f"not {content_type[:100]!r}" if content_type else "and say so"
        detail = f"Send JSON, with `Content-Type: application/json`, {said}."
        raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail, field="content-type")
    return await request.body()


async def parsed(request: Request[Any, Any, Any], read: Callable[[Fields], T]) -> T:
    """Return what `read` makes of the body. Raises MalformedBodyError and InvalidRequestError."""
    return read_body(await json_body(request), read)


async def nothing(request: Request[Any, Any, Any]) -> None:
    """Take a body that says nothing: none at all, or JSON that is not looked at. Raises as `parsed` does."""
    body = await request.body()
    if body:
        await json_body(request)
        read_body(body, lambda _: None)
