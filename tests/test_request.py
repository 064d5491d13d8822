"""What a trigger may say, option by option, and what is told of what it may not say."""

import contextlib
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mollifier.errors import InvalidRequestError, MalformedBodyError
from mollifier.fields import UNSTORABLE
from mollifier.model import Debounce, TriggerRequest
from mollifier.request import parse_trigger

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def parse(options: Any = None, headers: dict[str, str] | None = None, **members: Any) -> TriggerRequest:
    if options is not None:
        members["options"] = options
    return parse_trigger("task", json.dumps(members).encode(), headers or {})


def errors_of(body: bytes, headers: dict[str, str] | None = None, task_id: str = "task") -> dict[str, str]:
    with pytest.raises(InvalidRequestError) as caught:
        parse_trigger(task_id, body, headers or {})
    told = {error.field: error.detail for error in caught.value.errors}
    assert len(told) == len(caught.value.errors), "a field is blamed twice"
    return told


def option_errors(**options: Any) -> dict[str, str]:
    return errors_of(json.dumps({"options": options}).encode())


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("tags", ["a", "b", "a"], "tags", ("a", "b")),
        ("tags", "one", "tags", ("one",)),
        ("tags", [], "tags", ()),
        ("tags", ["x" * 128] + [str(n) for n in range(9)], "tags", ("x" * 128, *map(str, range(9)))),
        ("idempotencyKey", "k" * 2048, "idempotency_key", "k" * 2048),
        ("idempotencyKeyTTL", "60s", "idempotency_lifetime", timedelta(seconds=60)),
        ("delay", "1h30m", "delay", timedelta(minutes=90)),
        ("delay", "0s", "delay", None),
        ("delay", "2030-01-31", "delay", datetime(2030, 1, 31, tzinfo=UTC)),
        ("delay", "2030-01-31T12:00:00.123Z", "delay", datetime(2030, 1, 31, 12, 0, 0, 123000, tzinfo=UTC)),
        ("delay", "2030-01-31T12:00:00+02:00", "delay", datetime(2030, 1, 31, 10, tzinfo=UTC)),
        ("delay", "1999-01-01T00:00:00", "delay", datetime(1999, 1, 1, tzinfo=UTC)),
        ("ttl", 90, "ttl", timedelta(seconds=90)),
        ("ttl", "10m", "ttl", timedelta(minutes=10)),
        ("ttl", 0, "ttl", None),
        ("ttl", "0s", "ttl", None),
        ("queue", {"name": "mail", "concurrencyLimit": 3}, "queue", "mail"),
        ("queue", "mail", "queue", "mail"),
        ("concurrencyKey", "user-1", "concurrency_key", "user-1"),
        ("concurrencyKey", 17, "concurrency_key", "17"),
        ("concurrencyKey", 1.5, "concurrency_key", "1.5"),
        ("priority", -(2**31), "priority", -(2**31)),
        ("priority", 2**31 - 1, "priority", 2**31 - 1),
        ("machine", "small-1x", "machine", "small-1x"),
        ("region", "eu-central-1", "region", "eu-central-1"),
        ("maxAttempts", 1, "max_attempts", 1),
        ("maxAttempts", 100, "max_attempts", 100),
        ("maxDuration", 1, "max_duration_s", 1),
        ("maxDuration", 2**31 - 1, "max_duration_s", 2**31 - 1),
        ("test", True, "test", True),
        ("lockToVersion", "20260101.1", "lock_to_version", "20260101.1"),
        ("externalDeploymentId", "d", "external_deployment_id", "d"),
        ("bulkActionId", "b", "bulk_action_id", "b"),
        ("parentRunId", "run_1", "parent_run_id", "run_1"),
        ("parentBatch", "batch_1", "parent_batch", "batch_1"),
        ("metadata", {"a": [1, None]}, "metadata", b'{"a": [1, null]}'),
    ],
)
def test_an_option_is_taken_as_it_is_meant(option: str, value: Any, field: str, expected: Any) -> None:
    assert getattr(parse({option: value}), field) == expected


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("tags", 7, "options.tags"),
        ("tags", {}, "options.tags"),
        ("tags", "", "options.tags"),
        ("tags", "x" * 129, "options.tags"),
        ("tags", ["fine", 7], "options.tags[1]"),
        ("tags", [""], "options.tags[0]"),
        ("tags", ["fine", "x" * 129], "options.tags[1]"),
        ("tags", ["nul\0"], "options.tags[0]"),
        ("tags", [str(n) for n in range(11)], "options.tags"),
        ("idempotencyKey", "", "options.idempotencyKey"),
        ("idempotencyKey", "k" * 2049, "options.idempotencyKey"),
        ("idempotencyKey", 5, "options.idempotencyKey"),
        ("idempotencyKey", "a\0b", "options.idempotencyKey"),
        ("idempotencyKeyTTL", "soon", "options.idempotencyKeyTTL"),
        ("idempotencyKeyTTL", "0s", "options.idempotencyKeyTTL"),
        ("idempotencyKeyTTL", 60, "options.idempotencyKeyTTL"),
        ("idempotencyKeyOptions", "run", "options.idempotencyKeyOptions"),
        ("idempotencyKeyOptions", {"key": 1}, "options.idempotencyKeyOptions.key"),
        ("idempotencyKeyOptions", {"key": "k", "scope": "world"}, "options.idempotencyKeyOptions.scope"),
        ("idempotencyKeyOptions", {"key": "k", "scope": "run"}, "options.parentRunId"),
        ("idempotencyKeyOptions", {"key": "k", "scope": "attempt"}, "options.parentRunId"),
        ("delay", "", "options.delay"),
        ("delay", "-5s", "options.delay"),
        ("delay", "1.5h", "options.delay"),
        ("delay", "1h 30m", "options.delay"),
        ("delay", "30m1h", "options.delay"),
        ("delay", "1H", "options.delay"),
        ("delay", "3651d", "options.delay"),
        ("delay", "9" * 5000 + "s", "options.delay"),
        ("delay", "٣s", "options.delay"),
        ("delay", 60, "options.delay"),
        ("delay", "2030-13-01", "options.delay"),
        ("delay", "2030-02-30", "options.delay"),
        ("delay", "9999-12-31T23:59:59-23:59", "options.delay"),
        ("delay", "0001-01-01T00:00:00+23:59", "options.delay"),
        ("delay", "3000-01-01", "options.delay"),
        ("ttl", -1, "options.ttl"),
        ("ttl", 1.5, "options.ttl"),
        ("ttl", True, "options.ttl"),
        ("ttl", 2**63, "options.ttl"),
        ("ttl", "tomorrow", "options.ttl"),
        ("debounce", "key", "options.debounce"),
        ("debounce", {"delay": "5s"}, "options.debounce.key"),
        ("debounce", {"key": "k"}, "options.debounce.delay"),
        ("debounce", {"key": "k" * 513, "delay": "5s"}, "options.debounce.key"),
        ("debounce", {"key": "k", "delay": "0s"}, "options.debounce.delay"),
        ("debounce", {"key": "k", "delay": "2030-01-01"}, "options.debounce.delay"),
        ("debounce", {"key": "k", "delay": "5s", "mode": "both"}, "options.debounce.mode"),
        ("debounce", {"key": "k", "delay": "5s", "maxDelay": "4s"}, "options.debounce.maxDelay"),
        ("metadataType", "text/html", "options.metadataType"),
        ("payloadType", "text/html", "options.payloadType"),
        ("payloadType", 1, "options.payloadType"),
        ("queue", {}, "options.queue.name"),
        ("queue", {"name": ""}, "options.queue.name"),
        ("queue", [], "options.queue"),
        ("concurrencyKey", True, "options.concurrencyKey"),
        ("concurrencyKey", "", "options.concurrencyKey"),
        ("priority", 2**31, "options.priority"),
        ("priority", -(2**31) - 1, "options.priority"),
        ("priority", 2**63 + 1, "options.priority"),
        ("priority", 10**400, "options.priority"),
        ("priority", 1.5, "options.priority"),
        ("priority", True, "options.priority"),
        ("priority", "1", "options.priority"),
        ("machine", "", "options.machine"),
        ("machine", "m" * 513, "options.machine"),
        ("region", "eu\0", "options.region"),
        ("maxAttempts", 0, "options.maxAttempts"),
        ("maxAttempts", 101, "options.maxAttempts"),
        ("maxDuration", 0, "options.maxDuration"),
        ("maxDuration", 2**31, "options.maxDuration"),
        ("test", "yes", "options.test"),
        ("test", 1, "options.test"),
        ("lockToVersion", 3, "options.lockToVersion"),
        ("externalDeploymentId", [], "options.externalDeploymentId"),
        ("bulkActionId", {}, "options.bulkActionId"),
        ("parentRunId", 7, "options.parentRunId"),
        ("parentBatch", "p" * 513, "options.parentBatch"),
        ("resumeParentOnCompletion", True, "options.parentRunId"),
        ("resumeParentOnCompletion", "true", "options.resumeParentOnCompletion"),
    ],
)
def test_an_option_that_cannot_be_is_named(option: str, value: Any, field: str) -> None:
    assert list(option_errors(**{option: value})) == [field]


