from collections.abc import Sequence

import psycopg
import pytest

from mollifier.postgres.api_keys import key_hash
from tests.cli.conftest import Cli


def test_a_new_tenant_gets_everything_it_needs_to_trigger_in_one_command(configured: Cli, database_url: str) -> None:
    made = configured("key", "create", "--new-tenant", "Acme Inc", "--json")
    assert made.code == 0
    assert made.json.keys() == {"org_id", "project_id", "env_id", "api_key"}
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT o.id, o.name, p.id, e.id, k.key_hash FROM organizations o JOIN projects p ON p.organization_id = o.id "
            "JOIN environments e ON e.project_id = p.id JOIN api_keys k ON k.environment_id = e.id"
        ).fetchall()
    org_id, project_id, env_id = (made.json[name] for name in ("org_id", "project_id", "env_id"))
    assert rows == [(org_id, "Acme Inc", project_id, env_id, key_hash(made.json["api_key"]))]


def test_a_tenant_can_be_made_step_by_step(configured: Cli) -> None:
    org_id = configured("org", "create", "Acme", "--json").json["org_id"]
    project_id = configured("project", "create", "Billing", "--org", org_id, "--json").json["project_id"]
    env_id = configured("env", "create", "staging", "--project", project_id, "--json").json["env_id"]
    key = configured("key", "create", "--env", env_id, "--json").json
    assert key["env_id"] == env_id
    assert [each["org_id"] for each in configured("org", "list", "--json").json] == [org_id]
    assert [each["name"] for each in configured("project", "list", "--org", org_id, "--json").json] == ["Billing"]
    assert [each["name"] for each in configured("env", "list", "--project", project_id, "--json").json] == ["staging"]
    assert [each["key_id"] for each in configured("key", "list", "--env", env_id, "--json").json] == [key["key_id"]]


def test_results_are_on_stdout_and_remarks_on_stderr(configured: Cli) -> None:
    made = configured("key", "create", "--new-tenant", "Acme")
    names = [line.split()[0] for line in made.out.splitlines()]
    assert names == ["org_id", "project_id", "env_id", "api_key"]
    assert "only its hash is stored" in made.err


def test_a_list_for_people_shows_ids_and_names_whole(configured: Cli) -> None:
    name = "A name that is longer than any terminal of eighty columns would show in one of five columns"
    org_id = configured("org", "create", name, "--json").json["org_id"]
    listed = configured("org", "list")
    header, row = listed.out.splitlines()
    assert header.split() == ["org_id", "name", "flags", "created_at"]
    assert row.startswith(org_id)
    assert name in row


@pytest.mark.parametrize("name", ["[bold]Acme[/bold]", "\u202fÆcme 株式会社"])
def test_a_name_is_shown_as_it_is(configured: Cli, name: str) -> None:
    configured("org", "create", name)
    assert name.strip() in configured("org", "list").out


def test_an_empty_list_is_an_empty_array_for_programs_and_a_hint_for_people(configured: Cli) -> None:
    assert configured("org", "list", "--json").json == []
    listed = configured("org", "list")
    assert (listed.code, listed.out) == (0, "")
    assert "mollifier org create" in listed.err


def test_a_revoked_key_stays_in_the_list(configured: Cli) -> None:
    tenant = configured("key", "create", "--new-tenant", "Acme", "--json").json
    (key,) = configured("key", "list", "--env", tenant["env_id"], "--json").json
    assert key["revoked_at"] is None
    revoked = configured("key", "revoke", key["key_id"], "--env", tenant["env_id"], "--json")
    assert revoked.json["revoked_at"] is not None
    assert configured("key", "list", "--env", tenant["env_id"], "--json").json == [revoked.json]


