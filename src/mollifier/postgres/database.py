"""The connection to Postgres: one pool per process, and the one place that knows what "cannot be reached" looks like."""

from __future__ import annotations

import asyncio
import re
import select
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import event, exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from mollifier.errors import EngineUnavailableError, FieldError, InvalidRequestError, SettingsError
from mollifier.settings import variable

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 30_000
DEADLINE_S = 15.0
STOP_S = 1.0
"""What is given up is stopped on the server within so long, or its connection is closed."""
IDLE_IN_TRANSACTION_MS = 15_000
"""No use of ours is at rest in a transaction for so long: its process has stopped, or its machine is gone, and others wait for its locks."""
POOL_SIZE = 16

# Beside the driver's operational errors, such as a full disk, a lock or a statement that took too long, a deadlock, a shutdown: the server
# is there and says, whatever the rows are, that it will not now. It is read-only after a failover, has ended a transaction that idled,
# does not let this user in, or has had its tables changed under a prepared statement.
_REFUSALS = (
    pg.ReadOnlySqlTransaction,
    pg.IdleInTransactionSessionTimeout,
    pg.InsufficientPrivilege,
    pg.FeatureNotSupported,
)


class Database:
    """A pool of connections to one database.

    Every failure to reach it comes out of `statement` and `transaction` as EngineUnavailableError, `unsent` where there was no
    connection to be had, text or numbers that it cannot hold as InvalidRequestError; other exceptions pass through. `deadline_s` bounds each use (see
    `bounded`), so that a server which hangs is one that cannot be reached.
    """

    def __init__(self, database_url: str, *, pool_size: int = POOL_SIZE, deadline_s: float = DEADLINE_S) -> None:
        self.conninfo = conninfo(database_url)
        self.deadline_s = deadline_s
        self._connections: set[psycopg.AsyncConnection[Any]] = set()
        self._engine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=self._connect,
            pool_size=pool_size,
            # A connection beyond the pool would be opened and closed for one use, at many times the cost of that use.
            max_overflow=0,
            pool_timeout=deadline_s,
            isolation_level="AUTOCOMMIT",
            # Parameters are payloads: they stay out of messages, and so out of logs.
            hide_parameters=True,
        )
        event.listen(self._engine.sync_engine, "checkout", _refuse_dead_connection)

    @asynccontextmanager
    async def statement(self) -> AsyncGenerator[AsyncConnection]:
        """Lend a connection for single statements, each of which commits by itself: one round trip each."""
        async with self._lend(self._engine.connect) as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncConnection]:
        """Lend a connection for one transaction: it commits at the end, or rolls back when an exception leaves the block."""
        async with self._lend(self._begin) as connection:
            yield connection

    async def ping(self) -> None:
        """Ask the server for a sign of life."""
        async with self.statement() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close every connection, those that somebody still has and those that a cancelled use took out of the pool too."""
        try:
            await self._engine.dispose()
        finally:
            for connection in self._connections:
                await connection.close()
            self._connections.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def bounded(self) -> AsyncGenerator[None]:
        """Give up what is done in the block at the deadline; raise TimeoutError then, `STOP_S` later at most.

        The client answers a cancellation by asking the server to stop the statement, and waits for that: from a server that hangs, for 10 s. A
        second cancellation ends the wait and the connection.
        """
        async with asyncio.timeout(self.deadline_s + STOP_S), asyncio.timeout(self.deadline_s):
            yield

    @asynccontextmanager
    async def _begin(self) -> AsyncGenerator[AsyncConnection]:
        async with self._engine.connect() as connection:
            try:
                # Here, where the connection has somebody who gives it back, for this may be cancelled. An engine with the option sets it before.
                await connection.execution_options(isolation_level="READ COMMITTED")
            except BaseException:
                # Half set, it would go back to the pool as one whose statements are never committed.
                await connection.invalidate()
                raise
            async with connection.begin():
                yield connection

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(self.conninfo)
        # As many as the pool is large, and a few that are closed.
        self._connections = {one for one in self._connections if not one.closed} | {connection}
        return connection

    @asynccontextmanager
    async def _lend(self, source: Callable[[], Any]) -> AsyncGenerator[AsyncConnection]:
        is_lent = False
        try:
            with translated():
                async with self.bounded(), source() as connection:
                    is_lent = True
                    yield connection
        except EngineUnavailableError as error:
            error.unsent = not is_lent
            raise


def conninfo(database_url: str) -> str:
    """Return the URL as libpq reads it, with our timeouts where it has none of its own.

    libpq reads every form of URL: unix sockets (`postgresql://user@/db?host=/folder`), several hosts, TLS parameters.
    Raises SettingsError, naming `MOLLIFIER_DATABASE_URL`, for one it cannot read.
    """
    try:
        given = conninfo_to_dict(database_url)
    except psycopg.Error as error:
        # libpq quotes what it cannot read, and that may be the password.
        told = re.sub(r'"[^"]*"', "a part of it", _first_line(error))
        raise SettingsError(variable("database_url"), f"is no database URL: {told}") from None
    timeouts = (
        f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_MS}"
    )
    options = f"-c timezone=UTC {timeouts} {given.get('options') or ''}".strip()
    ours = {"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "mollifier", "tcp_user_timeout": 10_000}
    return make_conninfo("", **{**ours, **given, "options": options})


@contextmanager
def translated() -> Generator[None]:
    """Turn what drivers raise when the server cannot be reached into EngineUnavailableError, data it cannot hold into a 4xx."""
    try:
        yield
    except exc.DBAPIError as error:
        _forget_rows(error)
        raise _translation(error.orig, invalidated=error.connection_invalidated) or error from error
    except (psycopg.Error, OSError, exc.TimeoutError) as error:
        raise _translation(error) or error from error
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            FieldError("body", "holds half of a surrogate pair, which is no character")
        ) from error


def _forget_rows(error: exc.DBAPIError) -> None:
    """Keep the message's first line: the details after it repeat the row that was refused, payload and all, and errors are logged."""
    for one in (error, error.orig):
        if one is not None and one.args:
            one.args = (_first_line(one), *one.args[1:])


def _translation(error: BaseException | None, *, invalidated: bool = False) -> Exception | None:
    match error:
        case pg.UndefinedTable() | pg.UndefinedColumn() | pg.UndefinedFunction() | pg.InvalidCatalogName():
            return EngineUnavailableError(
                f"the database is not up to date, run `mollifier migrate`: {_first_line(error)}"
            )
        case psycopg.DataError() | pg.ProgramLimitExceeded():
            return InvalidRequestError(FieldError("body", f"holds a value that cannot be stored: {_first_line(error)}"))
        case psycopg.OperationalError() | psycopg.InterfaceError() | OSError() | exc.TimeoutError():
            return EngineUnavailableError(f"the database cannot be reached: {_first_line(error)}")
        case _ if invalidated or isinstance(error, _REFUSALS):
            return EngineUnavailableError(f"the database cannot serve: {_first_line(error)}")
        case _:
            return None


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_dead_connection(connection: Any, _record: object, _proxy: object) -> None:
    """Have the pool replace connections whose server went away while they were idle, without asking it over the network.

    An idle connection has nothing to read; one that does has been told of the server's end, or sees it. One that is closed was cancelled twice
    in its last use.
    """
    driver = connection.driver_connection
    if driver.closed:
        raise exc.DisconnectionError
    poll = select.poll()
    poll.register(driver.fileno(), select.POLLIN)
    if poll.poll(0):
        raise exc.InvalidatePoolError
