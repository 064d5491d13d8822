"""The buffer's server over TLS: its certificate is checked, against a certificate authority of one's own where one is named.

The embedded Valkey is built without TLS, so what stands before it here ends the encryption, as a proxy does.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from mollifier import config
from mollifier.buffer import Buffer
from mollifier.errors import BufferUnavailableError, SettingsError
from mollifier.server import Server, connect
from mollifier.settings import Settings
from tests.core.support import ORG, execute, hold

USER, PASSWORD = "tls-user", "hunter2"


@dataclass(frozen=True)
class Certificates:
    """A server's certificate for `localhost`, with its key, and who vouches for it: itself."""

    certificate: Path
    key: Path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, which makes the certificates of these tests")
    folder = tmp_path_factory.mktemp("certificates")
    made = Certificates(folder / "server.pem", folder / "server.key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", made.key, "-out", made.certificate),
        ],
        check=True,
        capture_output=True,
    )
    return made


@pytest.fixture
async def tls_port(redis_url: str, redis_client: Redis, certificates: Certificates) -> AsyncIterator[int]:
    """The port at which the server is reached over TLS, by one user with a password."""
    await execute(redis_client, "ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate, certificates.key)
    serving: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_unix_connection(urlsplit(redis_url).path)
        try:
            await asyncio.gather(pass_on(reader, behind_writer), pass_on(behind_reader, writer), return_exceptions=True)
        finally:
            writer.close()
            behind_writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)
    await execute(redis_client, "ACL", "DELUSER", USER)


def settings(port: int, ca_file: Path | None, host: str = "localhost", **more: str) -> Settings:
    """Return what these variables make of the server's name."""
    named = {"HOST": host, "PORT": str(port), "USERNAME": USER, "PASSWORD": PASSWORD, "TLS": "1", **more}
    named |= {"CA_FILE": str(ca_file)} if ca_file else {}
    return config.load({f"MOLLIFIER_REDIS_{name}": value for name, value in named.items()})


async def is_served(asked: Settings, run_id: str = "run_1") -> None:
    """Accept an entry and take it out again. Raises BufferUnavailableError."""
    async with connect(asked.redis_url or "") as client:
        buffer = Buffer(Server(client), lambda: asked)
        await hold(buffer, run_id)
        entry = await buffer.get_entry(ORG, run_id)
        assert entry is not None


async def test_a_server_with_a_certificate_of_ones_own_is_served(tls_port: int, certificates: Certificates) -> None:
    await is_served(settings(tls_port, certificates.certificate))


async def test_a_url_may_name_the_certificates_too(tls_port: int, certificates: Certificates) -> None:
    url = f"rediss://{USER}:{PASSWORD}@localhost:{tls_port}/0"
    await is_served(Settings(redis_url=f"{url}?ssl_ca_certs={certificates.certificate}"))
    named = {"MOLLIFIER_REDIS_URL": url, "MOLLIFIER_REDIS_CA_FILE": str(certificates.certificate)}
    await is_served(config.load(named), "run_2")


async def test_a_certificate_that_nobody_vouches_for_is_refused(tls_port: int) -> None:
    with pytest.raises(BufferUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await is_served(settings(tls_port, None))


async def test_a_certificate_for_another_host_is_refused(tls_port: int, certificates: Certificates) -> None:
    with pytest.raises(BufferUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await is_served(settings(tls_port, certificates.certificate, host="127.0.0.1"))


async def test_a_wrong_password_is_refused_and_not_repeated(tls_port: int, certificates: Certificates) -> None:
    with pytest.raises(BufferUnavailableError, match=r"(?i)password") as caught:
        await is_served(settings(tls_port, certificates.certificate, PASSWORD="wrong-one"))
    assert "wrong-one" not in str(caught.value)


async def test_who_speaks_no_tls_to_it_gets_no_further(tls_port: int) -> None:
    with pytest.raises(BufferUnavailableError):
        await is_served(settings(tls_port, None, TLS="0"))


def test_certificates_that_cannot_be_used_stop_the_boot(tmp_path: Path, certificates: Certificates) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for ca_file in (tmp_path / "missing.pem", empty, tmp_path):
        with pytest.raises(SettingsError, match=str(ca_file)) as caught:
            settings(1, ca_file)
        assert caught.value.variable == "MOLLIFIER_REDIS_CA_FILE"


def test_certificates_go_with_tls_only(certificates: Certificates) -> None:
    with pytest.raises(SettingsError, match="MOLLIFIER_REDIS_TLS"):
        settings(1, certificates.certificate, TLS="0")
    with pytest.raises(SettingsError, match="MOLLIFIER_REDIS_TLS"):
        config.load({"MOLLIFIER_REDIS_CA_FILE": str(certificates.certificate)})