INTEGERS: list[tuple[str, int]] = [
    ("0", 0),
    ("-0", 0),
    ("-0.0", 0),
    ("0e99999999", 0),
    ("1.0", 1),
    ("-7.000", -7),
    ("3e3", 3000),
    ("3.0E+3", 3000),
    ("30000e-1", 3000),
    ("2147483647.0", 2**31 - 1),
    ("-2147483648.0", -(2**31)),
    (f"1.{'0' * 5000}", 1),
]
NO_INTEGERS = [
    *("0.5", "1e-1", "2999.9999999999999999999999999", "2147483646.0000000001", "1e-400", "1e-99999999999999999999"),
    *("2147483648.0", "1e10", "1e309", "-1e309", "1e999999999", "1e99999999999999999999", f"0.{'0' * 5000}1"),
]


@pytest.mark.parametrize(("written", "number"), INTEGERS)
def test_an_integer_may_be_written_with_a_fraction_of_nothing_or_an_exponent(written: str, number: int) -> None:
    assert parse_trigger("task", f'{{"options": {{"priority": {written}}}}}'.encode(), {}).priority == number


@pytest.mark.parametrize("written", NO_INTEGERS)
def test_a_number_that_is_no_integer_in_range_is_named_with_the_range(written: str) -> None:
    errors = errors_of(f'{{"options": {{"priority": {written}}}}}'.encode())
    assert errors == {"options.priority": "expected an integer from -2147483648 to 2147483647"}


