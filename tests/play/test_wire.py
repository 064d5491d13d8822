"""The player's HTTP client against servers that behave, and some that do not."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from mollifier.errors import SettingsError
from mollifier.model import Tenant
from mollifier.play.client import Call, Marker, TriggerClient
from mollifier.play.wire import KEEP_ALIVE_S, Answer, Origin, WireError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Server:
    """Answers each request with what `answer` returns for its number, and None by closing the connection."""

    def __init__(self, answer: Callable[[int], bytes | None]) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answer(len(self.requests))
                if answer is None:
                    return
                writer.write(answer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Callable[[int], bytes | None]) -> AsyncGenerator[Server]:
    server = Server(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    server.url = f"http://{host}:{port}"
    async with listening:
        yield server


@asynccontextmanager
async def origin_of(server: Server, clock: Callable[[], float] = lambda: 0.0) -> AsyncGenerator[Origin]:
    origin = Origin(server.url + "/prefix/", clock)
    try:
        yield origin
    finally:
        await origin.close()


async def test_a_call_is_one_http_request_and_its_answer() -> None:
    async with serving(lambda _: OK) as server, origin_of(server) as origin:
        assert await origin.post(origin.head("/a%2Fb", {"X": "y"}), b"body") == Answer(200, b"{}")
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    host = server.url.removeprefix("http://").encode()
    assert head.split(b"\r\n") == [b"POST /prefix/a%2Fb HTTP/1.1", b"Host: " + host, b"X: y", b"Content-Length: 4"]
    assert body == b"body"


async def test_calls_one_after_the_other_share_a_connection_and_calls_at_once_do_not() -> None:
    async with serving(lambda _: OK) as server, origin_of(server) as origin:
        head = origin.head("/", {})
        for _ in range(3):
            await origin.post(head, b"")
        assert server.connections == 1
        await asyncio.gather(*(origin.post(head, b"") for _ in range(4)))
        assert server.connections == 4


async def test_connections_that_were_opened_ahead_are_those_that_calls_use() -> None:
    async with serving(lambda _: OK) as server, origin_of(server) as origin:
        await origin.open(60)
        while server.connections < 60:
            await asyncio.sleep(0)
        await asyncio.gather(*(origin.post(origin.head("/", {}), b"") for _ in range(60)))
        assert server.connections == 60


async def test_a_connection_that_has_been_idle_for_long_is_not_used_again() -> None:
    now_s = 0.0
    async with serving(lambda _: OK) as server, origin_of(server, lambda: now_s) as origin:
        head = origin.head("/", {})
        await origin.post(head, b"")
        now_s += KEEP_ALIVE_S
        await origin.post(head, b"")
        assert server.connections == 2


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Answer(404, b"")),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", Answer(200, b"abc")),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", Answer(200, b"x")),
    ],
)
async def test_answers_of_every_form_are_read(raw: bytes, answer: Answer) -> None:
    async with serving(lambda _: raw) as server, origin_of(server) as origin:
        head = origin.head("/", {})
        assert [await origin.post(head, b""), await origin.post(head, b"")] == [answer, answer]


@pytest.mark.parametrize("raw", [None, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", b"SSH-2.0-OpenSSH\r\n"])
async def test_no_proper_answer_is_an_error(raw: bytes | None) -> None:
    def answer(number: int) -> bytes | None:
        return raw if number == 1 else None

    async with serving(answer) as server, origin_of(server) as origin:
        asking = asyncio.create_task(origin.post(origin.head("/", {}), b""))
        while not server.requests:
            await asyncio.sleep(0)
        if raw is not None and raw.startswith(b"HTTP"):
            await asyncio.sleep(0)
            await origin.close()
        with pytest.raises(WireError):
            await asking


async def test_a_server_that_is_not_there_is_an_error() -> None:
    async with serving(lambda _: OK) as server:
        pass
    with pytest.raises(WireError, match="cannot connect"):
        await Origin(server.url).post(b"", b"")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="is no URL of an API"):
        Origin(url)


async def test_every_kind_of_answer_is_counted_once_and_refusals_are_explained() -> None:
    answers = iter(
        [
            (200, b'{"id":"run_1","isCached":false}'),
            (404, b'{"error":"No task","errors":[]}'),
            (503, b'{"error":"Come back"}'),
            (200, b"what?"),
            None,
        ]
    )

    def answer(_: int) -> bytes | None:
        given = next(answers)
        if given is None:
            return None
        return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (given[0], len(given[1]), given[1])

    tenant = Tenant(org_id="o", project_id="p", env_id="e", api_key="secret")
    async with serving(answer) as server, TriggerClient([server.url], [tenant], "a/b") as client:
        for number in range(5):
            await client.send(Call(number, 0.0, 0, Marker("m").body(number, b"{}")))
    (figures,) = client.answers
    assert (figures.offered, figures.run_ids, figures.rejected, figures.errors) == (5, {0: "run_1"}, 1, 3)
    assert len(figures.latencies_ms) == 4
    assert set(figures.complaints) == {
        "404: No task",
        "503: Come back",
        "200: what?",
        "no answer: the connection was closed before the answer",
    }
    assert b"/api/v1/tasks/a%2Fb/trigger" in server.requests[0]
    assert b"Authorization: Bearer secret" in server.requests[0]
