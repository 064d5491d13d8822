"""The documented bodies and what is parsed by hand are one."""

import json
from typing import Any

import msgspec
import pytest

from mollifier.errors import InvalidRequestError
from mollifier.http import schemas
from mollifier.request import parse_trigger

NAMES = [field.encode_name for field in msgspec.structs.fields(schemas.TriggerOptions)]
ANYTHING = {"metadata"}
GOOD: dict[str, Any] = {
    "idempotencyKeyTTL": "1h",
    "idempotencyKeyOptions": {"key": "k", "scope": "global"},
    "tags": ["a"],
    "delay": "1h",
    "ttl": 5,
    "debounce": {"key": "k", "delay": "5s", "mode": "trailing", "maxDelay": "1h"},
    "metadata": {"a": 1},
    "metadataType": "application/json",
    "payloadType": "text/plain",
    "queue": {"name": "q"},
    "concurrencyKey": 7,
    "priority": 1,
    "maxAttempts": 3,
    "maxDuration": 60,
    "test": True,
    "resumeParentOnCompletion": False,
}


def blamed(options: Any) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        parse_trigger("task", json.dumps({"options": options}).encode(), {})
    return [error.field for error in caught.value.errors]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ANYTHING])
def test_a_documented_option_is_looked_at(name: str) -> None:
    # None of them may be an array of arrays.
    (field, *_) = blamed({name: [[]]})
    assert field.startswith(f"options.{name}")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "metadataType"])
def test_what_the_documentation_allows_is_taken(name: str) -> None:
    option = {name: GOOD.get(name, "text")}
    msgspec.convert(option, schemas.TriggerOptions)
    parse_trigger("task", json.dumps({"options": option}).encode(), {})


def test_the_body_of_a_trigger_has_the_documented_members() -> None:
    names = [field.encode_name for field in msgspec.structs.fields(schemas.TriggerBody)]
    assert names == ["payload", "context", "options"]
    request = parse_trigger("task", b'{"payload": 1, "context": 2, "options": {"test": true}}', {})
    assert (request.payload, request.context, request.test) == (b"1", b"2", True)