def test_every_option_that_is_an_integer_may_be_written_so_and_what_is_passed_on_keeps_its_bytes() -> None:
    request = parse_trigger(
        "task",
        b"""{"payload": {"n": 3000.0}, "context": 1e0, "options": {"metadata": {"n": 2.0}, "priority": 5.0, "maxAttempts": 1e1,
        "maxDuration": 60.0, "ttl": 3.6e3, "concurrencyKey": 7.0}}""",
        {},
    )
    assert (request.payload, request.context, request.metadata) == (b'{"n": 3000.0}', b"1e0", b'{"n": 2.0}')
    assert (request.priority, request.max_attempts, request.max_duration_s) == (5, 10, 60)
    assert (request.ttl, request.concurrency_key) == (timedelta(hours=1), "7.0")


@pytest.mark.parametrize(
    "option",
    [
        "idempotencyKey",
        "tags",
        "machine",
        "region",
        "concurrencyKey",
        "queue",
        "lockToVersion",
        "externalDeploymentId",
        "bulkActionId",
        "parentRunId",
        "parentBatch",
    ],
)
@pytest.mark.parametrize("text", ["a\\u0000", "\\ud800", "\\udc00 and more", "\\ud83d\\ud83d"])
def test_nul_and_half_characters_are_refused_in_every_text_option(option: str, text: str) -> None:
    assert errors_of(f'{{"options": {{"{option}": "{text}"}}}}'.encode()) == {f"options.{option}": UNSTORABLE}


def test_all_mistakes_of_a_request_are_told_at_once() -> None:
    body = json.dumps(
        {"payload": 1, "options": {"tags": [1, ""], "delay": "soon", "payloadType": "text/plain"}}
    ).encode()
    assert list(errors_of(body, {"idempotency-key": "k" * 2049}, "bell\a")) == [
        "taskId",
        "payload",
        "idempotency-key",
        "options.tags[0]",
        "options.tags[1]",
        "options.delay",
    ]


