"""The pool: what cannot be reached, what outlives an outage, and what a cancelled call leaves behind."""

from __future__ import annotations

import asyncio
import gc
import random
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sqlalchemy import exc, text

from mollifier.embedded import Stack
from mollifier.errors import EngineUnavailableError, SettingsError
from mollifier.play.proxy import HANG, HOST, Proxy
from mollifier.postgres.database import DEADLINE_S, Database, conninfo
from mollifier.postgres.engine import PostgresRunEngine
from tests.postgres.support import (
    ENV,
    Outage,
    cancelled_everywhere,
    create,
    execute,
    let_others_run,
    rows,
    snapshot,
    until,
)

SECRET = "hunter2"


@pytest.fixture
async def silent_server() -> AsyncIterator[str]:
    """The URL of a server that accepts connections and never says a word."""
    held: list[asyncio.StreamWriter] = []

    def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    server = await asyncio.start_server(hold, "127.0.0.1")
    yield f"postgresql://user@127.0.0.1:{server.sockets[0].getsockname()[1]}/db"
    server.close()
    for writer in held:
        writer.close()


async def transact(database: Database, *statements: str, then: Callable[[], object] = lambda: None) -> None:
    async with database.transaction() as connection:
        for statement in statements:
            await connection.execute(text(statement))
        then()


async def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async with Database(f"postgresql://user@/db?host={tmp_path}") as database:
        with pytest.raises(EngineUnavailableError, match="cannot be reached") as raised:
            await database.ping()
        assert raised.value.unsent, "whoever asked for something must know that it has not been done"


async def test_a_server_that_never_answers_is_unavailable(silent_server: str) -> None:
    async with Database(silent_server, deadline_s=0.2) as database:
        with pytest.raises(EngineUnavailableError):
            await database.ping()


async def test_a_server_that_falls_silent_is_not_waited_for_while_it_is_asked_to_stop(
    stack: Stack, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client library asks the server to stop what is given up, and would wait 5 s for its answer and 5 s more for the statement's."""
    name = urlsplit(database_url).path
    async with Proxy(stack.sockets / ".s.PGSQL.5432") as proxy:
        url = f"postgresql://mollifier@{HOST}:{proxy.port}{name}"
        async with Database(url, deadline_s=0.2) as database:
            await database.ping()
            proxy.misbehave(requests=HANG, replies=HANG)
            with pytest.raises(EngineUnavailableError):
                await database.ping()
            assert "query cancellation interrupted" in caplog.text
            proxy.behave()
            await database.ping()


async def test_a_database_that_does_not_exist_is_unavailable(database_url: str) -> None:
    async with Database(database_url + "_not") as database:
        with pytest.raises(EngineUnavailableError):
            await database.ping()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("53100", "disk full"),
        ("53200", "out of memory"),
        ("53300", "too many connections"),
        ("57014", "statement timeout"),
        ("57P01", "administrator's shutdown"),
        ("57P03", "cannot connect now"),
        ("55P03", "lock timeout"),
        ("58030", "input or output error"),
        ("40001", "serialization failure"),
        ("40P01", "deadlock"),
        ("25006", "read-only transaction"),
        ("25P03", "idle in transaction"),
        ("42501", "no privilege"),
        ("0A000", "cached plan"),
    ],
)
async def test_what_is_the_databases_fault_is_an_engine_that_is_unavailable(
    database_url: str, code: str, name: str
) -> None:
    async with Database(database_url) as database:
        with pytest.raises(EngineUnavailableError, match=name):
            await raise_there(database, code, name)


@pytest.mark.parametrize("code", ["23502", "23514", "XX000", "P0001"])
async def test_what_may_be_the_rows_fault_is_not(database_url: str, code: str) -> None:
    async with Database(database_url) as database:
        with pytest.raises(exc.DBAPIError, match="a row's"):
            await raise_there(database, code, "a row's")


async def raise_there(database: Database, code: str, message: str) -> None:
    """Have the server raise this error."""
    quoted = message.replace("'", "''")
    await transact(database, f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}', MESSAGE = '{quoted}'; END $$")


async def test_a_statement_beyond_the_deadline_is_unavailable_and_harms_no_later_one(database_url: str) -> None:
    async with Database(database_url, pool_size=1, deadline_s=0.3) as database:
        with pytest.raises(EngineUnavailableError) as raised:
            await rows(database, "SELECT pg_sleep(30)")

        assert not raised.value.unsent
        assert await rows(database, "SELECT 1 AS one") == [{"one": 1}]


async def test_a_pool_that_stays_busy_is_unavailable(database_url: str) -> None:
    async with Database(database_url, pool_size=1, deadline_s=0.3) as database:
        async with database._engine.connect():  # pyright: ignore[reportPrivateUsage] - held beyond every deadline
            with pytest.raises(EngineUnavailableError):
                await database.ping()

        await database.ping()


async def test_the_first_call_after_an_outage_succeeds(
    database: Database, engine: PostgresRunEngine, outage: Outage
) -> None:
    await asyncio.gather(*(engine.get_run(ENV, "run") for _ in range(10)))
    await outage.begin()
    with pytest.raises(EngineUnavailableError):
        await create(engine)
    await outage.end()

    await create(engine)


