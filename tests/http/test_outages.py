"""What callers meet while the buffer's server does not answer: triggers that succeed, and reads that say when to come again."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from mollifier.model import Tenant
from mollifier.play.proxy import HOST, LOSE, Proxy
from tests.core.support import until
from tests.http.conftest import Start

UNKNOWN = "/api/v3/runs/run_unknown"


async def test_a_read_of_what_may_be_held_says_when_to_come_again_and_soon_without_asking(
    start: Start, redis_url: str, tenant: Tenant
) -> None:
    async with (
        Proxy(Path(urlsplit(redis_url).path)) as proxy,
        start(
            redis_url=f"redis://{HOST}:{proxy.port}",
            enabled=True,
            divert=True,
            gate_deadline_ms=25,
            accept_deadline_ms=25,
        ) as api,
    ):
        assert (await api.get(tenant, UNKNOWN)).status_code == 404
        proxy.misbehave(requests=LOSE, replies=LOSE)

        async def reads_ask_no_more() -> bool:
            answer = await api.get(tenant, UNKNOWN)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            return 'mollifier_breaker_state{breaker="read"} 2.0' in (await api.client.get("/metrics")).text

        await until(reads_ask_no_more)
        assert (await api.client.get("/readyz")).json()["buffer"] == "degraded"
        run_id = await api.triggered(tenant, idempotencyKey="k")
        assert (await api.run(tenant, run_id))["id"] == run_id
        proxy.behave()

        async def reads_answer_again() -> bool:
            return (await api.get(tenant, UNKNOWN)).status_code == 404

        await until(reads_answer_again)
