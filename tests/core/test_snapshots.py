"""Snapshots: every field survives the bytes, newer ones are passed over, and garbage is nobody's retry."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier import snapshots
from mollifier.errors import NonRetryableError
from mollifier.model import Debounce, Snapshot

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SMALL = Snapshot(run_id="run", org_id="org", env_id="env", task_id="task", created_at=NOW)

text = st.text(st.characters(codec="utf-8"), max_size=20)
moments = st.datetimes(timezones=st.just(UTC))
spans = st.timedeltas(timedelta(0), timedelta(days=400))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": text,
    "str | None": st.none() | text,
    "bytes": st.binary(max_size=200),
    "bytes | None": st.none() | st.binary(max_size=200),
    "bool": st.booleans(),
    "int": st.integers(-(2**31), 2**31),
    "int | None": st.none() | st.integers(0, 2**31),
    "datetime": moments,
    "datetime | None": st.none() | moments,
    "tuple[str, ...]": st.lists(text, max_size=10).map(tuple),
    "Debounce | None": st.none()
    | st.builds(Debounce, key=text, delay=spans, mode=st.sampled_from(["leading", "trailing"]), max_delay=spans),
    "TriggerFunction": st.sampled_from(["trigger", "triggerAndWait", "batchTrigger", "batchTriggerAndWait"]),
}
any_snapshot = st.builds(
    Snapshot, **{name: VALUES[str(annotation)] for name, annotation in Snapshot.__annotations__.items()}
)


@given(any_snapshot)
def test_every_field_of_a_snapshot_survives(snapshot: Snapshot) -> None:
    assert snapshots.decode(snapshots.encode(snapshot)) == snapshot


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"9007199254740993", b'"\\u0000"', b"\x00\xff\xfe", "\N{PILE OF POO}".encode()]
)
def test_payload_bytes_survive_untouched(payload: bytes) -> None:
    snapshot = msgspec.structs.replace(SMALL, payload=payload, metadata=payload, context=payload)
    again = snapshots.decode(snapshots.encode(snapshot))
    assert (again.payload, again.metadata, again.context) == (payload, payload, payload)


def test_what_has_its_default_takes_no_space() -> None:
    assert len(snapshots.encode(SMALL)) < 100


def test_fields_that_a_newer_version_added_are_passed_over() -> None:
    newer = msgspec.msgpack.decode(snapshots.encode(SMALL)) | {"from_the_future": {"nested": [1, 2, 3]}}
    assert snapshots.decode(msgspec.msgpack.encode(newer)) == SMALL


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no MessagePack": b"\xc1",
    "cut off": snapshots.encode(SMALL)[:-3],
    "trailing bytes": snapshots.encode(SMALL) + b"\x00",
    "a list": msgspec.msgpack.encode([1, 2, 3]),
    "JSON": msgspec.json.encode(SMALL),
    "fields missing": msgspec.msgpack.encode({"run_id": "run"}),
    "a number for a name": msgspec.msgpack.encode(msgspec.to_builtins(SMALL) | {"task_id": 7}),
    "no moment": msgspec.msgpack.encode(msgspec.to_builtins(SMALL) | {"created_at": "yesterday"}),
    "bytes that are no text": snapshots.encode(SMALL).replace(b"\xa4task", b"\xa4\xff\xfe\xfd\xfc"),
    "endless nesting": b"\x82\xa1x" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("payload", DAMAGED.values(), ids=DAMAGED.keys())
def test_bytes_that_are_no_snapshot_are_not_worth_a_retry(payload: bytes) -> None:
    with pytest.raises(NonRetryableError, match="not a snapshot"):
        snapshots.decode(payload)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_snapshot_or_not_worth_a_retry(payload: bytes) -> None:
    with contextlib.suppress(NonRetryableError):
        assert isinstance(snapshots.decode(payload), Snapshot)
