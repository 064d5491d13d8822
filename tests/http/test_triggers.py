from mollifier.model import Tenant
from tests.http.conftest import Api


async def test_a_triggered_run_can_be_read(api: Api, tenant: Tenant) -> None:
    answer = await api.trigger(tenant, {"payload": {"a": 1}})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"id": answer.json()["id"], "isCached": False}
    run = await api.get_run(tenant, answer.json()["id"])
    assert run.status_code == 200, run.text
    assert run.json()["payload"] == {"a": 1}
