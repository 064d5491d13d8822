"""Reading entries: whatever is in a field, the error names the field and quotes nothing of a customer's."""

from __future__ import annotations

import pytest

from mollifier import entries
from mollifier.errors import MalformedEntryError
from mollifier.model import Entry

FIELDS = {
    b"org": b"org",
    b"env": b"env",
    b"kind": b"held",
    b"state": b"QUEUED",
    b"seq": b"1",
    b"accepted_ms": b"1",
    b"payload": b"payload",
}
CANARY = b"canary \xff"


def test_an_entry_with_the_fields_that_it_needs_is_read() -> None:
    assert isinstance(entries.parse("run", FIELDS), Entry)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {b"payload"}))
def test_a_field_that_is_missing_is_named(name: bytes) -> None:
    read = entries.parse("run", {field: value for field, value in FIELDS.items() if field != name})

    assert isinstance(read, MalformedEntryError)
    assert repr(name.decode()) in str(read)


@pytest.mark.parametrize(
    "name",
    [
        *sorted(FIELDS.keys() - {b"payload"}),
        *(b"attempts", b"reclaims", b"lease", b"not_before_ms", b"patches", b"bindings", b"failed_ms"),
    ],
)
def test_a_field_that_does_not_read_is_named_and_not_quoted(name: bytes) -> None:
    read = entries.parse("run", {**FIELDS, name: CANARY})

    assert isinstance(read, MalformedEntryError)
    assert repr(name.decode()) in str(read)
    assert "canary" not in str(read)


@pytest.mark.parametrize("name", [b"kind", b"state"])
def test_a_text_that_is_none_of_those_there_are_is_named_and_not_quoted(name: bytes) -> None:
    read = entries.parse("run", {**FIELDS, name: b"canary"})

    assert isinstance(read, MalformedEntryError)
    assert repr(name.decode()) in str(read)
    assert "canary" not in str(read)
