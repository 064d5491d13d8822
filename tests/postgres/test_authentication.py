"""Authentication: answers from memory, for two seconds, and through an outage."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from mollifier.errors import EngineUnavailableError
from mollifier.model import Tenant
from mollifier.postgres.authentication import (
    KNOWN_MAX,
    LIFETIME_S,
    SERVES_WHILE_ASKED_S,
    STANDS_THROUGH_OUTAGE_S,
    UNKNOWN_MAX,
    Authenticator,
)
from mollifier.postgres.database import Database
from mollifier.postgres.tenants import Tenants
from tests.postgres.support import Outage, Statements, execute, until


class Seconds:
    """A clock of seconds that stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def authenticator(database: Database, seconds: Seconds) -> Authenticator:
    return Authenticator(database, clock=seconds)


@pytest.fixture
async def tenant(tenants: Tenants) -> Tenant:
    return await tenants.create_tenant("Acme")


async def revoke_all(tenants: Tenants, tenant: Tenant) -> None:
    for key in await tenants.list_keys(tenant.env_id):
        await tenants.revoke_key(tenant.env_id, key.id)


@pytest.mark.parametrize("key", ["", "tr_prod_wrong", "nul\x00", "\ud800", "é", "x" * 100_000])
async def test_a_key_that_nobody_made_belongs_to_no_environment(authenticator: Authenticator, key: str) -> None:
    assert await authenticator.authenticate(key) is None


async def test_a_burst_asks_the_database_once(authenticator: Authenticator, tenant: Tenant, database: Database) -> None:
    statements = Statements(database)

    found = await asyncio.gather(*(authenticator.authenticate(tenant.api_key) for _ in range(100)))
    unknown = await asyncio.gather(*(authenticator.authenticate("unknown") for _ in range(100)))

    assert {one.id for one in found if one is not None} == {tenant.env_id}
    assert unknown == [None] * 100
    assert len(statements.asked) == 2


async def test_a_revoked_key_stops_working_once_the_answer_is_old(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, seconds: Seconds
) -> None:
    await authenticator.authenticate(tenant.api_key)
    await revoke_all(tenants, tenant)

    seconds.now += SERVES_WHILE_ASKED_S
    assert await authenticator.authenticate(tenant.api_key) is None


async def test_a_change_made_in_this_process_counts_at_once(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant
) -> None:
    await authenticator.authenticate(tenant.api_key)
    await revoke_all(tenants, tenant)
    authenticator.forget()

    assert await authenticator.authenticate(tenant.api_key) is None


async def test_the_organizations_flags_come_along_as_stored(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, seconds: Seconds
) -> None:
    before = await authenticator.authenticate(tenant.api_key)
    await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
    seconds.now += SERVES_WHILE_ASKED_S
    after = await authenticator.authenticate(tenant.api_key)

    assert before is not None
    assert after is not None
    assert (before.org_flags, after.org_flags) == (None, {"mollifierEnabled": True})


async def test_answers_stand_through_an_outage_but_not_for_ever(
    authenticator: Authenticator, tenant: Tenant, seconds: Seconds, outage: Outage
) -> None:
    first = await authenticator.authenticate(tenant.api_key)
    await outage.begin()

    for _ in range(3):
        seconds.now += SERVES_WHILE_ASKED_S
        assert await authenticator.authenticate(tenant.api_key) == first
    with pytest.raises(EngineUnavailableError):
        await authenticator.authenticate("never seen")
    seconds.now += STANDS_THROUGH_OUTAGE_S

    async def is_over() -> bool:
        # An answer that was under way before still serves for its lifetime.
        seconds.now += LIFETIME_S
        try:
            await authenticator.authenticate(tenant.api_key)
        except EngineUnavailableError:
            return True
        return False

    await until(is_over)


async def test_an_outage_is_not_asked_about_by_every_request(
    authenticator: Authenticator, tenant: Tenant, database: Database, seconds: Seconds, outage: Outage
) -> None:
    await authenticator.authenticate(tenant.api_key)
    await outage.begin()
    seconds.now += SERVES_WHILE_ASKED_S
    await authenticator.authenticate(tenant.api_key)
    await outage.end()
    statements = Statements(database)

    await authenticator.authenticate(tenant.api_key)
    assert len(statements.asked) == 0
    seconds.now += SERVES_WHILE_ASKED_S

    async def has_asked() -> bool:
        await authenticator.authenticate(tenant.api_key)
        return len(statements.asked) > 0

    await until(has_asked)
    assert len(statements.asked) == 1


