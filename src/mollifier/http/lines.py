"""Bodies that come line by line (NDJSON): read as they arrive, so that a stream is never held whole."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from litestar import Request

from mollifier.http.problems import RefusedError

_NDJSON = re.compile(r"application/(?:x-)?ndjson\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)


async def lines(request: Request[Any, Any, Any], limit_bytes: int) -> AsyncGenerator[tuple[int, bytes]]:
    """Yield the body's lines with their numbers, from 1; empty ones are passed over.

    Raises RefusedError: 415 where the body is not said to be NDJSON, 413 for a line over the limit, which is one item's.
    """
    content_type = request.headers.get("content-type", "")
    if not _NDJSON.fullmatch(content_type):
        said = f"not {content_type[:100]!r}" if content_type else "and say so"
        detail = f"Send one JSON object per line, with `Content-Type: application/x-ndjson`, {said}."
        raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail, field="content-type")
    number, rest = 1, bytearray()
    async for chunk in request.stream():
        rest += chunk
        if b"\n" in chunk:
            *whole, rest = rest.split(b"\n")
            for line in whole:
                _check(line, number, limit_bytes)
                if item := bytes(line).strip():
                    yield number, item
                number += 1
        _check(rest, number, limit_bytes)
    if item := bytes(rest).strip():
        yield number, item


def _check(line: bytearray, number: int, limit_bytes: int) -> None:
    if len(line) > limit_bytes:
        detail = f"Line {number} is larger than this API takes: {limit_bytes} bytes (MOLLIFIER_BODY_LIMIT_BYTES)."
        raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, field="body")
