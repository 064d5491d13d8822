"""Operations on a run's metadata: what each does, and that nothing else is touched."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.errors import InvalidRequestError
from mollifier.metadata import METADATA_BYTES_MAX, apply, check_growth
from mollifier.model import MetadataOperation


def operation(kind: str, key: str | None = None, value: bytes | None = None) -> MetadataOperation:
    return MetadataOperation(type=kind, key=key, value=value)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("before", "kind", "value", "after"),
    [
        (None, "set", b"1", b'{"k":1}'),
        (b"", "set", b"1", b'{"k":1}'),
        (b"null", "set", b"1", b'{"k":1}'),
        (b'{"k":2}', "set", b'{"deep": [1, 2.50]}', b'{"k":{"deep": [1, 2.50]}}'),
        (b'{"k":2,"l":3}', "delete", None, b'{"l":3}'),
        (b'{"l":3}', "delete", None, b'{"l":3}'),
        (None, "append", b"1", b'{"k":[1]}'),
        (b'{"k":[]}', "append", b"1", b'{"k":[1]}'),
        (b'{"k":[1e400, "a"]}', "append", b"[]", b'{"k":[1e400,"a",[]]}'),
        (b'{"k":"single"}', "append", b"1", b'{"k":["single",1]}'),
        (b'{"k":[1,2,1]}', "remove", b"1", b'{"k":[2]}'),
        (b'{"k":[1,true,"1",1.0]}', "remove", b"1", b'{"k":[true,"1"]}'),
        (b'{"k":[{"a":1,"b":2}]}', "remove", b'{"b":2,"a":1}', b'{"k":[]}'),
        (b'{"k":[9007199254740993,9007199254740992]}', "remove", b"9007199254740993", b'{"k":[9007199254740992]}'),
        (b'{"k":[1e400,1e401]}', "remove", b"1e400", b'{"k":[1e401]}'),
        (b'{"l":1}', "remove", b"1", b'{"l":1}'),
        (None, "increment", b"5", b'{"k":5}'),
        (b'{"k":1}', "increment", b"-3", b'{"k":-2}'),
        (b'{"k":1}', "increment", b"0.5", b'{"k":1.5}'),
        (b'{"k":9007199254740993}', "increment", b"1", b'{"k":9007199254740994}'),
        (b'{"k":99999999999999999999999999}', "increment", b"1", b'{"k":100000000000000000000000000}'),
        (b'{"old":1}', "update", b'{"new":{"a":1.0}}', b'{"new":{"a":1.0}}'),
    ],
)
def test_an_operation_makes_of_a_document(before: bytes | None, kind: str, value: bytes | None, after: bytes) -> None:
    key = None if kind == "update" else "k"

    assert apply(before, [operation(kind, key, value)]) == after


def test_operations_apply_in_order() -> None:
    operations = [
        operation("set", "a", b"1"),
        operation("update", None, b'{"b":1}'),
        operation("increment", "b", b"1"),
        operation("append", "b", b"3"),
    ]

    assert apply(b'{"c":1}', operations) == b'{"b":[2,3]}'


@pytest.mark.parametrize(
    ("failing", "field"),
    [
        (operation("increment", "text", b"1"), "operations[1].key"),
        (operation("increment", "true", b"1"), "operations[1].key"),
        (operation("increment", "n", b'"1"'), "operations[1].value"),
        (operation("increment", "n", b"true"), "operations[1].value"),
        (operation("increment", "n", b"1e400"), "operations[1].value"),
        (operation("increment", "huge", b"1e308"), "operations[1].value"),
        (operation("increment", "n", b"1" * 5000), "operations[1].value"),
        (operation("remove", "text", b"1"), "operations[1].key"),
        (operation("update", None, b"[1]"), "operations[1].value"),
        (operation("update", None, b"null"), "operations[1].value"),
        (operation("update"), "operations[1].value"),
        (operation("set", None, b"1"), "operations[1].key"),
        (operation("set", "n"), "operations[1].value"),
        (operation("delete"), "operations[1].key"),
        (operation("remove", "list", b"[" * 100_000 + b"]" * 100_000), "operations[1].value"),
    ],
)
def test_an_operation_that_cannot_be_applied_names_its_field(failing: MetadataOperation, field: str) -> None:
    document = b'{"text":"a","true":true,"n":1,"huge":1e308,"list":[1]}'

    with pytest.raises(InvalidRequestError) as raised:
        apply(document, [operation("set", "ok", b"1"), failing])

    assert raised.value.errors[0].field == field


# What JSON text may look like that a parser and a printer would not give back: spacing, spellings of numbers, escapes.
spelled_values = st.sampled_from(
    [
        b"1e309",
        b"1.0",
        b"-0",
        b"1E+2",
        b"9007199254740993",
        b"[]",
        b"{ }",
        b'"\\u0000"',
        b'"\\/"',
        b"[1 ,2]",
        b'{"a" : []}',
    ]
)
documents = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), spelled_values, max_size=6)


@given(members=documents, key=st.text(st.characters(exclude_categories=["Cs"])), amount=st.integers())
def test_members_that_no_operation_names_keep_their_bytes(members: dict[str, bytes], key: str, amount: int) -> None:
    members.pop(key, None)
    written = b"{" + b" , ".join(json.dumps(name).encode() + b" : " + value for name, value in members.items()) + b"}"

    changed = apply(written, [operation("increment", key, b"%d" % amount), operation("delete", key)])

    expected = {name: value.decode() for name, value in members.items()}
    assert changed.decode() == "{" + ",".join(f"{_spelled(name)}:{value}" for name, value in expected.items()) + "}"


def _spelled(name: str) -> str:
    return msgspec.json.encode(name).decode()


def test_operations_do_not_let_metadata_grow_for_ever() -> None:
    most = b'{"a":"' + b"x" * (METADATA_BYTES_MAX - 8) + b'"}'
    check_growth(b"{}", most)
    check_growth(None, None)
    with pytest.raises(InvalidRequestError, match=f"operations: .*{METADATA_BYTES_MAX}"):
        check_growth(most, most + b" ")


def test_metadata_that_is_over_the_limit_already_may_become_less() -> None:
    over = b" " * (METADATA_BYTES_MAX + 100)
    check_growth(over, over[1:])
    with pytest.raises(InvalidRequestError):
        check_growth(over, over + b" ")
