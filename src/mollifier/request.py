"""1. The request: a trigger's body and headers, parsed and checked into a `TriggerRequest`.

Everything that can be said of a trigger without looking anything up is said here, all mistakes of a request at once. What is in
the wire format but not in this module's tables is ignored.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec

from mollifier.durations import parse_duration
from mollifier.errors import FieldError, InvalidRequestError
from mollifier.fields import Fields, json_fault, read_body, text_fault
from mollifier.metadata import METADATA_BYTES_MAX
from mollifier.model import DEBOUNCE_MAX_DELAY, MAX_TAGS, Debounce, TriggerRequest

TASK_ID_LENGTH_MAX = 256
KEY_LENGTH_MAX = 2048
DEBOUNCE_KEY_LENGTH_MAX = 512
TAG_LENGTH_MAX = 128
NAME_LENGTH_MAX = 512
INT32 = (-(2**31), 2**31 - 1)
ATTEMPTS = (1, 100)
MAX_DURATION_S = (1, 2**31 - 1)
"""The upper end is what SDKs send for a run without a limit."""

PLAIN = "text/plain"
JSON = "application/json"
SUPER_JSON = "application/super+json"
STORE = "application/store"
FORMATS = (JSON, SUPER_JSON, PLAIN, STORE)
"""What a payload that comes as a string may be."""

IDEMPOTENCY_KEY = "idempotency-key"
IDEMPOTENCY_KEY_TTL = "idempotency-key-ttl"
REQUEST_KEY = "x-trigger-request-idempotency-key"
TRIGGER_SOURCE = "x-trigger-source"
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
HEADERS = (IDEMPOTENCY_KEY, IDEMPOTENCY_KEY_TTL, REQUEST_KEY, TRIGGER_SOURCE, TRACEPARENT, TRACESTATE)
"""The headers that are read; names in lower case."""

_SECOND = timedelta(seconds=1)
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")


class _SuperJson(msgspec.Struct):
    json: msgspec.Raw


_super_json = msgspec.json.Decoder(_SuperJson)


class Key(msgspec.Struct, frozen=True):
    """An idempotency key as it is bound, and as the caller calls it where that differs."""

    bound: str | None = None
    shown: str | None = None


def parse_trigger(task_id: str, body: bytes, headers: Mapping[str, str]) -> TriggerRequest:
    """Return the request of a trigger call. Header names are in lower case.

    Raises MalformedBodyError for a body that is not JSON, else InvalidRequestError naming every field at fault.
    """

    def read(item: Fields) -> TriggerRequest:
        fault = task_id_fault(task_id)
        if fault is not None:
            item.blame_path("taskId", fault)
        return read_trigger(task_id, item, headers)

    return read_body(body, read)


def read_trigger(
    task_id: str, item: Fields, headers: Mapping[str, str], parent_run_id: str | None = None
) -> TriggerRequest:
    """Return the request of one `{payload, context?, options?}`, the body of a trigger or one item of a batch.

    Every mistake is noted in `item`; with one, the request is none that may be used. `parent_run_id` is the parent of an item that
    names none.
    """
    options = item.object_or_empty("options")
    payload, payload_type = _payload(item, options)
    parent_run_id, resume_parent = read_parent(options, parent_run_id)
    key = read_key(options, read_header(item, headers, IDEMPOTENCY_KEY), parent_run_id)
    fields: dict[str, Any] = {
        "payload": payload,
        "payload_type": payload_type,
        "context": item.json("context") if item.has("context") else None,
        "metadata": _checked_metadata(options),
        "tags": options.texts("tags", TAG_LENGTH_MAX, MAX_TAGS),
        "idempotency_key": key.bound,
        "idempotency_key_shown": key.shown,
        "idempotency_lifetime": _lifetime(item, options, headers),
        "request_key": read_header(item, headers, REQUEST_KEY),
        "delay": options.delay("delay"),
        "ttl": options.seconds_or_duration("ttl") or None,
        "debounce": _debounce(options),
        "queue": _queue(options),
        "concurrency_key": options.text_or_number("concurrencyKey", NAME_LENGTH_MAX),
        "priority": options.integer("priority", *INT32) or 0,
        "machine": options.text("machine", NAME_LENGTH_MAX),
        "region": options.text("region", NAME_LENGTH_MAX),
        "max_attempts": options.integer("maxAttempts", *ATTEMPTS),
        "max_duration_s": options.integer("maxDuration", *MAX_DURATION_S),
        "test": options.boolean("test") or False,
        "lock_to_version": options.text("lockToVersion", NAME_LENGTH_MAX),
        "external_deployment_id": options.text("externalDeploymentId", NAME_LENGTH_MAX),
        "bulk_action_id": options.text("bulkActionId", NAME_LENGTH_MAX),
        "parent_run_id": parent_run_id,
        "resume_parent_on_completion": resume_parent,
        "parent_batch": options.text("parentBatch", NAME_LENGTH_MAX),
        "trigger_function": "triggerAndWait" if resume_parent else "trigger",
        "trigger_source": read_header(item, headers, TRIGGER_SOURCE, NAME_LENGTH_MAX),
        **trace_of(headers),
    }
    return TriggerRequest(task_id=task_id, **fields)


def task_id_fault(task_id: str) -> str | None:
    """Return what keeps the text from being a task's id, None when nothing does."""
    fault = text_fault(task_id, TASK_ID_LENGTH_MAX)
    if fault is None and any(unicodedata.category(character) == "Cc" for character in task_id):
        fault = "must not contain control characters"
    return fault


