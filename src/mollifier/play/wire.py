"""Many HTTP calls at once, at little cost each.

A player shares its machine with what it plays against. A general client takes 0.3 ms of processor time for a call on an open connection and 0.6 ms
on a new one, which is behind at 1,500 calls a second before the system under test has had any; this takes a fifth of that. It does one
thing: POST a body that is ready, read the answer, keep the connection.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from mollifier.errors import MollifierError, SettingsError

CALL_TIMEOUT_S = 60.0
# Below what servers and proxies in front of them wait (60 s and more), so that few calls leave on a connection that is being closed.
KEEP_ALIVE_S = 50.0
_OPENED_AT_ONCE = 50


class WireError(MollifierError):
    """There was no answer: the connection could not be made, broke, or said something that is not HTTP."""


class Answer(NamedTuple):
    """What a call was answered."""

    status: int
    body: bytes


class Origin:
    """One server and the connections to it. Idle ones are used last in, first out, so that those no longer needed grow old and go.

    Raises SettingsError for a URL that is none.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError("--url", f"{url!r} is no URL of an API: expected http://HOST:PORT")
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._prefix = parts.path.rstrip("/")
        self._authority = parts.netloc.rpartition("@")[2]
        self._clock = clock
        self._idle: list[tuple[_Connection, float]] = []
        self._open: set[_Connection] = set()

    def head(self, path: str, headers: dict[str, str]) -> bytes:
        """Return the beginning of every call to this path; only the body's length is missing."""
        lines = (f"{name}: {value}" for name, value in {"Host": self._authority, **headers}.items())
        return "\r\n".join((f"POST {self._prefix}{path} HTTP/1.1", *lines, "Content-Length: ")).encode("latin-1")

    async def post(self, head: bytes, body: bytes) -> Answer:
        """Send the body and return the answer. Raises WireError; TimeoutError when none comes within CALL_TIMEOUT_S."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            connection = self._take() or await self._connect()
            try:
                answer = await connection.ask(b"%b%d\r\n\r\n%b" % (head, len(body), body))
            except BaseException:
                connection.close()
                raise
        if connection.is_reusable:
            self._idle.append((connection, self._clock()))
        else:
            connection.close()
        return answer

    async def open(self, connections: int) -> None:
        """Open so many connections ahead of the calls: a server may take new ones up slowly, one for each turn of its event loop.

        Raises WireError.
        """
        while len(self._idle) < connections:
            missing = min(connections - len(self._idle), _OPENED_AT_ONCE)
            for connection in await asyncio.gather(*(self._connect() for _ in range(missing))):
                connection.keeps_alive = True
                self._idle.append((connection, self._clock()))

    async def close(self) -> None:
        """Close every connection."""
        for connection in self._open:
            connection.close()
        await asyncio.gather(*(connection.closed for connection in self._open))

    def _take(self) -> _Connection | None:
        while self._idle:
            connection, idle_since_s = self._idle.pop()
            if connection.is_reusable and self._clock() - idle_since_s < KEEP_ALIVE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._open), self._host, self._port, ssl=self._ssl
            )
        except OSError as error:
            raise WireError(f"cannot connect to {self._authority}: {error.strerror or error}") from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, one call at a time. It is in `open_ones` for as long as it is open."""

    def __init__(self, open_ones: set[_Connection]) -> None:
        self._open_ones = open_ones
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._answered: asyncio.Future[Answer] | None = None
        self.closed = asyncio.get_running_loop().create_future()
        self.keeps_alive = False

    @property
    def is_reusable(self) -> bool:
        """Whether another call may be sent on it."""
        return self.keeps_alive and self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> Answer:
        if self._transport is None or self._transport.is_closing():
            raise WireError("the connection was closed")
        self._answered = asyncio.get_running_loop().create_future()
        self.keeps_alive = False
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- called by the event loop ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)
        self._open_ones.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"the answer is not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_ones.discard(self)
        self._transport = None
        self.closed.set_result(None)
        self._fail(f"the connection was closed before the answer{f': {exc}' if exc else ''}")

    # --- called by the parser ----------------------------------------------------------------------------------------

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        answer = Answer(self._parser.get_status_code(), b"".join(self._body))
        self._body.clear()
        self.keeps_alive = self._parser.should_keep_alive()
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(answer)

    def _fail(self, detail: str) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(WireError(detail))
