"""A server is killed and started again while processes stand between two of their steps: nothing is lost, nothing happens twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mollifier.embedded import ServerName
from mollifier.settings import Settings
from tests.crash import calls, drains
from tests.crash.ground import Ground
from tests.crash.plays import calling, draining
from tests.crash.points import Fault, stops

CALLS: dict[ServerName, tuple[Fault, ...]] = {
    "valkey": stops("valkey.claim.before", "valkey.claim.after", "valkey.accept.before", "valkey.accept.after"),
    "postgres": stops("engine.find_by_keys_many.before", "engine.create_runs.before", "postgres.statement.after"),
}
DRAINS: dict[ServerName, tuple[Fault, ...]] = {
    "valkey": stops("valkey.peek.after", "valkey.pop.after", "valkey.ack.before", "valkey.ack.after"),
    "postgres": stops("engine.create_held_runs.before", "postgres.commit.before", "engine.carry_over.before"),
}


@pytest.mark.parametrize("server", ["valkey", "postgres"])
async def test_a_server_may_die_in_the_middle_of_a_trigger(ground: Ground, server: ServerName) -> None:
    async def restart() -> None:
        await ground.restart(server)

    scene = calls.scene(calls.hold if server == "valkey" else calls.create)
    await calling(ground, scene, CALLS[server], meanwhile=restart)


@pytest.mark.parametrize("server", ["valkey", "postgres"])
async def test_a_server_may_die_in_the_middle_of_draining(ground: Ground, server: ServerName) -> None:
    async def restart(_: Sequence[Settings]) -> None:
        await ground.restart(server)

    await draining(ground, drains.scene(drains.every_kind), DRAINS[server], meanwhile=restart)
