"""The buffer's server for callers that wait for it while somebody waits for them: no round trip outlasts its deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mollifier.deadline import Breaker, within
from mollifier.errors import BufferUnavailableError
from mollifier.server import Command, Reply, Server


class BoundedServer(Server):
    """Runs commands through another server's pipelines, each round trip within `deadline_ms()` and behind a breaker.

    A command that was given up may have been carried out all the same: its reply only comes too late for anybody.
    """

    def __init__(self, server: Server, breaker: Breaker, deadline_ms: Callable[[], float]) -> None:
        super().__init__(server.redis)
        self._server = server
        self._breaker = breaker
        self._deadline_ms = deadline_ms

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        """Run many commands in one round trip; a command that fails has its error in its place.

        Raises BufferUnavailableError when the server gave no answers in time, or was not asked for want of them of late.
        """
        if not commands:
            return []
        try:
            return await self._breaker.ask(lambda: within(self._deadline_ms(), self._server.run_many(commands)))
        except TimeoutError as error:
            raise BufferUnavailableError(str(error)) from error
