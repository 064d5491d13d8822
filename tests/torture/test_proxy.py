"""The proxy: it passes bytes on as they are, and does to them what their fate says."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mollifier.play.proxy import HANG, HOST, LOSE, Fate, Proxy

TIMEOUT_S = 10.0


class Echo:
    """A server on a Unix socket that sends everything back; `heard` is what it was sent."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.heard = bytearray()
        self.connected = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        try:
            while data := await reader.read(100):
                self.heard += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            self.connected -= 1
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    with TemporaryDirectory() as folder:
        echo = Echo(Path(folder) / "echo.sock")
        async with await asyncio.start_unix_server(echo.serve, echo.socket):
            yield echo


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    async with Proxy(echo.socket) as proxy:
        yield proxy


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def ask(self, data: bytes) -> bytes:
        """Send these bytes and return as many, or fewer when the connection ends before."""
        self.writer.write(data)
        return await self.hear(len(data))

    async def hear(self, number: int) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            try:
                return await self._reader.readexactly(number)
            except asyncio.IncompleteReadError as cut:
                return cut.partial
            except ConnectionResetError:
                return b""


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection(HOST, proxy.port))
    yield client
    client.writer.close()


async def until_heard(echo: Echo, data: bytes) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while bytes(echo.heard) != data:
            await asyncio.sleep(0.001)


async def test_bytes_pass_both_ways_as_they_are(client: Client) -> None:
    data = bytes(range(256)) * 1000
    assert await client.ask(data) == data


async def test_in_small_pieces_they_are_the_same_bytes(proxy: Proxy, client: Client) -> None:
    proxy.misbehave(requests=Fate(piece_bytes=3, delay_s=0.0001), replies=Fate(piece_bytes=2))
    assert await client.ask(b"split wherever it comes to be") == b"split wherever it comes to be"


@pytest.mark.parametrize("after_bytes", [0, 1, 5, 9])
async def test_a_reply_is_cut_after_as_many_bytes_as_were_chosen(
    proxy: Proxy, client: Client, after_bytes: int
) -> None:
    assert await client.ask(b"before") == b"before"
    proxy.misbehave(replies=Fate(after_bytes=after_bytes, end="cut"))
    assert await client.ask(b"0123456789") == b"0123456789"[:after_bytes]


async def test_where_it_cuts_once_the_next_connection_fares_well(proxy: Proxy, client: Client) -> None:
    proxy.misbehave(requests=Fate(after_bytes=3, once=True))
    assert await client.ask(b"0123456789") in (b"", b"012")
    next_client = Client(*await asyncio.open_connection(HOST, proxy.port))
    assert await next_client.ask(b"0123456789") == b"0123456789"
    assert proxy.cuts == 1
    next_client.writer.close()


async def test_it_counts_what_has_passed_since_its_fates_changed(proxy: Proxy, client: Client) -> None:
    await client.ask(b"before")
    proxy.behave()
    await client.ask(b"01234")
    await client.ask(b"56")
    assert proxy.passed_bytes == {"requests": 7, "replies": 7}


async def test_half_a_request_is_all_that_arrives_of_it(proxy: Proxy, echo: Echo, client: Client) -> None:
    proxy.misbehave(requests=Fate(after_bytes=4, end="cut"))
    client.writer.write(b"0123456789")
    await until_heard(echo, b"0123")
    assert len(await client.hear(10)) <= 4


async def test_a_request_whose_reply_is_lost_has_arrived_and_its_connection_does_not_outlive_that(
    proxy: Proxy, echo: Echo, client: Client
) -> None:
    proxy.misbehave(replies=LOSE)
    client.writer.write(b"done, and never answered")
    await until_heard(echo, b"done, and never answered")
    answering = asyncio.ensure_future(client.hear(1))
    await asyncio.sleep(0)
    assert not answering.done()
    proxy.behave()
    assert await answering == b""


async def test_what_hangs_goes_on_where_it_was(proxy: Proxy, client: Client) -> None:
    proxy.misbehave(requests=HANG, replies=HANG)
    asking = asyncio.ensure_future(client.ask(b"patience"))
    async with asyncio.timeout(TIMEOUT_S):
        while proxy.connections == 0:
            await asyncio.sleep(0.001)
    assert not asking.done()
    proxy.behave()
    assert await asking == b"patience"


async def test_a_cut_ends_every_connection_at_both_ends(proxy: Proxy, echo: Echo, client: Client) -> None:
    assert await client.ask(b"there") == b"there"
    proxy.cut()
    assert await client.hear(1) == b""
    async with asyncio.timeout(TIMEOUT_S):
        while proxy.connections or echo.connected:
            await asyncio.sleep(0.001)


async def test_while_it_refuses_a_new_connection_ends_at_once(proxy: Proxy, client: Client) -> None:
    assert await client.ask(b"old") == b"old"
    proxy.refusing = True
    newcomer = Client(*await asyncio.open_connection(HOST, proxy.port))
    assert await newcomer.ask(b"new") == b""
    assert await client.ask(b"old") == b"old"
    newcomer.writer.close()


async def test_without_a_server_behind_it_a_connection_ends_at_once(tmp_path: Path) -> None:
    async with Proxy(tmp_path / "nobody.sock") as proxy:
        client = Client(*await asyncio.open_connection(HOST, proxy.port))
        assert await client.hear(1) == b""
        client.writer.close()
