"""Rotating keys: a new one at once, the old one for a while, and one new key however often it is asked for."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from mollifier.errors import ConflictError, InvalidRequestError, NotFoundError
from mollifier.model import Tenant
from mollifier.postgres.api_keys import OVERLAP_MAX, Rotation
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from tests.postgres.support import rows

HOUR = timedelta(hours=1)


@pytest.fixture
async def tenant(tenants: Tenants) -> Tenant:
    return await tenants.create_tenant("Acme", environment="staging")


async def key_of(tenants: Tenants, tenant: Tenant) -> str:
    (key,) = await tenants.list_keys(tenant.env_id)
    return key.id


async def test_rotating_makes_a_key_and_says_when_the_old_one_ends(
    tenants: Tenants, tenant: Tenant, database: Database
) -> None:
    rotation = await tenants.rotate_key(tenant.env_id, await key_of(tenants, tenant), HOUR)

    created, replaced = rotation.created, rotation.replaced
    assert created.secret.startswith(created.key.prefix)
    assert created.secret.startswith("tr_staging_")
    assert (created.key.expires_at, created.key.env_id) == (None, tenant.env_id)
    assert replaced.expires_at == created.key.created_at + HOUR
    assert list(await tenants.list_keys(tenant.env_id)) == [replaced, created.key]
    assert created.secret not in str(await rows(database, "SELECT * FROM api_keys"))


async def test_of_rotations_at_once_one_makes_a_key(tenants: Tenants, tenant: Tenant) -> None:
    key_id = await key_of(tenants, tenant)

    made = await asyncio.gather(
        *(tenants.rotate_key(tenant.env_id, key_id, HOUR) for _ in range(5)), return_exceptions=True
    )

    assert sum(isinstance(one, Rotation) for one in made) == 1
    assert sum(isinstance(one, ConflictError) for one in made) == 4
    assert len(await tenants.list_keys(tenant.env_id)) == 2


async def test_a_replaced_key_can_be_revoked_before_its_end(tenants: Tenants, tenant: Tenant) -> None:
    rotation = await tenants.rotate_key(tenant.env_id, await key_of(tenants, tenant), HOUR)

    revoked = await tenants.revoke_key(tenant.env_id, rotation.replaced.id)

    assert revoked.revoked_at is not None
    assert revoked.expires_at == rotation.replaced.expires_at


async def test_a_revoked_key_is_not_replaced(tenants: Tenants, tenant: Tenant) -> None:
    key_id = await key_of(tenants, tenant)
    await tenants.revoke_key(tenant.env_id, key_id)

    with pytest.raises(ConflictError, match="create a new key"):
        await tenants.rotate_key(tenant.env_id, key_id, HOUR)

    assert len(await tenants.list_keys(tenant.env_id)) == 1


@pytest.mark.parametrize("overlap", [timedelta(seconds=-1), OVERLAP_MAX + timedelta(seconds=1)])
async def test_an_overlap_that_cannot_be_is_refused(tenants: Tenants, tenant: Tenant, overlap: timedelta) -> None:
    with pytest.raises(InvalidRequestError, match="overlap"):
        await tenants.rotate_key(tenant.env_id, await key_of(tenants, tenant), overlap)

    (key,) = await tenants.list_keys(tenant.env_id)
    assert key.expires_at is None


async def test_a_key_is_rotated_through_its_own_environment_only(tenants: Tenants, tenant: Tenant) -> None:
    other = await tenants.create_tenant("Other")

    for env_id, key_id in ((other.env_id, await key_of(tenants, tenant)), ("env_none", "key_none")):
        with pytest.raises(NotFoundError):
            await tenants.rotate_key(env_id, key_id, HOUR)

    (key,) = await tenants.list_keys(tenant.env_id)
    assert key.expires_at is None
