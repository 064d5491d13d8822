"""The documented bodies and what is parsed by hand are one."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from mollifier.batch_request import parse_announcement, parse_batch, parse_line
from mollifier.errors import InvalidRequestError
from mollifier.http import schemas
from mollifier.model import Batch
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


def members_of(body: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(body)]


def test_the_body_of_a_batch_has_the_documented_members() -> None:
    assert sorted(members_of(schemas.BatchBody)) == ["items", "parentRunId", "resumeParentOnCompletion"]
    assert sorted(members_of(schemas.BatchItemBody)) == ["context", "options", "payload", "task"]
    body = {"items": [{"task": "t", "payload": 1}], "parentRunId": "run_p", "resumeParentOnCompletion": True}
    msgspec.convert(body, schemas.BatchBody)
    request, (item,) = parse_batch(json.dumps(body).encode(), {})
    assert (request.run_count, request.parent_run_id, request.resume_parent_on_completion) == (1, "run_p", True)
    assert (item.task_id, item.payload, item.parent_run_id) == ("t", b"1", "run_p")


@pytest.mark.parametrize("name", members_of(schemas.AnnouncementBody))
def test_a_documented_member_of_an_announcement_is_looked_at(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_announcement(json.dumps({"runCount": 1, name: [[]]}).encode(), {})
    assert caught.value.errors[0].field == name


def test_a_line_of_a_batch_has_the_documented_members() -> None:
    assert sorted(members_of(schemas.BatchLineBody)) == ["context", "index", "options", "payload", "task"]
    now = datetime.now(UTC)
    batch = Batch(id="batch_b", env_id="env", run_count=9, created_at=now, updated_at=now, parent_run_id="run_p")
    line = {"index": 8, "task": "t", "payload": 1, "context": 2, "options": {"test": True}}
    msgspec.convert(line, schemas.BatchLineBody)
    item = parse_line(json.dumps(line).encode(), 1, batch, {})
    request = item.request
    assert (item.index, request.task_id, request.payload, request.context, request.test) == (8, "t", b"1", b"2", True)
    assert request.parent_run_id == "run_p"
