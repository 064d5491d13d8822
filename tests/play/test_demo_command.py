"""`mollifier demo`, as somebody sees it who tries Mollifier for the first time."""

from tests.play.conftest import mollifier

QUIET = {"quiet-bakery", "quiet-clinic", "quiet-library", "quiet-museum"}


def test_the_demo_shows_a_burst_of_one_tenant_and_balances() -> None:
    ended = mollifier("demo", "--json")
    assert ended.code == 0, ended
    record = ended.record
    assert record["offered"] == record["accepted"] == record["runs_created"] == record["executed"]
    assert record["mollify"] == record["buffered"] == record["drained"] > 0
    tenants = {tenant["name"]: tenant for tenant in record["tenants"]}
    assert tenants["noisy-imports"]["mollified"] == record["mollify"]
    assert {name for name, tenant in tenants.items() if tenant["mollified"] == 0} == QUIET
    assert sum(tenant["offered"] for tenant in tenants.values()) == record["offered"]
    assert record["burst"]["peak"] > record["burst"]["threshold"]
