"""What the official SDKs rely on beyond the routes: how they retry, and how they turn pages."""

from typing import Any

from mollifier.model import Tenant
from tests.http.conftest import Api, bearer


async def test_a_conflict_asks_not_to_be_retried_as_sdks_take_it_for_a_lock(api: Api, tenant: Tenant) -> None:
    run_id = (await api.trigger(tenant)).json()["id"]
    answer = await api.client.post(f"/api/v1/runs/{run_id}/reschedule", json={"delay": "1h"}, headers=bearer(tenant))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")


async def test_turning_back_wins_over_the_cursor_that_led_to_the_page(api: Api, tenant: Tenant) -> None:
    for _ in range(3):
        await api.trigger(tenant)

    async def page(**cursors: str) -> dict[str, Any]:
        query = {"page[size]": "1", **{f"page[{name}]": cursor for name, cursor in cursors.items()}}
        return (await api.client.get("/api/v1/runs", params=query, headers=bearer(tenant))).json()

    first = await page()
    after = first["pagination"]["next"]
    second = await page(after=after)
    back = await page(after=after, before=second["pagination"]["previous"])
    assert back["data"] == first["data"]