async def test_while_a_new_answer_is_under_way_the_old_one_serves_and_nobody_waits(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, seconds: Seconds
) -> None:
    before = await authenticator.authenticate(tenant.api_key)
    await tenants.set_flags(tenant.org_id, {"mollifierEnabled": True})
    seconds.now += LIFETIME_S

    assert await authenticator.authenticate(tenant.api_key) == before

    async def is_new() -> bool:
        after = await authenticator.authenticate(tenant.api_key)
        return after is not None and after.org_flags == {"mollifierEnabled": True}

    await until(is_new)


async def test_guessing_evicts_no_customer(
    authenticator: Authenticator, tenant: Tenant, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mollifier.postgres.authentication.UNKNOWN_MAX", 10)
    await authenticator.authenticate(tenant.api_key)
    for number in range(30):
        await authenticator.authenticate(f"guess {number}")
    statements = Statements(database)

    await authenticator.authenticate(tenant.api_key)
    assert statements.asked == []
    await authenticator.authenticate("guess 29")
    assert statements.asked == []
    await authenticator.authenticate("guess 0")
    assert len(statements.asked) == 1
    assert KNOWN_MAX >= UNKNOWN_MAX


async def test_one_callers_going_away_does_not_fail_the_others(authenticator: Authenticator, tenant: Tenant) -> None:
    impatient = asyncio.create_task(authenticator.authenticate(tenant.api_key))
    patient = asyncio.create_task(authenticator.authenticate(tenant.api_key))
    await asyncio.sleep(0)
    impatient.cancel()

    assert (await patient) is not None


async def test_the_use_of_keys_is_recorded_off_the_path(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, database: Database
) -> None:
    unused = await tenants.create_key(tenant.env_id)
    await authenticator.authenticate(tenant.api_key)
    statements = Statements(database)

    await authenticator.record_use()
    await authenticator.record_use()

    assert len(statements.asked) == 1
    used = {key.id: key.last_used_at for key in await tenants.list_keys(tenant.env_id)}
    assert used.pop(unused.key.id) is None
    assert all(used.values())


async def test_recording_survives_an_outage_and_forgets_no_use(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, outage: Outage
) -> None:
    async def is_recorded() -> bool:
        return all(key.last_used_at for key in await tenants.list_keys(tenant.env_id))

    await authenticator.authenticate(tenant.api_key)
    await outage.begin()
    with pytest.raises(EngineUnavailableError):
        await authenticator.record_use()
    recording = asyncio.create_task(authenticator.keep_recording(every_s=0.01))
    await asyncio.sleep(0.05)
    await outage.end()

    await until(is_recorded)
    recording.cancel()


# --- rotation ------------------------------------------------------------------------------------------------------

OVERLAP = timedelta(hours=1)


async def rotate(tenants: Tenants, tenant: Tenant, overlap: timedelta = OVERLAP) -> str:
    """Rotate the tenant's key; return the new one."""
    (key,) = await tenants.list_keys(tenant.env_id)
    return (await tenants.rotate_key(tenant.env_id, key.id, overlap)).created.secret


async def test_while_a_rotation_overlaps_both_keys_work(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, seconds: Seconds
) -> None:
    new = await rotate(tenants, tenant)

    for key in (new, tenant.api_key):
        found = await authenticator.authenticate(key)
        assert found is not None
        assert found.id == tenant.env_id


async def test_a_rotated_key_ends_with_its_overlap_even_in_an_outage(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, seconds: Seconds, outage: Outage
) -> None:
    new = await rotate(tenants, tenant)
    await authenticator.authenticate(tenant.api_key)
    assert await authenticator.authenticate(new) is not None
    await outage.begin()

    seconds.now += OVERLAP.total_seconds() - 60
    assert await authenticator.authenticate(tenant.api_key) is not None
    seconds.now += 60
    assert await authenticator.authenticate(tenant.api_key) is None


async def test_a_key_whose_overlap_has_passed_is_an_unknown_one(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant, database: Database
) -> None:
    await rotate(tenants, tenant)
    await execute(database, "UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE expires_at IS NOT NULL")

    assert await authenticator.authenticate(tenant.api_key) is None


async def test_without_an_overlap_a_rotated_key_ends_at_once(
    authenticator: Authenticator, tenants: Tenants, tenant: Tenant
) -> None:
    new = await rotate(tenants, tenant, timedelta(0))

    assert await authenticator.authenticate(tenant.api_key) is None
    assert await authenticator.authenticate(new) is not None


async def test_the_last_use_before_the_end_is_recorded(
    database: Database, tenants: Tenants, tenant: Tenant, authenticator: Authenticator
) -> None:
    recording = asyncio.create_task(authenticator.keep_recording(every_s=3600))
    await asyncio.sleep(0)
    await authenticator.authenticate(tenant.api_key)
    recording.cancel()
    await asyncio.wait({recording})

    (key,) = await tenants.list_keys(tenant.env_id)
    assert key.last_used_at is not None
