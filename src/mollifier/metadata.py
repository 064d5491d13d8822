"""A run's metadata: one JSON object, changed by operations.

Only the member that an operation names is read; every other one keeps the bytes it came with, so that numbers of any size, their
spelling and their spacing survive any number of changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from mollifier.errors import FieldError, InvalidRequestError
from mollifier.model import MetadataOperation

METADATA_BYTES_MAX = 256 * 1024

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])


def apply(document: bytes | None, operations: Sequence[MetadataOperation]) -> bytes:
    """Return the document after the operations, in order; a missing document is an empty object.

    `update` replaces the document; `set` and `delete` a member; `append` adds to a list, making one of what was there; `remove` takes
    every equal element out of a list; `increment` adds to a number, a missing one being 0. Deleting or removing what is not there
    changes nothing. Raises InvalidRequestError, naming `operations[i]`, for one that cannot be applied.
    """
    members = _members(document)
    for index, operation in enumerate(operations):
        field = f"operations[{index}]"
        try:
            _apply_one(members, operation, field)
        except RecursionError as error:
            raise InvalidRequestError(FieldError(f"{field}.value", "is nested too deeply")) from error
    return msgspec.json.encode(members)


def check_growth(before: bytes | None, after: bytes | None) -> None:
    """Refuse a change that makes metadata larger than `METADATA_BYTES_MAX`: operations could let it grow for ever.

    Metadata that is over it already may be changed to less. Raises InvalidRequestError, naming `operations`.
    """
    size = len(after or b"")
    if size > METADATA_BYTES_MAX and size > len(before or b""):
        detail = f"would make the metadata {size} bytes of JSON; at most {METADATA_BYTES_MAX} are kept"
        raise InvalidRequestError(FieldError("operations", detail))


def _apply_one(members: dict[str, msgspec.Raw], operation: MetadataOperation, field: str) -> None:
    if operation.type == "update":
        replacement = _decoded(_object, _value(operation, field))
        if replacement is None:
            raise InvalidRequestError(FieldError(f"{field}.value", "must be an object"))
        members.clear()
        members.update(replacement)
        return
    key = operation.key
    if key is None:
        raise InvalidRequestError(FieldError(f"{field}.key", f"is required by {operation.type!r}"))
    if operation.type == "delete":
        members.pop(key, None)
        return
    value = _value(operation, field)
    current = members.get(key)
    match operation.type:
        case "set":
            members[key] = value
        case "append":
            members[key] = _raw([*_elements(current), value])
        case "remove":
            if current is not None:
                members[key] = _without(current, value, key, field)
        case "increment":
            members[key] = _sum(current, value, key, field)


def _members(document: bytes | None) -> dict[str, msgspec.Raw]:
    """Read the document; what is no object, as a bare `null`, gives way to an empty one."""
    return {} if not document else _decoded(_object, document) or {}


def _value(operation: MetadataOperation, field: str) -> msgspec.Raw:
    if operation.value is None:
        raise InvalidRequestError(FieldError(f"{field}.value", f"is required by {operation.type!r}"))
    return msgspec.Raw(operation.value)


def _elements(current: msgspec.Raw | None) -> list[msgspec.Raw]:
    if current is None:
        return []
    elements = _decoded(_array, current)
    return [current] if elements is None else elements


def _without(current: msgspec.Raw, value: msgspec.Raw, key: str, field: str) -> msgspec.Raw:
    elements = _decoded(_array, current)
    if elements is None:
        raise InvalidRequestError(FieldError(f"{field}.key", f"{key!r} holds no list to remove from"))
    unwanted = _canonical(value)
    return _raw([element for element in elements if _canonical(element) != unwanted])


def _sum(current: msgspec.Raw | None, value: msgspec.Raw, key: str, field: str) -> msgspec.Raw:
    step = _number(value)
    if step is None:
        raise InvalidRequestError(FieldError(f"{field}.value", "must be a number"))
    start = 0 if current is None else _number(current)
    if start is None:
        raise InvalidRequestError(FieldError(f"{field}.key", f"{key!r} holds no number to increment"))
    try:
        total = start + step
        if math.isfinite(total):
            return _raw_text(json.dumps(total))
    except (OverflowError, ValueError):
        pass
    raise InvalidRequestError(FieldError(f"{field}.value", f"makes {key!r} too large a number"))


def _number(raw: msgspec.Raw) -> int | float | None:
    try:
        value = json.loads(bytes(raw))
    except ValueError:
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _canonical(raw: msgspec.Raw) -> str:
    """Return a text that is the same for equal values: members in any order, 1 and 1.0 alike, true and 1 not."""
    return json.dumps(json.loads(bytes(raw), parse_float=_plain_number, parse_int=_plain_number), sort_keys=True)


def _plain_number(text: str) -> Any:
    try:
        number = float(text)
        return int(number) if number.is_integer() and str(int(number)) == text.split(".", maxsplit=1)[0] else text
    except (OverflowError, ValueError):
        return text


def _decoded(decoder: msgspec.json.Decoder[Any], raw: bytes | msgspec.Raw) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError:
        return None


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _raw_text(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())