def test_however_many_mistakes_there_are_the_list_of_them_stays_short() -> None:
    assert len(option_errors(tags=[1] * 10_000)) == 50


def test_a_wrong_type_is_told_with_what_was_expected() -> None:
    assert option_errors(test=1, machine=[], ttl={}, tags=False)["options.test"] == "expected a boolean, got a number"
    assert option_errors(machine=[])["options.machine"] == "expected a string, got an array"


def test_an_unreadable_duration_shows_the_accepted_forms() -> None:
    assert "1h30m" in option_errors(delay="later")["options.delay"]
    assert "2030-01-31" in option_errors(delay="later")["options.delay"]
    assert "1h30m" in option_errors(ttl=[])["options.ttl"]


@pytest.mark.parametrize("options", [{}, None, dict.fromkeys(("tags", "delay", "ttl", "debounce", "metadata"))])
def test_null_options_are_absent_ones(options: Any) -> None:
    body = json.dumps({"payload": {}, "options": options}).encode()
    assert parse_trigger("task", body, {}) == TriggerRequest(task_id="task", payload=b"{}")


def test_unknown_fields_are_ignored() -> None:
    assert parse({"shape": "round"}, colour="red") == TriggerRequest(task_id="task")


# --- the body ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[1,",
        b"nothing",
        b'{"payload": NaN}',
        b'{"payload": Infinity}',
        b'{"payload": "\xff"}',
        b'\xef\xbb\xbf{"payload": 1}',
        b'{"payload": 1} x',
        b'{"payload": 01}',
        b'{"payload": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"payload": "\\ud800"}',
        b'{"unknown": "\\udc00"}',
        b'{"\\udc00": 1}',
        b'{"a": "\\ud800", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"options": {"metadata": {"a": "\\ud800"}}}',
    ],
)
def test_a_body_that_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBodyError):
        parse_trigger("task", body, {})


@pytest.mark.parametrize("body", [b"[]", b"null", b"7", b'"text"'])
def test_a_body_that_is_no_object_is_invalid(body: bytes) -> None:
    assert list(errors_of(body)) == ["body"]


@pytest.mark.parametrize("options", ["[]", '"delay"', "3"])
def test_options_that_are_no_object_are_invalid(options: str) -> None:
    assert list(errors_of(f'{{"options": {options}}}'.encode())) == ["options"]


@pytest.mark.parametrize("task_id", ["", "t" * 257, "a\nb", "a\0b", "\x7f", "\ud800"])
def test_a_task_id_has_to_be_printable(task_id: str) -> None:
    assert list(errors_of(b"{}", task_id=task_id)) == ["taskId"]


@pytest.mark.parametrize("task_id", ["a/b", "with space", "t" * 256, "émoji 🎈", "%2F", "."])
def test_a_task_id_may_be_any_printable_text(task_id: str) -> None:
    assert parse_trigger(task_id, b"{}", {}).task_id == task_id


# --- payload, context, metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"1e309",
        b"9007199254740993",
        b"123456789012345678901234567890",
        b"[ ]",
        b'{"a" : 1,\n "a":2}',
        b'"\\u0000"',
        b"null",
        b"false",
        b'"\xf0\x9f\x8e\x88"',
    ],
)
def test_a_payload_keeps_its_bytes(payload: bytes) -> None:
    request = parse_trigger("task", b'{"payload": ' + payload + b"}", {})
    assert (request.payload, request.payload_type) == (payload, "application/json")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("application/json", '{"a" :1e309}'),
        ("application/super+json", '{"json": [1],"meta":{}}'),
        ("text/plain", "not { json \0"),
        ("text/plain", ""),
        ("application/store", "packets/1.json"),
    ],
)
def test_a_payload_with_a_format_is_the_text_of_a_string(form: str, text: str) -> None:
    request = parse({"payloadType": form}, payload=text)
    assert (request.payload, request.payload_type) == (text.encode(), form)