def test_a_rotated_key_goes_on_for_its_overlap_and_the_new_one_is_shown_once(
    configured: Cli, database_url: str
) -> None:
    tenant = configured("key", "create", "--new-tenant", "Acme", "--json").json
    env = ("--env", tenant["env_id"])
    (key,) = configured("key", "list", *env, "--json").json
    rotated = configured("key", "rotate", key["key_id"], *env, "--overlap", "1h", "--json")
    assert rotated.json["replaced_key_id"] == key["key_id"]
    old, new = configured("key", "list", *env, "--json").json
    assert (old["expires_at"], new["key_id"]) == (rotated.json["replaced_expires_at"], rotated.json["key_id"])
    assert rotated.json["api_key"].startswith(new["prefix"])
    assert "only its hash is stored" in rotated.err
    again = configured("key", "rotate", key["key_id"], *env)
    assert (again.code, again.out, len(again.err.splitlines())) == (1, "", 1)


@pytest.mark.parametrize("overlap", ["soon", "91d", "-1h"])
def test_an_overlap_that_cannot_be_exits_2_and_rotates_nothing(configured: Cli, overlap: str) -> None:
    tenant = configured("key", "create", "--new-tenant", "Acme", "--json").json
    env = ("--env", tenant["env_id"])
    keys = configured("key", "list", *env, "--json").json
    ended = configured("key", "rotate", keys[0]["key_id"], *env, "--overlap", overlap)
    assert (ended.code, ended.out) == (2, "")
    assert "overlap" in ended.err
    assert configured("key", "list", *env, "--json").json == keys


@pytest.mark.parametrize(
    ("arguments", "noun", "hint"),
    [
        (["project", "list", "--org", "org_x"], "organization 'org_x'", "mollifier org list"),
        (["project", "create", "Billing", "--org", "org_x"], "organization 'org_x'", "mollifier org list"),
        (["env", "create", "--project", "proj_x"], "project 'proj_x'", "mollifier project list"),
        (["env", "list", "--project", "proj_x"], "project 'proj_x'", "mollifier project list"),
        (["key", "create", "--env", "env_x"], "environment 'env_x'", "mollifier env list"),
        (["key", "list", "--env", "env_x"], "environment 'env_x'", "mollifier env list"),
        (["key", "revoke", "key_x", "--env", "env_x"], "API key 'key_x'", "mollifier key list"),
        (["key", "rotate", "key_x", "--env", "env_x"], "environment 'env_x'", "mollifier env list"),
        (["flags", "get", "--org", "org_x"], "organization 'org_x'", "mollifier org list"),
        (["flags", "set", "a", "1", "--org", "org_x"], "organization 'org_x'", "mollifier org list"),
        (["flags", "unset", "a", "--org", "org_x"], "organization 'org_x'", "mollifier org list"),
    ],
    ids=" ".join,
)
def test_an_unknown_id_is_named_with_the_command_that_lists_the_known_ones(
    configured: Cli, arguments: Sequence[str], noun: str, hint: str
) -> None:
    ended = configured(*arguments)
    assert (ended.code, ended.out) == (1, "")
    assert len(ended.err.splitlines()) == 1
    assert noun in ended.err
    assert hint in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["org", "create", " "], "name"),
        (["org", "create", "x" * 201], "name"),
        (["env", "create", "Not A Slug", "--project", "proj_x"], "name"),
        (["key", "create"], "--new-tenant"),
        (["key", "create", "--env", "env_x", "--new-tenant", "Acme"], "--new-tenant"),
        (["project", "list"], "--org"),
    ],
    ids=["blank name", "long name", "environment name", "no target", "two targets", "no organization"],
)
def test_bad_usage_exits_2_names_the_argument_and_changes_nothing(
    configured: Cli, arguments: Sequence[str], said: str
) -> None:
    ended = configured(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert configured("org", "list", "--json").json == []


def test_a_name_that_is_taken_fails_with_one_line(configured: Cli) -> None:
    org_id = configured("org", "create", "Acme", "--json").json["org_id"]
    project_id = configured("project", "create", "Billing", "--org", org_id, "--json").json["project_id"]
    assert configured("env", "create", "--project", project_id).code == 0
    again = configured("env", "create", "--project", project_id)
    assert again.code == 1
    assert len(again.err.splitlines()) == 1
