"""Serving the API: uvicorn, its signals, and the port it got."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop

from mollifier.errors import SettingsError
from mollifier.http.app import create_app
from mollifier.http.protocol import LimitedProtocol
from mollifier.observability import Observability, configure_logging
from mollifier.settings import Settings

BACKLOG = 4096
GRACE_S = 10
"""What requests in flight have to end when the server is told to stop."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ApiServer(uvicorn.Server):
    """One server of one application. `url` is where it listens, known from the start, for port 0 too.

    Raises OSError when the address cannot be had.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        observability: Observability | None = None,
    ) -> None:
        self.fatal: SettingsError | None = None
        self._on_ready: Callable[[str], None] | None = None
        self._socket = _listen(host, port)
        self.url = _url(self._socket)
        super().__init__(
            uvicorn.Config(
                create_app(settings, observability=observability, on_fatal=self._stop_for),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                http=LimitedProtocol,
                lifespan="on",
                backlog=BACKLOG,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    async def run_until_stopped(self, on_ready: Callable[[str], None] | None = None) -> None:
        """Serve until a signal or `should_exit`; `on_ready` is called with the URL once requests are taken.

        Raises SettingsError where the settings turn out to be contradictory.
        """
        self._on_ready = on_ready
        try:
            await self.serve([self._socket])
        finally:
            self._socket.close()
        if self.fatal is not None:
            raise self.fatal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started and not self.should_exit and self._on_ready is not None:
            self._on_ready(self.url)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Stop on the first signal and hurry on the second; unlike uvicorn's own, end normally after that.

        In a thread, to which signals do not come, leave them alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop_for(self, error: SettingsError) -> None:
        self.fatal = error
        self.should_exit = True


def serve(
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_file: Path | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the API in this process until it is told to stop; port 0 takes a free one, which `on_ready` is told in the URL.

    Raises SettingsError for settings that cannot be, OSError for an address that cannot be had.
    """
    configure_logging(log_file)
    server = ApiServer(settings, host=host, port=port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.run_until_stopped(on_ready))


def _listen(host: str, port: int) -> socket.socket:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.create_server(address, family=family, backlog=BACKLOG)
    # Accepted sockets inherit it. Event loops set it themselves only where the socket was made for TCP by name; without it an
    # answer's body waits for the acknowledgement of its head, 40 ms on most systems.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _url(listening: socket.socket) -> str:
    host, port = str(listening.getsockname()[0]), int(listening.getsockname()[1])
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound to here, only told
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