@pytest.mark.parametrize(
    ("form", "payload"),
    [
        ("application/json", "{"),
        ("application/json", ""),
        ("application/json", '"\\ud800"'),
        ("application/json", "[" * 100_000 + "]" * 100_000),
        ("application/super+json", "nope"),
        ("application/super+json", "[1]"),
        ("application/super+json", '{"meta": {}}'),
        ("application/json", {"a": 1}),
        ("text/plain", 7),
    ],
)
def test_a_payload_that_is_not_in_its_format_is_refused(form: str, payload: Any) -> None:
    assert list(errors_of(json.dumps({"payload": payload, "options": {"payloadType": form}}).encode())) == ["payload"]


def test_a_payload_with_half_of_a_surrogate_pair_is_told_so() -> None:
    text = '{"json":"\\ud800"}'
    body = json.dumps({"payload": text, "options": {"payloadType": "application/super+json"}}).encode()
    assert errors_of(body)["payload"].endswith("holds half of a surrogate pair, which is no character")


def test_no_payload_at_all_is_an_empty_one() -> None:
    assert parse().payload == b""
    assert parse({"payloadType": "application/json"}).payload == b""


def test_context_keeps_its_bytes_and_null_is_none() -> None:
    assert parse_trigger("task", b'{"context": {"n" : 1e400}}', {}).context == b'{"n" : 1e400}'
    assert parse_trigger("task", b'{"context": null}', {}).context is None


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("application/json", '{"a" :1}', b'{"a" :1}'),
        ("application/super+json", '{"json":{"a" :1},"meta":{}}', b'{"a" :1}'),
        ("text/plain", "plain", b'"plain"'),
    ],
)
def test_metadata_with_a_format_is_kept_as_the_json_it_stands_for(form: str, text: str, expected: bytes) -> None:
    request = parse({"metadata": text, "metadataType": form})
    assert (request.metadata, request.metadata_type) == (expected, "application/json")


def test_metadata_that_is_not_in_its_format_is_refused() -> None:
    assert list(option_errors(metadata="{", metadataType="application/json")) == ["options.metadata"]
    assert list(option_errors(metadata={}, metadataType="application/json")) == ["options.metadata"]
    assert list(option_errors(metadata="{}", metadataType="application/super+json")) == ["options.metadata"]


# --- keys, debounce, parents ---------------------------------------------------------------------------------------


def test_a_given_key_is_the_bound_one_and_its_options_tell_what_to_show() -> None:
    request = parse({"idempotencyKey": "hash", "idempotencyKeyOptions": {"key": "order-1", "scope": "run"}})
    assert (request.idempotency_key, request.idempotency_key_shown) == ("hash", "order-1")


@pytest.mark.parametrize(
    ("scope", "bound"),
    [
        ({}, "order-1"),
        ({"scope": "global"}, "order-1"),
        ({"scope": "run"}, hashlib.sha256(b"order-1-run_1").hexdigest()),
        ({"scope": "attempt"}, hashlib.sha256(b"order-1-run_1").hexdigest()),
        ({"scope": "attempt", "attempt": 2}, hashlib.sha256(b"order-1-run_1-2").hexdigest()),
    ],
)
def test_a_key_with_a_scope_alone_is_bound_within_it(scope: dict[str, Any], bound: str) -> None:
    request = parse({"idempotencyKeyOptions": {"key": "order-1", **scope}, "parentRunId": "run_1"})
    assert (request.idempotency_key, request.idempotency_key_shown) == (bound, "order-1")


def test_headers_carry_keys_too_and_the_options_win() -> None:
    headers = {"idempotency-key": "of header", "idempotency-key-ttl": "1h", "x-trigger-request-idempotency-key": "req"}
    by_header = parse({}, headers)
    assert (by_header.idempotency_key, by_header.idempotency_lifetime) == ("of header", timedelta(hours=1))
    assert by_header.request_key == "req"
    both = parse({"idempotencyKey": "of body", "idempotencyKeyTTL": "2h"}, headers)
    assert (both.idempotency_key, both.idempotency_lifetime) == ("of body", timedelta(hours=2))


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("idempotency-key", "k" * 2049),
        ("idempotency-key", "a\0b"),
        ("idempotency-key-ttl", "soon"),
        ("idempotency-key-ttl", "0s"),
        ("x-trigger-request-idempotency-key", "k" * 2049),
        ("x-trigger-source", "s" * 513),
    ],
)
def test_a_header_that_cannot_be_is_named(header: str, value: str) -> None:
    assert list(errors_of(b"{}", {header: value})) == [header]


