"""`mollifier demo`, as somebody sees it who tries Mollifier for the first time."""

import pytest

from tests.play.conftest import mollifier

QUIET = {"quiet-bakery", "quiet-clinic", "quiet-library", "quiet-museum"}


@pytest.mark.parametrize("mode", ["monitor", "divert"])
def test_the_demo_shows_a_burst_of_one_tenant_and_balances(mode: str) -> None:
    ended = mollifier("demo", "--mode", mode, "--json")
    assert ended.code == 0, ended
    record = ended.record
    assert record["offered"] == record["accepted"] == record["runs_created"]
    assert (record["sampled"] is not None) == (mode == "divert")
    if mode == "divert":
        assert record["sampled"] == record["sampled_retrieved"]
        assert min(record["sampled_tagged"], record["sampled_cancelled"]) > 0
    cancelled, too_late = record["sampled_cancelled"] or 0, record["sampled_too_late"] or 0
    assert cancelled <= record["runs_created"] - record["executed"] <= cancelled + too_late
    assert record["mollify"] == record["buffered"] == record["drained"] > 0
    tenants = {tenant["name"]: tenant for tenant in record["tenants"]}
    assert tenants["noisy-imports"]["mollified"] == record["mollify"]
    assert {name for name, tenant in tenants.items() if tenant["mollified"] == 0} == QUIET
    assert sum(tenant["offered"] for tenant in tenants.values()) == record["offered"]
    assert record["burst"]["peak"] > record["burst"]["threshold"]
