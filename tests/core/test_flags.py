"""Feature flags: the organization's own override, then the global row, then off; whatever does not parse counts as absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mollifier.flags import ORG_FLAG, FlagResolver
from mollifier.model import GateInputs

ABSENT: dict[str, Any] = {}
ON: dict[str, Any] = {ORG_FLAG: True}
OFF: dict[str, Any] = {ORG_FLAG: False}


def resolve(org_flags: Any, global_flags: Any) -> bool:
    return FlagResolver(lambda: global_flags)(GateInputs(org_id="org", env_id="env", org_flags=org_flags))


def test_the_flag_has_the_name_that_operators_use() -> None:
    assert ORG_FLAG == "mollifierEnabled"


@pytest.mark.parametrize(
    ("org_flags", "global_flags", "on"),
    [
        (ABSENT, ABSENT, False),
        (None, ABSENT, False),
        (ABSENT, ON, True),
        (None, ON, True),
        (ABSENT, OFF, False),
        (ON, ABSENT, True),
        (ON, ON, True),
        (ON, OFF, True),
        (OFF, ABSENT, False),
        (OFF, ON, False),
        (OFF, OFF, False),
    ],
)
def test_the_override_wins_over_the_global_row_and_that_over_off(org_flags: Any, global_flags: Any, on: bool) -> None:
    assert resolve(org_flags, global_flags) is on


NOT_FLAGS = [None, [], ["mollifierEnabled"], "", "true", '{"mollifierEnabled": true}', b"{}", 0, 1, True, False, 1.5]
NOT_BOOLEANS = [
    None,
    "true",
    "false",
    "on",
    "",
    0,
    1,
    1.0,
    [],
    [True],
    {},
    {"mollifierEnabled": True},
    {"enabled": True},
]


@pytest.mark.parametrize("shared", [ON, OFF], ids=["global on", "global off"])
@pytest.mark.parametrize("org_flags", NOT_FLAGS, ids=repr)
def test_flags_that_are_no_object_count_as_absent(org_flags: Any, shared: Mapping[str, Any]) -> None:
    assert resolve(org_flags, shared) is shared[ORG_FLAG]


@pytest.mark.parametrize("shared", [ON, OFF], ids=["global on", "global off"])
@pytest.mark.parametrize("value", NOT_BOOLEANS, ids=repr)
def test_an_override_that_is_no_boolean_counts_as_absent(value: Any, shared: Mapping[str, Any]) -> None:
    assert resolve({ORG_FLAG: value}, shared) is shared[ORG_FLAG]


@pytest.mark.parametrize("value", NOT_BOOLEANS, ids=repr)
def test_a_global_row_that_is_no_boolean_counts_as_absent(value: Any) -> None:
    assert resolve(ABSENT, {ORG_FLAG: value}) is False
    assert resolve(ON, {ORG_FLAG: value}) is True


@given(st.dictionaries(st.text().filter(lambda name: name != ORG_FLAG), st.booleans() | st.none() | st.text()))
def test_other_flags_never_bleed_into_this_one(others: dict[str, Any]) -> None:
    assert resolve(others, others) is False
    assert resolve(others | ON, others) is True
    assert resolve(others | OFF, others | ON) is False


@pytest.mark.parametrize("name", ["mollifierenabled", "MOLLIFIERENABLED", " mollifierEnabled", "mollifier", "enabled"])
def test_a_flag_of_almost_the_same_name_is_another_flag(name: str) -> None:
    assert resolve({name: True}, {name: True}) is False


def test_one_organizations_override_never_reaches_another() -> None:
    resolver = FlagResolver(lambda: ABSENT)
    assert resolver(GateInputs(org_id="enrolled", env_id="a", org_flags=ON)) is True
    assert resolver(GateInputs(org_id="other", env_id="b", org_flags=None)) is False
    assert resolver(GateInputs(org_id="enrolled", env_id="a", org_flags=OFF)) is False


def test_a_change_of_the_global_row_counts_from_the_next_trigger() -> None:
    rows: dict[str, Any] = {}
    resolver = FlagResolver(lambda: rows)
    inputs = GateInputs(org_id="org", env_id="env")
    assert resolver(inputs) is False
    rows[ORG_FLAG] = True
    assert resolver(inputs) is True
    del rows[ORG_FLAG]
    assert resolver(inputs) is False