async def test_the_first_call_after_a_restart_of_the_server_succeeds(
    stack: Stack, database: Database, engine: PostgresRunEngine
) -> None:
    run_id = await create(engine)
    await asyncio.gather(*(engine.get_run(ENV, "run") for _ in range(10)))

    await stack.restart_postgres()

    assert await engine.get_run(ENV, run_id) is not None


async def test_a_server_that_only_reads_is_unavailable_for_writing(database: Database) -> None:
    with pytest.raises(EngineUnavailableError, match="read-only"):
        await transact(database, "SET TRANSACTION READ ONLY", "INSERT INTO feature_flags VALUES ('a', '1')")


async def test_other_failures_stay_what_they_are_and_roll_back(database: Database) -> None:
    await execute(database, "INSERT INTO feature_flags VALUES ('a', '1')")

    with pytest.raises(exc.IntegrityError):
        await transact(
            database, "INSERT INTO feature_flags VALUES ('b', '1')", "INSERT INTO feature_flags VALUES ('a', '1')"
        )
    with pytest.raises(ZeroDivisionError):
        await transact(database, "INSERT INTO feature_flags VALUES ('c', '1')", then=lambda: 1 // 0)

    assert await rows(database, "SELECT name FROM feature_flags") == [{"name": "a"}]


async def test_messages_and_logs_hold_no_payload(engine: PostgresRunEngine, database: Database) -> None:
    await execute(database, "ALTER TABLE runs ADD CONSTRAINT no CHECK (depth < 5)")

    with pytest.raises(exc.IntegrityError) as raised:
        await engine.create_runs([snapshot(depth=7, payload=b"secret")])

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("is_busy", [False, True])
async def test_cancelled_calls_cross_no_replies(
    database_url: str, is_busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the moment at which a call is cancelled, later calls get their own answers and the pool stays whole."""
    if is_busy:
        let_others_run(monkeypatch)
    dice = random.Random(1)
    async with Database(database_url, pool_size=3) as database:

        async def ask(number: int) -> int:
            async with database.statement() as connection:
                return (await connection.execute(text("SELECT CAST(:number AS int)"), {"number": number})).scalar_one()

        for turn in range(30):
            calls = [asyncio.create_task(ask(turn * 10 + number)) for number in range(10)]
            await asyncio.sleep(dice.random() * 0.003)
            for call in dice.sample(calls, 5):
                call.cancel()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            for number, answer in enumerate(answers):
                assert isinstance(answer, asyncio.CancelledError) or answer == turn * 10 + number
        assert await asyncio.gather(*(ask(number) for number in range(20))) == list(range(20))


@pytest.mark.parametrize("is_lent", [False, True], ids=["idle", "lent to somebody who still has it"])
async def test_closing_leaves_no_connection_open(database: Database, database_url: str, is_lent: bool) -> None:
    closing = Database(database_url + "&application_name=closing")

    async def is_gone() -> bool:
        return not await rows(database, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'closing'")

    async def use() -> None:
        async with closing.statement() as connection:
            await connection.execute(text("SELECT 1"))
            assert not await is_gone()
            if is_lent:
                await closing.close()
                await until(is_gone)

    with suppress(EngineUnavailableError):
        await use()
    await closing.close()
    await until(is_gone)


async def test_a_use_that_is_cancelled_leaves_no_connection_open_once_the_pool_is_closed(
    database: Database, database_url: str
) -> None:
    async def use() -> None:
        async with Database(database_url + "&application_name=cancelled") as cancelled:
            await transact(cancelled, "SELECT 1")

    async def is_gone() -> bool:
        return not await rows(database, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'cancelled'")

    async for _ in cancelled_everywhere(use):
        # What libpq had begun to open when it was cancelled ends as garbage; nothing warns of that, and nothing has to close it.
        gc.collect()
        await until(is_gone)


async def test_the_server_ends_a_transaction_whose_process_says_no_more(database_url: str, database: Database) -> None:
    """What stopped in the middle holds locks that others wait for."""
    (default,) = await rows(database, "SHOW idle_in_transaction_session_timeout")
    assert default["idle_in_transaction_session_timeout"] == f"{DEADLINE_S:g}s"
    idle = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"

    async def is_over() -> bool:
        return not await rows(database, idle)

    options = "&options=-c%20idle_in_transaction_session_timeout%3D100"
    async with Database(database_url + options) as impatient:

        async def stop_within_a_transaction() -> None:
            async with impatient.transaction() as connection:
                await connection.execute(text("SELECT 1"))
                await until(is_over)
                await connection.execute(text("SELECT 1"))

        with pytest.raises(EngineUnavailableError):
            await stop_within_a_transaction()
        await impatient.ping()


async def test_an_error_does_not_repeat_the_row_that_was_refused(database: Database) -> None:
    await execute(database, "CREATE TABLE refusing (payload text, CONSTRAINT never CHECK (false))")

    with pytest.raises(exc.IntegrityError) as caught:
        await execute(database, "INSERT INTO refusing VALUES (:payload)", payload=SECRET)

    told = "".join(traceback.format_exception(caught.value))
    assert "never" in told
    assert SECRET not in told


@pytest.mark.parametrize("url", [f"postgresql://u:{SECRET}%zz@h/d", f"postgresql://u@h/d?{SECRET}=1"])
def test_a_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises(SettingsError, match="MOLLIFIER_DATABASE_URL") as caught:
        conninfo(url)

    assert SECRET not in "".join(traceback.format_exception(caught.value))
