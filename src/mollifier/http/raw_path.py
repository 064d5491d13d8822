"""Routing on the path as it was sent.

A task id or a key may hold any printable text, a slash too, percent-encoded. A server decodes the path before it is routed, which
makes of `a%2Fb` two segments; so each segment is put back into one canonical encoded form, and handlers decode what is theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from mollifier.errors import FieldError, InvalidRequestError, NotFoundError
from mollifier.fields import text_fault

ID_LENGTH_MAX = 256

_CANONICAL = re.compile(rb"[A-Za-z0-9/_.~-]*")


def encoded_path(scope: Mapping[str, Any]) -> str:
    """Return the path with every segment percent-encoded, the same for every way of writing it."""
    raw = scope.get("raw_path") or scope["path"].encode()
    if _CANONICAL.fullmatch(raw):
        return raw.decode()
    return "/".join(quote(unquote_to_bytes(segment), safe="") for segment in raw.decode("latin-1").split("/"))


def path_text(segment: str, field: str) -> str:
    """Return what a segment of the path says. Raises InvalidRequestError where that is no UTF-8."""
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(FieldError(field, "is not UTF-8, percent-encoded")) from None


def path_id(segment: str, kind: str, field: str = "id") -> str:
    """Return the id in a segment of the path. Raises NotFoundError for what nothing of that kind can be called."""
    text = path_text(segment, field)
    if text_fault(text, ID_LENGTH_MAX):
        raise NotFoundError(kind, text[:ID_LENGTH_MAX], field)
    return text
