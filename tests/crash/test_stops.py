"""A drainer stops for longer than its lease, another one takes its entries over, and the first goes on as if nothing had happened."""

from __future__ import annotations

import pytest

from tests.crash import drains
from tests.crash.drains import Scene
from tests.crash.ground import Ground
from tests.crash.plays import draining
from tests.crash.points import Fault, stops

OUTSIDE_TRANSACTIONS = [
    (
        drains.every_kind,
        stops(
            "valkey.pop.after", "engine.create_held_runs.before", "engine.create_held_runs.after", "valkey.ack.before"
        ),
    ),
    # Of its two entries it has acknowledged one before it stops.
    (drains.refused_once, stops("valkey.requeue.before")),
    (drains.refused, stops("engine.create_held_runs.after", "valkey.ack.before")),
    (drains.unstorable, stops("valkey.fail.before")),
]


@pytest.mark.parametrize(("story", "faults"), OUTSIDE_TRANSACTIONS, ids=lambda value: getattr(value, "__name__", ""))
async def test_what_a_drainer_has_to_say_after_its_lease_has_run_out_is_refused(
    ground: Ground, story: drains.Story, faults: tuple[Fault, ...]
) -> None:
    outcomes = await draining(ground, drains.scene(story), faults, meanwhile=ground.inherit)
    settled = {"stale", "acked"} if story is drains.refused_once else {"stale"}
    assert [set(each) for each in outcomes] == [settled] * len(faults)


async def test_a_drainer_that_stops_within_a_transaction_keeps_nobody_else_waiting_for_long(ground: Ground) -> None:
    impatient = ground.database_url + "&options=-c%20idle_in_transaction_session_timeout%3D1000"
    for story, fault in ((drains.every_kind, drains.COMMIT.point), (drains.slow, "valkey.extend.before")):
        scene = Scene(story, stops(fault or ""), settings={"database_url": impatient})
        outcomes = await draining(ground, scene, scene.faults, meanwhile=ground.inherit)
        assert [set(each) for each in outcomes] == [{"stale"}]
