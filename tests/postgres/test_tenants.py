"""Tenants: what administrators make, list and revoke."""

from __future__ import annotations

import asyncio

import pytest

from mollifier.errors import ConflictError, InvalidRequestError, NotFoundError
from mollifier.postgres.authentication import Authenticator
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from tests.postgres.support import execute, rows


async def test_a_tenant_is_an_organization_a_project_an_environment_and_a_key_that_works(
    tenants: Tenants, database: Database
) -> None:
    tenant = await tenants.create_tenant("  Acme  ")

    (organization,) = await tenants.list_organizations()
    (project,) = await tenants.list_projects(tenant.org_id)
    (environment,) = await tenants.list_environments(tenant.project_id)
    assert (organization.id, organization.name) == (tenant.org_id, "Acme")
    assert (project.id, project.org_id, project.name) == (tenant.project_id, tenant.org_id, "Acme")
    assert (environment.id, environment.project_id, environment.name) == (tenant.env_id, tenant.project_id, "prod")
    found = await Authenticator(database).authenticate(tenant.api_key)
    assert found is not None
    assert (found.id, found.name, found.project_id, found.org_id) == (
        tenant.env_id,
        "prod",
        tenant.project_id,
        tenant.org_id,
    )


async def test_a_key_names_its_environment_and_is_random_beyond_guessing(tenants: Tenants) -> None:
    tenant = await tenants.create_tenant("Acme", environment="staging-2")

    keys = {(await tenants.create_key(tenant.env_id)).secret for _ in range(20)}

    assert len(keys) == 20
    assert all(key.startswith("tr_staging-2_") and len(key) >= len("tr_staging-2_") + 32 for key in keys)


async def test_a_key_is_stored_as_nothing_that_would_authenticate(tenants: Tenants, database: Database) -> None:
    new = await tenants.create_key((await tenants.create_tenant("Acme")).env_id)

    stored = str(await rows(database, "SELECT * FROM api_keys"))

    assert new.key.prefix == new.secret[: len("tr_prod_") + 6]
    assert new.secret not in stored
    assert new.secret[len(new.key.prefix) :] not in stored


async def test_a_revoked_key_stays_listed_and_stays_revoked(tenants: Tenants, database: Database) -> None:
    tenant = await tenants.create_tenant("Acme")
    new = await tenants.create_key(tenant.env_id)

    revoked = await tenants.revoke_key(tenant.env_id, new.key.id)

    assert revoked.revoked_at is not None
    assert await tenants.revoke_key(tenant.env_id, new.key.id) == revoked
    assert [key.revoked_at is None for key in await tenants.list_keys(tenant.env_id)] == [True, False]
    assert await Authenticator(database).authenticate(new.secret) is None
    assert await Authenticator(database).authenticate(tenant.api_key) is not None


async def test_a_key_is_revoked_through_its_own_environment_only(tenants: Tenants, database: Database) -> None:
    ours, theirs = await tenants.create_tenant("Ours"), await tenants.create_tenant("Theirs")
    (key,) = await tenants.list_keys(theirs.env_id)

    with pytest.raises(NotFoundError):
        await tenants.revoke_key(ours.env_id, key.id)

    assert await Authenticator(database).authenticate(theirs.api_key) is not None


@pytest.mark.parametrize("name", ["", "Prod", "a_b", "-a", "a-", "a" * 41, "a b", "é", "a\n"])
async def test_an_environments_name_that_no_key_can_carry_is_refused(tenants: Tenants, name: str) -> None:
    tenant = await tenants.create_tenant("Acme")

    with pytest.raises(InvalidRequestError, match="name"):
        await tenants.create_environment(tenant.project_id, name)
    with pytest.raises(InvalidRequestError, match="name"):
        await tenants.create_tenant("Acme", environment=name)

    assert len(await tenants.list_organizations()) == 1


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "nul\x00", "line\nbreak", "\ud800"])
async def test_a_name_that_cannot_be_shown_is_refused(tenants: Tenants, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="name"):
        await tenants.create_organization(name)
    with pytest.raises(InvalidRequestError, match="name"):
        await tenants.create_project((await tenants.create_organization("Acme")).id, name)


async def test_a_project_has_one_environment_of_a_name(tenants: Tenants) -> None:
    tenant = await tenants.create_tenant("Acme")

    made = await asyncio.gather(
        *(tenants.create_environment(tenant.project_id, "dev") for _ in range(5)), return_exceptions=True
    )

    assert sum(isinstance(one, ConflictError) for one in made) == 4
    assert [one.name for one in await tenants.list_environments(tenant.project_id)] == ["prod", "dev"]


async def test_nothing_is_made_below_what_does_not_exist(tenants: Tenants) -> None:
    for making in (
        tenants.create_project("org_none", "Project"),
        tenants.create_environment("proj_none", "dev"),
        tenants.create_key("env_none"),
        tenants.list_projects("org_none"),
        tenants.list_environments("proj_none"),
        tenants.list_keys("env_none"),
        tenants.get_organization("org_none"),
        tenants.get_flags("org_none"),
        tenants.set_flags("org_none", {"a": True}),
        tenants.unset_flag("org_none", "a"),
        tenants.revoke_key("env_none", "key_none"),
    ):
        with pytest.raises(NotFoundError):
            await making


async def test_flags_of_one_organization_never_reach_another(tenants: Tenants) -> None:
    ours, theirs = await tenants.create_tenant("Ours"), await tenants.create_tenant("Theirs")

    await tenants.set_flags(ours.org_id, {"mollifierEnabled": True, "other": {"a": [1]}})
    await tenants.set_flags(ours.org_id, {"mollifierEnabled": False})

    assert await tenants.get_flags(ours.org_id) == {"mollifierEnabled": False, "other": {"a": [1]}}
    assert await tenants.get_flags(theirs.org_id) == {}
    assert await tenants.unset_flag(ours.org_id, "mollifierEnabled") == {"other": {"a": [1]}}
    assert await tenants.unset_flag(ours.org_id, "mollifierEnabled") == {"other": {"a": [1]}}


async def test_flags_set_at_once_are_all_set(tenants: Tenants) -> None:
    org_id = (await tenants.create_tenant("Acme")).org_id

    await asyncio.gather(*(tenants.set_flags(org_id, {f"flag{number}": number}) for number in range(20)))

    assert await tenants.get_flags(org_id) == {f"flag{number}": number for number in range(20)}


@pytest.mark.parametrize("stored", ["[1]", '"text"', "3", "null"])
async def test_flags_that_are_no_mapping_count_as_none_and_can_be_replaced(
    tenants: Tenants, database: Database, stored: str
) -> None:
    org_id = (await tenants.create_tenant("Acme")).org_id
    await execute(database, "UPDATE organizations SET feature_flags = CAST(:stored AS jsonb)", stored=stored)

    assert await tenants.get_flags(org_id) == {}
    assert await tenants.set_flags(org_id, {"a": True}) == {"a": True}


@pytest.mark.parametrize("name", ["", "x" * 201, "nul\x00"])
async def test_a_flags_name_that_cannot_be_stored_is_refused(tenants: Tenants, name: str) -> None:
    org_id = (await tenants.create_tenant("Acme")).org_id

    with pytest.raises(InvalidRequestError):
        await tenants.set_flags(org_id, {"good": True, name: True})

    assert await tenants.get_flags(org_id) == {}


async def test_a_flags_value_that_cannot_be_stored_is_refused(tenants: Tenants) -> None:
    org_id = (await tenants.create_tenant("Acme")).org_id

    with pytest.raises(InvalidRequestError):
        await tenants.set_flags(org_id, {"a": "nul\x00"})
