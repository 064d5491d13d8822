from collections.abc import Sequence

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def org_id(configured: Cli) -> str:
    return configured("org", "create", "Acme", "--json").json["org_id"]


def test_an_organization_is_enrolled_and_nobody_else(configured: Cli, org_id: str) -> None:
    other = configured("org", "create", "Other", "--json").json["org_id"]
    assert configured("flags", "set", "mollifierEnabled", "true", "--org", org_id).code == 0
    assert configured("flags", "get", "mollifierEnabled", "--org", org_id).json is True
    assert configured("flags", "get", "--org", other, "--json").json == {}
    assert configured("flags", "get", "--json").json == {}


def test_the_global_flag_is_set_without_an_organization(configured: Cli, org_id: str) -> None:
    configured("flags", "set", "mollifierEnabled", "true")
    assert configured("flags", "get", "--json").json == {"mollifierEnabled": True}
    assert configured("flags", "get", "--org", org_id, "--json").json == {}


@pytest.mark.parametrize("globally", [True, False], ids=["global", "organization"])
@pytest.mark.parametrize("value", ["5", '"text"', "null", '{"rate": [1.5, {}]}', "[]"])
def test_a_flag_takes_any_json(configured: Cli, org_id: str, value: str, globally: bool) -> None:
    place = [] if globally else ["--org", org_id]
    assert configured("flags", "set", "other", value, *place).code == 0
    assert configured("flags", "get", "other", *place).out.replace(" ", "") == value.replace(" ", "") + "\n"


@pytest.mark.parametrize("globally", [True, False], ids=["global", "organization"])
def test_setting_and_unsetting_leave_other_flags_alone(configured: Cli, org_id: str, globally: bool) -> None:
    place = [] if globally else ["--org", org_id]
    configured("flags", "set", "a", "1", *place)
    assert configured("flags", "set", "b", "2", *place, "--json").json == {"a": 1, "b": 2}
    assert configured("flags", "unset", "a", *place, "--json").json == {"b": 2}
    assert configured("flags", "unset", "a", *place, "--json").json == {"b": 2}


def test_who_sets_a_flag_that_is_none_of_mollifiers_is_told_which_is(configured: Cli, org_id: str) -> None:
    assert "mollifierEnabled" in configured("flags", "set", "mollifierEnabld", "true", "--org", org_id).err
    assert configured("flags", "set", "mollifierEnabled", "true", "--org", org_id).err == ""


def test_a_flag_that_is_not_set_exits_1_and_says_how_to_set_it(configured: Cli) -> None:
    ended = configured("flags", "get", "mollifierEnabled")
    assert (ended.code, ended.out) == (1, "")
    assert "mollifier flags set" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mollifierEnabled", "yes"], "is not JSON"),
        (["mollifierEnabled", "True"], "is not JSON"),
        (["other", "NaN"], "is not JSON"),
        (["mollifierEnabled", '"true"'], "is true or false"),
        (["mollifierEnabled", "1"], "is true or false"),
        (["", "true"], "flag"),
    ],
)
def test_a_bad_flag_exits_2_and_changes_nothing(configured: Cli, arguments: Sequence[str], said: str) -> None:
    ended = configured("flags", "set", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in " ".join(ended.err.split())
    assert configured("flags", "get", "--json").json == {}


def test_people_see_a_line_per_flag(configured: Cli) -> None:
    configured("flags", "set", "b", '"text"')
    assert configured("flags", "set", "a", "true").out.split() == ["a", "true", "b", '"text"']
    configured("flags", "unset", "a")
    nothing_left = configured("flags", "unset", "b")
    assert (nothing_left.code, nothing_left.out, nothing_left.err) == (0, "", "No flag is set.\n")
