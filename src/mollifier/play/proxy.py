"""A proxy that misbehaves on purpose: between Mollifier and a server it delays, holds up, loses and cuts bytes.

It listens on a TCP port of this machine and passes bytes on to a server's Unix socket, each direction under a fate of its own, which may
change at any moment. What a network does is all it does: bytes may come late, in small pieces, or no more; they never change.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

import msgspec

HOST = "127.0.0.1"
_PIECE_BYTES = 65_536
Direction = Literal["requests", "replies"]


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """What befalls the bytes of one direction: each piece, of at most `piece_bytes`, is passed on `delay_s` late.

    Of each connection `after_bytes` more are passed on, counted from when this became its fate (None: all of them). What comes then
    has the `end`: the connection is cut, or the bytes are lost, or they wait until the fate changes. A connection that has lost some is
    cut when the fate changes, for a stream has no holes. `once`: the first connection to be cut is the last, then the proxy behaves.
    """

    delay_s: float = 0.0
    piece_bytes: int = _PIECE_BYTES
    after_bytes: int | None = None
    end: Literal["cut", "lose", "wait"] = "cut"
    once: bool = False


FAIR = Fate()
HANG = Fate(after_bytes=0, end="wait")
LOSE = Fate(after_bytes=0, end="lose")


class Proxy:
    """Passes connections on to a Unix socket. `port` is where it listens; `refusing` has it turn new connections away.

    `passed_bytes` counts, by direction, what was passed on since the fates last changed; `cuts` the connections that were cut by their fate.
    """

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._fates: dict[Direction, Fate] = {"requests": FAIR, "replies": FAIR}
        self._changed = asyncio.Event()
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self.refusing = False
        self.cuts = 0
        self.passed_bytes: dict[Direction, int] = {"requests": 0, "replies": 0}

    @property
    def port(self) -> int:
        """The TCP port."""
        if self._server is None:
            raise RuntimeError("the proxy is not running")
        return self._server.sockets[0].getsockname()[1]

    @property
    def connections(self) -> int:
        """How many connections pass through it at this moment."""
        return len(self._links)

    def fate_of(self, direction: Direction) -> Fate:
        """Return what befalls this direction's bytes now."""
        return self._fates[direction]

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of a fate; another event stands here from then on."""
        return self._changed

    def misbehave(self, *, requests: Fate = FAIR, replies: Fate = FAIR) -> None:
        """Give both directions these fates, from the next byte on."""
        self._fates = {"requests": requests, "replies": replies}
        self.passed_bytes = {"requests": 0, "replies": 0}
        for link in tuple(self._links):
            if link.has_lost_bytes:
                link.cut()
        self._changed.set()
        self._changed = asyncio.Event()

    def behave(self) -> None:
        """Pass everything on as it comes."""
        self.misbehave()

    def cut(self) -> None:
        """Cut every connection at once, wherever in a message it is."""
        for link in tuple(self._links):
            link.cut()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._take, HOST, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        while self._links:
            self.cut()
            await asyncio.gather(*(link.ended.wait() for link in tuple(self._links)))

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, writer)
        self._links.add(link)
        try:
            await link.run(reader, self._upstream)
        finally:
            self._links.discard(link)
            link.ended.set()


class _Link:
    """One connection and the one it is passed on to."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._server: asyncio.StreamWriter | None = None
        self.has_lost_bytes = False
        self.ended = asyncio.Event()

    async def run(self, from_client: asyncio.StreamReader, upstream: Path) -> None:
        """Pass bytes on until either side ends."""
        try:
            if self._proxy.refusing:
                return
            from_server, self._server = await asyncio.open_unix_connection(upstream)
            pumps = [
                asyncio.ensure_future(self._pump("requests", from_client, self._server)),
                asyncio.ensure_future(self._pump("replies", from_server, self._client)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            # The server is away, and so the connection ends: its client sees what it would have seen without a proxy.
            pass
        finally:
            self.cut()

    def cut(self) -> None:
        """End both connections without a farewell."""
        for writer in (self._client, self._server):
            if writer is not None:
                writer.transport.abort()

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fate, passed_bytes = self._proxy.fate_of(direction), 0
        with suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                while data:
                    if self._proxy.fate_of(direction) is not fate:
                        fate, passed_bytes = self._proxy.fate_of(direction), 0
                    room = len(data) if fate.after_bytes is None else fate.after_bytes - passed_bytes
                    piece, rest = data[: min(room, fate.piece_bytes)], data[min(room, fate.piece_bytes) :]
                    if room <= 0:
                        match fate.end:
                            case "cut":
                                self._proxy.cuts += 1
                                if fate.once:
                                    self._proxy.behave()
                                return
                            case "lose":
                                self.has_lost_bytes, data = True, b""
                            case "wait":
                                await self._proxy.changed.wait()
                        continue
                    if fate.delay_s:
                        await asyncio.sleep(fate.delay_s)
                    writer.write(piece)
                    await writer.drain()
                    passed_bytes += len(piece)
                    self._proxy.passed_bytes[direction] += len(piece)
                    data = rest
