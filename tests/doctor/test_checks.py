"""Each check as a table: what is among the facts, and how it is judged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mollifier.caps import CAPS, Amount, Cap, Usage
from mollifier.doctor.buffer_checks import BUFFER_CHECKS
from mollifier.doctor.database_checks import DATABASE_CHECKS
from mollifier.doctor.diagnosis import examine, worst_first
from mollifier.doctor.facts import (
    Address,
    BufferFacts,
    DatabaseFacts,
    Facts,
    Reach,
    Replica,
    Sample,
    Unreachable,
    reach,
)
from mollifier.doctor.findings import Finding, Severity, exit_code, worst
from mollifier.inspection import Counts
from mollifier.settings import Settings
from mollifier.sweeps import SweepReport

GIB = 1024**3
LOCAL = Address("local", encrypted=False, password=False)
URLS = {"database_url": "postgresql:///db", "redis_url": "unix:///v.sock"}
EMPTY = Counts(0, 0, 0, 0, (), None)
GOOD_BUFFER = BufferFacts(
    address=LOCAL,
    version=(9, 1, 2),
    cluster=False,
    aof=True,
    appendfsync="everysec",
    snapshots="",
    is_replica=False,
    replicas=(),
    policy="noeviction",
    evicted_keys=0,
    max_memory_bytes=8 * GIB,
    used_memory_bytes=GIB,
    system_memory_bytes=16 * GIB,
    clients=10,
    max_clients=10_000,
    partitions=64,
    keys=0,
    sample=Sample(0, 0),
    counts=EMPTY,
    usage=Usage(Amount(), {}, {}),
    drainers=1,
    ahead_ms=0,
)
GOOD_DATABASE = DatabaseFacts(
    address=LOCAL,
    version=18,
    fsync=True,
    full_page_writes=True,
    synchronous_commit="on",
    read_only=False,
    max_connections=200,
    reserved_connections=3,
    connections=10,
    ahead_ms=0,
    workers=1,
)
MONITORING = Settings(enabled=True, **URLS)  # pyright: ignore[reportArgumentType] - two of the settings
DIVERTING = replace(MONITORING, divert=True)


def judged(part: str, check: str, settings: Settings = DIVERTING, **facts: Any) -> str:
    """The severity that one check of a part ends in when these facts differ from what is good."""
    buffer = replace(GOOD_BUFFER, **facts) if part == "buffer" else GOOD_BUFFER
    database = replace(GOOD_DATABASE, **facts) if part == "database" else GOOD_DATABASE
    findings = examine(Facts(settings=settings, buffer=buffer, database=database))
    (found,) = [finding for finding in findings if finding.check == f"{part}.{check}"]
    return found.severity.value


@pytest.mark.parametrize("settings", [MONITORING, DIVERTING], ids=["monitor", "divert"])
def test_servers_that_are_set_up_well_have_nothing_but_ok(settings: Settings) -> None:
    findings = examine(Facts(settings=settings, buffer=GOOD_BUFFER, database=GOOD_DATABASE))
    assert [finding for finding in findings if finding.severity is not Severity.OK] == []
    assert len(findings) > len(BUFFER_CHECKS) + len(DATABASE_CHECKS)


@pytest.mark.parametrize(
    ("check", "facts", "monitor", "divert"),
    [
        ("persistence", {"aof": False}, "warning", "critical"),
        ("persistence", {"aof": False, "snapshots": "3600 1"}, "warning", "warning"),
        ("persistence", {"aof": False, "snapshots": None}, "warning", "warning"),
        ("persistence", {"aof": None}, "unknown", "unknown"),
        ("persistence", {"appendfsync": "always"}, "ok", "ok"),
        ("persistence", {"appendfsync": "no"}, "warning", "warning"),
        ("persistence", {"appendfsync": None}, "unknown", "unknown"),
        ("persistence", {"write_failure": "the last snapshot failed"}, "warning", "critical"),
        ("eviction", {"policy": "allkeys-lru"}, "warning", "critical"),
        ("eviction", {"policy": "volatile-ttl", "evicted_keys": 3}, "warning", "critical"),
        ("eviction", {"policy": None}, "unknown", "unknown"),
        ("eviction", {"evicted_keys": 3}, "warning", "warning"),
        ("memory", {"used_memory_bytes": 6 * GIB - 1}, "ok", "ok"),
        ("memory", {"used_memory_bytes": 6 * GIB}, "warning", "warning"),
        ("memory", {"used_memory_bytes": 7.2 * GIB}, "critical", "critical"),
        ("memory", {"max_memory_bytes": 0}, "info", "info"),
        ("memory", {"max_memory_bytes": 0, "used_memory_bytes": 15 * GIB}, "critical", "critical"),
        ("memory", {"max_memory_bytes": 0, "system_memory_bytes": None}, "unknown", "unknown"),
        ("version", {"version": (7, 2, 9)}, "warning", "warning"),
        ("version", {"version": (8,)}, "ok", "ok"),
        ("version", {"product": "redis", "version": (6, 2, 14)}, "critical", "critical"),
        ("version", {"product": "redis", "version": (7, 0, 0)}, "ok", "ok"),
        ("version", {"version": None}, "unknown", "unknown"),
        ("access", {"refused": "NOPERM"}, "critical", "critical"),
        ("role", {"is_replica": True}, "critical", "critical"),
        ("role", {"cluster": True}, "warning", "warning"),
        ("role", {"is_replica": None}, "unknown", "unknown"),
        ("replicas", {"replicas": (Replica("a:1", online=True, lag_s=1),)}, "ok", "ok"),
        ("replicas", {"replicas": (Replica("a:1", online=True, lag_s=11),)}, "warning", "warning"),
        ("replicas", {"replicas": (Replica("a:1", online=False, lag_s=0),)}, "warning", "warning"),
        ("replicas", {"replicas": None}, "unknown", "unknown"),
        ("layout", {"partitions": 16}, "critical", "critical"),
        ("layout", {"partitions": 0}, "ok", "ok"),
        ("layout", {"partitions": None}, "unknown", "unknown"),
        ("tenancy", {"sample": Sample(256, 1, ("celery",))}, "warning", "warning"),
        ("tenancy", {"sample": Sample(256, 0)}, "ok", "ok"),
        ("tenancy", {"sample": None}, "unknown", "unknown"),
        ("tenancy", {"other_databases": ("db1",)}, "warning", "warning"),
        ("connections", {"clients": 10, "max_clients": 27}, "warning", "warning"),
        ("connections", {"clients": 10, "max_clients": 28}, "ok", "ok"),
        ("connections", {"max_clients": None}, "unknown", "unknown"),
        ("transport", {"address": Address("public", encrypted=False, password=True)}, "warning", "warning"),
        ("transport", {"address": Address("public", encrypted=True, password=False)}, "warning", "warning"),
        ("transport", {"address": Address("private", encrypted=False, password=False)}, "info", "info"),
        ("transport", {"address": Address("public", encrypted=True, password=True)}, "ok", "ok"),
    ],
)
def test_the_buffers_server_is_judged_by_what_it_says(
    check: str, facts: dict[str, Any], monitor: str, divert: str
) -> None:
    assert judged("buffer", check, MONITORING, **facts) == monitor
    assert judged("buffer", check, DIVERTING, **facts) == divert


@pytest.mark.parametrize(
    ("check", "facts", "monitor", "divert"),
    [
        ("durability", {"fsync": False}, "critical", "critical"),
        ("durability", {"full_page_writes": False}, "critical", "critical"),
        ("durability", {"synchronous_commit": "off"}, "warning", "critical"),
        ("durability", {"synchronous_commit": "remote_apply"}, "ok", "ok"),
        ("writable", {"read_only": True}, "critical", "critical"),
        ("version", {"version": 13}, "critical", "critical"),
        ("version", {"version": 14}, "ok", "ok"),
        ("migrations", {"pending": ("0004",)}, "critical", "critical"),
        ("migrations", {"schema_fault": "a newer Mollifier has migrated it"}, "critical", "critical"),
        ("connections", {"connections": 158}, "warning", "warning"),
        ("connections", {"connections": 157}, "ok", "ok"),
        ("connections", {"workers": 9}, "warning", "warning"),
        ("connections", {"workers": 8}, "ok", "ok"),
        ("connections", {"max_connections": 40, "workers": None}, "ok", "ok"),
        ("connections", {"max_connections": 39, "workers": None}, "warning", "warning"),
        ("transport", {"address": Address("public", encrypted=False, password=True)}, "warning", "warning"),
        ("transport", {"address": Address("private", encrypted=False, password=True)}, "info", "info"),
        ("transport", {"address": Address("public", encrypted=True, password=True)}, "ok", "ok"),
    ],
)
def test_the_database_is_judged_by_what_it_says(check: str, facts: dict[str, Any], monitor: str, divert: str) -> None:
    assert judged("database", check, MONITORING, **facts) == monitor
    assert judged("database", check, DIVERTING, **facts) == divert


TO_DISK = replace(DIVERTING, accept_confirm="aof")
TO_REPLICA = replace(DIVERTING, accept_confirm="replicas:1")
ONLINE, OFFLINE = Replica("a:1", online=True, lag_s=0), Replica("b:1", online=False, lag_s=0)


@pytest.mark.parametrize(
    ("settings", "check", "facts", "severity"),
    [
        (TO_DISK, "persistence", {}, "warning"),
        (TO_DISK, "persistence", {"product": "redis", "version": (7, 4, 2)}, "warning"),
        (TO_DISK, "persistence", {"product": "redis", "version": (8, 0)}, "ok"),
        (TO_DISK, "persistence", {"appendfsync": "always"}, "ok"),
        (TO_DISK, "persistence", {"appendfsync": "no"}, "critical"),
        (TO_DISK, "persistence", {"aof": False, "snapshots": "60 1"}, "critical"),
        (TO_DISK, "version", {"product": "redis", "version": (7, 0, 15)}, "critical"),
        (TO_DISK, "version", {"product": "redis", "version": (7, 2)}, "ok"),
        (TO_DISK, "version", {"version": (7, 2, 5)}, "warning"),
        (TO_DISK, "access", {"unconfirming": "NOPERM"}, "critical"),
        (TO_DISK, "access", {}, "ok"),
        (TO_REPLICA, "version", {"product": "redis", "version": (7, 0, 15)}, "ok"),
        (TO_REPLICA, "replicas", {"replicas": ()}, "critical"),
        (TO_REPLICA, "replicas", {"replicas": (OFFLINE,)}, "critical"),
        (TO_REPLICA, "replicas", {"replicas": (ONLINE,)}, "ok"),
        (TO_REPLICA, "replicas", {"replicas": (ONLINE, OFFLINE)}, "warning"),
        (TO_REPLICA, "connections", {"clients": 10, "max_clients": 44}, "ok"),
        (TO_REPLICA, "connections", {"clients": 10, "max_clients": 43}, "warning"),
    ],
)
def test_what_a_confirmation_needs_is_looked_for(
    settings: Settings, check: str, facts: dict[str, Any], severity: str
) -> None:
    assert judged("buffer", check, settings, **facts) == severity


@pytest.mark.parametrize(
    ("cap", "held", "severity"),
    [
        ("held_env_max_entries", Amount(79, 0), "ok"),
        ("held_env_max_entries", Amount(80, 0), "warning"),
        ("held_env_max_bytes", Amount(200, 79), "ok"),
        ("held_env_max_bytes", Amount(0, 80), "warning"),
        ("held_org_max_entries", Amount(120, 0), "warning"),
        ("held_org_max_bytes", Amount(0, 79), "ok"),
    ],
)
def test_a_cap_that_is_nearly_reached_is_found_out(cap: Cap, held: Amount, severity: str) -> None:
    usage = Usage(held, {"o": held, "p": Amount()}, {"e": held})
    assert judged("buffer", "caps", replace(DIVERTING, **{cap: 100}), usage=usage) == severity


@pytest.mark.parametrize(
    ("settings", "facts", "severity"),
    [
        (DIVERTING, {"max_memory_bytes": 4 * GIB}, "ok"),
        (DIVERTING, {"max_memory_bytes": 3 * GIB}, "warning"),
        (DIVERTING, {"max_memory_bytes": 0, "system_memory_bytes": 3 * GIB}, "warning"),
        (DIVERTING, {"max_memory_bytes": 0, "system_memory_bytes": None}, "ok"),
        (replace(DIVERTING, held_max_bytes=GIB, held_max_entries=500_000), {"max_memory_bytes": 2 * GIB}, "ok"),
        (replace(DIVERTING, held_max_bytes=0), {}, "info"),
        (replace(DIVERTING, **dict.fromkeys(CAPS, 0)), {"usage": Usage(Amount(10**9, 10**12), {}, {})}, "info"),
        (DIVERTING, {"usage": None}, "unknown"),
        (MONITORING, {"max_memory_bytes": GIB, "usage": None}, "ok"),
    ],
)
def test_what_may_be_held_is_measured_against_the_servers_memory(
    settings: Settings, facts: dict[str, Any], severity: str
) -> None:
    assert judged("buffer", "caps", settings, **facts) == severity


def test_of_a_cap_it_is_said_which_one_whose_and_what_happens_beyond() -> None:
    usage = Usage(Amount(9, 9), {"o": Amount(9, 9)}, {"e": Amount(9, 9)})
    settings = replace(DIVERTING, held_org_max_entries=10, held_over_cap="reject")
    facts = Facts(settings=settings, buffer=replace(GOOD_BUFFER, usage=usage), database=GOOD_DATABASE)
    (found,) = [finding for finding in examine(facts) if finding.check == "buffer.caps"]
    assert found.what == "MOLLIFIER_HELD_ORG_MAX_ENTRIES: 90% in use by o"
    assert "429" in found.why


@pytest.mark.parametrize(("concurrency", "severity"), [(128, "ok"), (129, "warning")])
def test_the_workers_pool_is_measured_against_the_drainers_concurrency(concurrency: int, severity: str) -> None:
    assert judged("database", "pool", replace(DIVERTING, drain_concurrency=concurrency)) == severity


@pytest.mark.parametrize(
    ("settings", "severity"),
    [
        (Settings(), "critical"),
        (Settings(database_url="postgresql:///db"), "ok"),
        (Settings(database_url="postgresql:///db", enabled=True), "warning"),
        (Settings(database_url="postgresql:///db", enabled=True, divert=True), "critical"),
        (Settings(database_url="postgresql:///db", drainer_enabled=True), "critical"),
        (replace(DIVERTING, drainer_enabled=False), "warning"),
        (replace(DIVERTING, enabled=False), "info"),
        (replace(DIVERTING, accept_confirm="aof"), "ok"),
        (replace(MONITORING, accept_confirm="aof"), "info"),
        (replace(DIVERTING, enabled=False, divert=False, shadow_mode=True), "info"),
        (replace(DIVERTING, enabled=False, divert=False, drainer_enabled=True), "ok"),
    ],
)
def test_settings_that_contradict_each_other_are_found(settings: Settings, severity: str) -> None:
    assert judged("system", "settings", settings) == severity


@pytest.mark.parametrize(
    ("settings", "workers", "drainers", "severity"),
    [
        (DIVERTING, 2, 0, "critical"),
        (DIVERTING, 0, 0, "critical"),
        (DIVERTING, 0, 1, "critical"),
        (DIVERTING, 2, 1, "ok"),
        (DIVERTING, 2, None, "ok"),
        (DIVERTING, None, 1, "unknown"),
        (MONITORING, 0, 0, "warning"),
        (MONITORING, 2, 0, "warning"),
        (replace(DIVERTING, enabled=False), 2, 0, "ok"),
        (replace(DIVERTING, enabled=False), 0, 0, "warning"),
    ],
)
def test_work_that_nobody_does_is_found(
    settings: Settings, workers: int | None, drainers: int | None, severity: str
) -> None:
    facts = Facts(
        settings=settings,
        buffer=replace(GOOD_BUFFER, drainers=drainers),
        database=replace(GOOD_DATABASE, workers=workers),
    )
    (found,) = [finding for finding in examine(facts) if finding.check == "system.drainers"]
    assert found.severity == severity


def test_a_worker_that_is_about_to_start_counts_as_one_that_works_and_drains() -> None:
    buffer, database = replace(GOOD_BUFFER, drainers=0), replace(GOOD_DATABASE, workers=0)
    facts = Facts(settings=DIVERTING, buffer=buffer, database=database, starting=True)
    assert worst(examine(facts)) is Severity.OK
    # One that does not drain is a worker, and no drainer.
    facts = replace(facts, settings=replace(DIVERTING, drainer_enabled=False))
    assert {each.check: each.severity for each in examine(facts)}["system.drainers"] == "critical"


@pytest.mark.parametrize(
    ("settings", "counts", "severity"),
    [
        (DIVERTING, Counts(5, 1, 1, 0, ("org",), 30_000), "ok"),
        (DIVERTING, Counts(5, 1, 1, 0, ("org",), 30_001), "warning"),
        (DIVERTING, Counts(0, 0, 0, 1, (), None), "ok"),
        (replace(DIVERTING, enabled=False), Counts(1, 0, 0, 0, ("org",), 5), "warning"),
        (replace(DIVERTING, enabled=False), EMPTY, "ok"),
        (replace(DIVERTING, drainer_enabled=False), Counts(0, 0, 1, 0, (), None), "warning"),
        (DIVERTING, None, "unknown"),
    ],
)
def test_entries_that_are_left_are_found(settings: Settings, counts: Counts | None, severity: str) -> None:
    facts = Facts(settings=settings, buffer=replace(GOOD_BUFFER, counts=counts), database=GOOD_DATABASE)
    assert {each.check: each.severity for each in examine(facts)}["system.leftovers"] == severity


def test_of_a_buffer_that_could_not_be_asked_nobody_says_that_nothing_is_left_in_it() -> None:
    facts = Facts(settings=DIVERTING, buffer=Unreachable("gone"), database=GOOD_DATABASE)
    severities = {each.check: each.severity for each in examine(facts)}
    assert {severities[f"system.{name}"] for name in ("leftovers", "dead_letters", "sweeper")} == {"unknown"}


WELL, ODD = SweepReport(at_ms=1, stale=3, orphans={"queue": 1}), SweepReport(at_ms=1, mismatches={"late": 2})
SOME = Counts(5, 1, 1, 0, ("org",), 30_000)


@pytest.mark.parametrize(
    ("sweep", "ago_ms", "counts", "severity"),
    [
        (WELL, 1, SOME, "ok"),
        (WELL, 120_007, SOME, "ok"),
        (WELL, 120_008, SOME, "warning"),
        (WELL, 120_008, replace(SOME, queued=6), "ok"),
        (WELL, 10**9, EMPTY, "ok"),
        (ODD, 1, SOME, "warning"),
        (ODD, 1, EMPTY, "warning"),
        (None, None, EMPTY, "ok"),
        (None, None, SOME, "warning"),
        (None, None, None, "ok"),
    ],
)
def test_a_buffer_that_does_not_fit_together_or_is_not_swept_is_found(
    sweep: SweepReport | None, ago_ms: int | None, counts: Counts | None, severity: str
) -> None:
    buffer = replace(GOOD_BUFFER, sweep=sweep, swept_ago_ms=ago_ms, counts=counts)
    facts = Facts(settings=DIVERTING, buffer=buffer, database=GOOD_DATABASE)
    (found,) = [finding for finding in examine(facts) if finding.check == "system.sweeper"]
    assert found.severity == severity
    assert (sweep is ODD) == ("2 late" in found.what)


def test_a_worker_that_is_about_to_start_is_about_to_sweep() -> None:
    facts = Facts(settings=DIVERTING, buffer=replace(GOOD_BUFFER, counts=SOME), database=GOOD_DATABASE, starting=True)
    assert {each.check: each.severity for each in examine(facts)}["system.sweeper"] == "ok"


@pytest.mark.parametrize(
    ("counts", "severity"),
    [
        (EMPTY, "ok"),
        (Counts(5, 1, 1, 0, ("org",), 30_000), "ok"),
        (Counts(0, 0, 0, 1, (), None), "warning"),
        # Also where there is worse to tell of the buffer.
        (Counts(5, 0, 0, 2, ("org",), 99_000), "warning"),
        (None, "unknown"),
    ],
)
def test_dead_letters_are_found_and_the_command_that_shows_them_is_named(counts: Counts | None, severity: str) -> None:
    facts = Facts(settings=DIVERTING, buffer=replace(GOOD_BUFFER, counts=counts), database=GOOD_DATABASE)
    (found,) = [finding for finding in examine(facts) if finding.check == "system.dead_letters"]
    assert found.severity == severity
    assert ("mollifier dead-letters list" in found.fix) == (severity != "ok")


@pytest.mark.parametrize(
    ("buffer_ms", "database_ms", "margin_ms", "severity"),
    [
        (0, 0, 0, "ok"),
        (999, 0, 0, "ok"),
        (1_000, 0, 0, "warning"),
        (-1_000, 0, 0, "warning"),
        (-600, 600, 0, "warning"),
        (-600, 600, 300, "ok"),
        (0, 60_000, 0, "critical"),
        (60_000, 60_000, 0, "critical"),
        (None, 60_000, 0, "critical"),
        (5_000, 5_000, 5_000, "ok"),
    ],
)
def test_clocks_are_compared_beyond_the_time_the_question_took(
    buffer_ms: int | None, database_ms: int, margin_ms: int, severity: str
) -> None:
    facts = Facts(
        settings=DIVERTING,
        buffer=replace(GOOD_BUFFER, ahead_ms=buffer_ms, margin_ms=margin_ms),
        database=replace(GOOD_DATABASE, ahead_ms=database_ms, margin_ms=margin_ms),
    )
    assert {each.check: each.severity for each in examine(facts)}["system.clocks"] == severity


def test_a_server_without_an_answer_is_critical_and_the_other_is_examined_all_the_same() -> None:
    findings = examine(Facts(settings=DIVERTING, buffer=Unreachable("refused"), database=GOOD_DATABASE))
    found = {finding.check: finding.severity for finding in findings}
    assert found["buffer.reachable"] == "critical"
    assert found["database.migrations"] == "ok"
    findings = examine(Facts(settings=DIVERTING, buffer=GOOD_BUFFER, database=Unreachable("refused")))
    assert {finding.check: finding.severity for finding in findings}["database.reachable"] == "critical"


def test_a_part_that_was_not_asked_has_no_findings() -> None:
    findings = examine(Facts(settings=DIVERTING))
    assert {finding.check.partition(".")[0] for finding in findings} == {"system"}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("", "local"),
        ("localhost", "local"),
        ("127.0.0.3", "local"),
        ("::1", "local"),
        ("[::1]", "local"),
        ("/var/run/postgresql", "local"),
        ("10.2.3.4", "private"),
        ("192.168.0.7", "private"),
        ("fd00::1", "private"),
        ("buffer", "private"),
        ("valkey.default.svc.cluster.local", "private"),
        ("ip-10-0-0-1.ec2.internal", "private"),
        ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
        ("cache.example.com", "public"),
        ("Cache.Example.Com.", "public"),
    ],
)
def test_how_far_away_a_host_may_be_is_told_by_its_name(host: str, expected: Reach) -> None:
    assert reach(host) == expected


SEVERITIES = st.lists(st.sampled_from(list(Severity)))


@given(SEVERITIES)
def test_the_exit_code_is_that_of_the_worst_finding_whatever_their_order(severities: list[Severity]) -> None:
    findings = [Finding(check="a.b", severity=each, what="", why="", fix="") for each in severities]
    critical, warning = Severity.CRITICAL in severities, Severity.WARNING in severities
    assert exit_code(findings) == (2 if critical else 1 if warning else 0)
    ordered = worst_first(findings)
    assert not ordered or ordered[0].severity is worst(findings)
    assert sorted(ordered, key=repr) == sorted(findings, key=repr)


UNTOLD = BufferFacts(address=LOCAL)


def test_a_server_that_tells_nothing_fails_nothing() -> None:
    findings = examine(Facts(settings=DIVERTING, buffer=UNTOLD, database=GOOD_DATABASE))
    assert exit_code(findings) == 0
    assert {finding.severity.value for finding in findings} == {"ok", "unknown"}


@given(
    st.sampled_from([MONITORING, DIVERTING, Settings(), replace(DIVERTING, enabled=False)]),
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.none(), st.just(getattr(GOOD_BUFFER, name)))
            for name in BufferFacts.__struct_fields__
            if getattr(UNTOLD, name) is None
        },
    ),
)
def test_whatever_is_told_or_not_every_check_has_a_judgement_with_advice(
    settings: Settings, told: dict[str, Any]
) -> None:
    findings = examine(Facts(settings=settings, buffer=replace(GOOD_BUFFER, **told), database=GOOD_DATABASE))
    assert len({finding.check for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.what
        assert finding.severity is Severity.OK or (finding.why and finding.fix)
