"""Fixtures that every test may ask for: a real Valkey and a real Postgres, one pair per test process, emptied for each test."""

import contextlib
import fnmatch
import os
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from typing import cast
from urllib.parse import urlsplit

import pytest
import redis
import redis.asyncio

from mollifier.embedded import EmbeddedStack, EmbeddedUnavailable, Stack, create_database, drop_database

TEMPLATE = "migrated"

# These are for ever by design; see the table in `mollifier.keys`.
ETERNAL = ("*:seq", "mollifier:partitions", "mollifier:confirmation")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "leaves_keys(*patterns): this test leaves keys without a lifetime behind on purpose; given patterns, only such keys.",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape half surrogate pairs in what a test logged: a report with one cannot travel from a test process to the one that collects."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A Valkey and a Postgres for this test process. Nothing in them survives a crash of the machine: no fsync, no append-only file."""
    with skipping_without_wheels(), EmbeddedStack(durable=False) as running:
        yield running


@pytest.fixture
def redis_url(stack: Stack, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty Valkey. A test that leaves keys without a lifetime behind fails, unless marked `leaves_keys`."""
    with redis.Redis.from_url(stack.redis_url) as client:  # pyright: ignore[reportUnknownMemberType] - untyped options
        client.flushall()  # pyright: ignore[reportUnknownMemberType] - as above
        yield stack.redis_url
        allowed = [*ETERNAL, *patterns_left_on_purpose(request)]
        left = [key for key in eternal_keys(client) if not any(fnmatch.fnmatchcase(key, one) for one in allowed)]
        if left:
            pytest.fail(f"keys without a lifetime are left behind: {sorted(left)}", pytrace=False)


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A client of `redis_url` that answers in bytes."""
    async with redis.asyncio.Redis.from_url(redis_url) as client:  # pyright: ignore[reportUnknownMemberType] - as above
        yield client


@pytest.fixture(scope="session")
def template_url(stack: Stack) -> str:
    """The database that migrations have run on; its copies are what tests get."""
    from mollifier.postgres.migrate import migrate

    url = urlsplit(stack.database_url)._replace(path=f"/{TEMPLATE}").geturl()
    create_database(url)
    migrate(url)
    return url


@pytest.fixture
def database_url(template_url: str) -> Iterator[str]:
    """A database of this test's own with the current schema and no rows."""
    yield from passing_database(template_url, TEMPLATE)


@pytest.fixture
def empty_database_url(stack: Stack) -> Iterator[str]:
    """A database of this test's own without any schema."""
    yield from passing_database(stack.database_url, None)


@contextlib.contextmanager
def skipping_without_wheels() -> Generator[None]:
    """Skip what needs servers where their wheels are missing; in CI that is a failure."""
    try:
        yield
    except EmbeddedUnavailable as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


def passing_database(beside_url: str, template: str | None) -> Iterator[str]:
    url = urlsplit(beside_url)._replace(path=f"/test_{os.urandom(8).hex()}").geturl()
    create_database(url, template=template)
    try:
        yield url
    finally:
        drop_database(url)


def patterns_left_on_purpose(request: pytest.FixtureRequest) -> list[str]:
    markers = list(request.node.iter_markers("leaves_keys"))
    return [pattern for marker in markers for pattern in marker.args or ("*",)]


def eternal_keys(client: redis.Redis) -> list[str]:
    keys = cast("Iterable[bytes]", client.scan_iter(count=1000))  # pyright: ignore[reportUnknownMemberType] - as above
    return [key.decode(errors="backslashreplace") for key in keys if client.pttl(key) == -1]