def test_debounce_has_a_ceiling_of_an_hour_or_of_its_own_delay() -> None:
    hour, two = timedelta(hours=1), timedelta(hours=2)
    assert parse({"debounce": {"key": "k", "delay": "5s"}}).debounce == Debounce(
        key="k", delay=timedelta(seconds=5), max_delay=hour
    )
    assert parse({"debounce": {"key": "k", "delay": "2h", "mode": "trailing"}}).debounce == Debounce(
        key="k", delay=two, mode="trailing", max_delay=two
    )


def test_a_parent_that_waits_makes_it_a_trigger_and_wait() -> None:
    assert parse({"parentRunId": "run_1"}).trigger_function == "trigger"
    request = parse({"parentRunId": "run_1", "resumeParentOnCompletion": True})
    assert (request.trigger_function, request.resume_parent_on_completion) == ("triggerAndWait", True)


@pytest.mark.parametrize(
    ("parent", "state", "kept"),
    [
        (TRACEPARENT, "a=1,b=2", (TRACEPARENT, "a=1,b=2")),
        (TRACEPARENT, "", (TRACEPARENT, None)),
        (TRACEPARENT, "x" * 513, (TRACEPARENT, None)),
        ("01-" + TRACEPARENT[3:] + "-extra", "a=1", ("01-" + TRACEPARENT[3:] + "-extra", "a=1")),
        (TRACEPARENT + "-extra", "a=1", (None, None)),
        ("ff" + TRACEPARENT[2:], "a=1", (None, None)),
        (TRACEPARENT.upper(), "a=1", (None, None)),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", "a=1", (None, None)),
        ("00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01", "a=1", (None, None)),
        ("rubbish", "a=1", (None, None)),
        ("", "a=1", (None, None)),
    ],
)
def test_a_trace_is_kept_only_when_it_conforms(parent: str, state: str, kept: tuple[str | None, str | None]) -> None:
    request = parse({}, {"traceparent": parent, "tracestate": state})
    assert (request.traceparent, request.tracestate) == kept


# --- for every input -----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OPTIONS = [
    *("tags", "delay", "ttl", "debounce", "idempotencyKey", "idempotencyKeyTTL", "idempotencyKeyOptions", "metadata"),
    *("metadataType", "payloadType", "queue", "concurrencyKey", "priority", "machine", "maxAttempts", "maxDuration"),
    *("test", "parentRunId", "resumeParentOnCompletion", "parentBatch", "lockToVersion"),
]


def encodable(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError):
        return False
    return True


@given(value=json_values.filter(encodable), ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]))
def test_the_bytes_of_any_json_payload_are_kept(value: Any, ascii_only: bool, indent: int | None) -> None:
    payload = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert parse_trigger("task", b'{"payload":' + payload + b"}", {}).payload == payload


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_bytes_of_any_text_payload_are_kept(text: str) -> None:
    assert parse({"payloadType": "text/plain"}, payload=text).payload == text.encode()


@given(
    body=st.binary() | st.text(alphabet='{}[]":,\\ud8c0a1en.-+ ').map(str.encode),
    headers=st.dictionaries(st.sampled_from(["idempotency-key", "idempotency-key-ttl", "traceparent"]), st.text()),
)
@example(b'{"":"\\ud800"}', {})
def test_no_body_at_all_is_more_than_invalid(body: bytes, headers: dict[str, str]) -> None:
    with contextlib.suppress(InvalidRequestError, MalformedBodyError):
        parse_trigger("task", body, headers)


@given(options=st.dictionaries(st.sampled_from(OPTIONS), json_values), payload=json_values, task_id=st.text())
def test_no_options_at_all_are_more_than_invalid(options: dict[str, Any], payload: Any, task_id: str) -> None:
    body = json.dumps({"payload": payload, "options": options}).encode()
    try:
        request = parse_trigger(task_id, body, {})
    except (InvalidRequestError, MalformedBodyError):
        return
    assert "\0" not in request.task_id
    assert len(request.tags) <= 10