def checked_key(key: str, field: str) -> str:
    """Return an idempotency key that stands in a path. Raises InvalidRequestError."""
    fault = text_fault(key, KEY_LENGTH_MAX)
    if fault is not None:
        raise InvalidRequestError(FieldError(field, fault))
    return key


def trace_of(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the caller's trace as W3C Trace Context has it; one that does not conform is ignored, as that asks."""
    parent = headers.get(TRACEPARENT, "")
    found = _TRACEPARENT.fullmatch(parent)
    if found is None or len(parent) > NAME_LENGTH_MAX or (found[1] == "00" and found[2]):
        return {}
    state = headers.get(TRACESTATE, "")
    return {"traceparent": parent} | ({"tracestate": state} if _TRACESTATE.fullmatch(state) else {})


def _payload(item: Fields, options: Fields) -> tuple[bytes, str]:
    """Return the payload and its format: any JSON as it stands, or, where the format is given, the text of a string."""
    form = options.choice("payloadType", FORMATS)
    if form is None:
        return item.json("payload") or b"", JSON
    text = item.any_text("payload")
    if text is None:
        return b"", JSON
    document = text.encode()
    json_value(document, form, item, "payload")
    return document, form


def _checked_metadata(options: Fields) -> bytes | None:
    metadata = _metadata(options)
    if metadata is not None and len(metadata) > METADATA_BYTES_MAX:
        options.blame("metadata", f"must be at most {METADATA_BYTES_MAX} bytes of JSON, is {len(metadata)}")
    return metadata


def _metadata(options: Fields) -> bytes | None:
    """Return the metadata as JSON, whatever its format, so that operations on it know one form only."""
    form = options.choice("metadataType", FORMATS)
    if not options.has("metadata"):
        return None
    if form is None:
        return options.json("metadata")
    text = options.any_text("metadata")
    return None if text is None else json_value(text.encode(), form, options, "metadata")


def json_value(document: bytes, form: str, holder: Fields, name: str) -> bytes:
    """Return the JSON that a document of the format stands for; blame the member `name` when it is not in that format."""
    if form not in (JSON, SUPER_JSON):
        return msgspec.json.encode(document.decode())
    fault = json_fault(document)
    if fault is not None:
        holder.blame(name, f"is not the {form} its type says it is: {fault}")
        return document
    if form == JSON:
        return document
    value = super_json_value(document)
    if value is None:
        holder.blame(name, f"is not the {form} its type says it is: expected an object with a member `json`")
    return value or document


def super_json_value(document: bytes) -> bytes | None:
    """Return the value of a super+json document, its member `json`; None when it is no such document."""
    try:
        return bytes(_super_json.decode(document).json)
    except msgspec.ValidationError:
        return None


def read_parent(options: Fields, parent_run_id: str | None = None) -> tuple[str | None, bool]:
    """Return the run that triggers this, by default the given one, and whether it waits for what comes of it."""
    parent_run_id = options.text("parentRunId", NAME_LENGTH_MAX) or parent_run_id
    resume_parent = options.boolean("resumeParentOnCompletion") or False
    if resume_parent and parent_run_id is None:
        options.blame("parentRunId", "is required with resumeParentOnCompletion: name the run that waits")
    return parent_run_id, resume_parent


def read_key(options: Fields, header: str | None, parent_run_id: str | None) -> Key:
    """Return the idempotency key, a scoped one combined with its scope."""
    given = options.text("idempotencyKey", KEY_LENGTH_MAX) or header
    parts = options.object_or_empty("idempotencyKeyOptions")
    key = parts.text("key", KEY_LENGTH_MAX)
    scope = parts.choice("scope", ("run", "attempt", "global"))
    attempt = parts.integer("attempt", 1, INT32[1])
    if given is not None or key is None:
        return Key(given, key)
    if scope in (None, "global"):
        return Key(key, key)
    if parent_run_id is None:
        options.blame(
            "parentRunId", f"is required with an idempotency key of scope {scope}: name the run it belongs to"
        )
        return Key()
    of_attempt = scope == "attempt" and attempt is not None
    scoped = f"{key}-{parent_run_id}-{attempt}" if of_attempt else f"{key}-{parent_run_id}"
    return Key(hashlib.sha256(scoped.encode()).hexdigest(), key)


def _lifetime(item: Fields, options: Fields, headers: Mapping[str, str]) -> timedelta | None:
    if options.has("idempotencyKeyTTL"):
        return options.duration("idempotencyKeyTTL", _SECOND)
    header = headers.get(IDEMPOTENCY_KEY_TTL)
    if not header:
        return None
    try:
        lifetime = parse_duration(header)
    except ValueError as error:
        item.blame_path(IDEMPOTENCY_KEY_TTL, str(error))
        return None
    if lifetime < _SECOND:
        item.blame_path(IDEMPOTENCY_KEY_TTL, "must be at least 1s")
    return lifetime


def _debounce(options: Fields) -> Debounce | None:
    parts = options.object("debounce")
    if parts is None:
        return None
    key = parts.required("key", lambda name: parts.text(name, DEBOUNCE_KEY_LENGTH_MAX))
    delay = parts.required("delay", lambda name: parts.duration(name, _SECOND))
    mode = parts.choice("mode", ("leading", "trailing")) or "leading"
    max_delay = parts.duration("maxDelay", _SECOND)
    if key is None or delay is None:
        return None
    if max_delay is not None and max_delay < delay:
        parts.blame("maxDelay", "must not be shorter than the delay")
    longest = max(delay, DEBOUNCE_MAX_DELAY) if max_delay is None else max_delay
    return Debounce(key=key, delay=delay, mode="trailing" if mode == "trailing" else "leading", max_delay=longest)


def _queue(options: Fields) -> str | None:
    if options.kind("queue") == "a string":
        return options.text("queue", NAME_LENGTH_MAX)
    parts = options.object("queue")
    return None if parts is None else parts.required("name", lambda name: parts.text(name, NAME_LENGTH_MAX))


def read_header(item: Fields, headers: Mapping[str, str], name: str, longest: int = KEY_LENGTH_MAX) -> str | None:
    """Return a header's text; None where it is missing or empty."""
    text = headers.get(name)
    if not text:
        return None
    fault = text_fault(text, longest)
    if fault is None:
        return text
    item.blame_path(name, fault)
    return None
