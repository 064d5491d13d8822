"""Calling a task: payload to argument, return value to output, exception to error."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
from datetime import datetime
from typing import Any

import pytest

from mollifier.postgres.invocation import OutputError, argument_of, invoke, output_of, run_error
from mollifier.tasks import TaskContext, TaskFunction
from tests.postgres.support import START, snapshot

CONTEXT = TaskContext(run_id="run_1", task_id="task", env_id="env", attempt=2, created_at=START)


@pytest.mark.parametrize(
    ("payload_type", "payload", "argument"),
    [
        ("application/json", b'{"a": [9007199254740993, "\\u0000"]}', {"a": [9007199254740993, "\x00"]}),
        ("application/json", b"", None),
        ("application/super+json", b'{"json": {"a": 1}, "meta": {"values": {}}}', {"a": 1}),
        ("application/super+json", b"{}", None),
        ("application/super+json", b"", None),
        ("application/super+json", b"[1]", [1]),
        ("text/plain", "h\N{SNOWMAN}".encode(), "h\N{SNOWMAN}"),
        ("application/store", b"packets/1.json", "packets/1.json"),
    ],
)
def test_the_payload_becomes_the_value_that_it_stands_for(payload_type: str, payload: bytes, argument: object) -> None:
    assert argument_of(snapshot(payload=payload, payload_type=payload_type)) == argument


@pytest.mark.parametrize(
    ("payload_type", "payload"),
    [("application/json", b"{"), ("application/super+json", b"nope"), ("text/plain", b"\xff")],
)
def test_a_payload_that_is_not_what_its_type_says_is_a_value_error(payload_type: str, payload: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        argument_of(snapshot(payload=payload, payload_type=payload_type))


@dataclasses.dataclass
class Point:
    x: int
    at: datetime


@pytest.mark.parametrize(
    ("value", "output"),
    [
        (None, b"null"),
        ({"a": [1, 2.5, "h\N{SNOWMAN}\x00"]}, '{"a":[1,2.5,"h\N{SNOWMAN}\\u0000"]}'.encode()),
        (10**30, b"1" + b"0" * 30),
        ([Point(1, START)], b'[{"x":1,"at":"2026-03-01T12:00:00Z"}]'),
        ({1}, b"[1]"),
    ],
)
def test_a_return_value_becomes_json(value: object, output: bytes) -> None:
    assert output_of(value) == output


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [object(), float("nan"), "\ud800", {(1, 2): 3}, endless(), lambda: 1])
def test_a_return_value_that_is_not_json_says_so(value: object) -> None:
    with pytest.raises(OutputError, match=f"returned a {type(value).__name__} that is not JSON"):
        output_of(value)


def plain(payload: int) -> int:
    return payload + 1


def contextual(payload: int, context: TaskContext) -> tuple[int, int]:
    return payload, context.attempt


async def coroutine(payload: int, context: TaskContext) -> tuple[int, str]:
    await asyncio.sleep(0)
    return payload, context.run_id


def hands_over(payload: int) -> Any:
    return coroutine(payload, CONTEXT)


@pytest.mark.parametrize(
    ("function", "result"),
    [(plain, 2), (contextual, (1, 2)), (coroutine, (1, "run_1")), (hands_over, (1, "run_1"))],
)
async def test_plain_functions_and_coroutines_are_called_with_what_they_take(
    function: TaskFunction, result: object
) -> None:
    assert await invoke(function, 1, CONTEXT) == result


async def test_a_plain_function_does_not_hold_up_the_loop() -> None:
    entered, leave = threading.Event(), threading.Event()

    def blocks(_: object) -> str:
        entered.set()
        assert leave.wait(10)
        return threading.current_thread().name

    calling = asyncio.create_task(invoke(blocks, None, CONTEXT))
    while not entered.is_set():
        await asyncio.sleep(0.001)
    leave.set()

    assert await calling == "run_1"


async def test_a_thread_that_outlives_its_call_is_let_go() -> None:
    leave = threading.Event()

    def blocks(_: object) -> None:
        leave.wait(10)

    calling = asyncio.create_task(invoke(blocks, None, CONTEXT))
    await asyncio.sleep(0)

    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    leave.set()
    await asyncio.sleep(0.01)


async def test_what_a_plain_function_raises_comes_out() -> None:
    def stops(_: object) -> None:
        sys.exit(3)

    def fails(_: object) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        await invoke(fails, None, CONTEXT)
    with pytest.raises(RuntimeError, match="SystemExit"):
        await invoke(stops, None, CONTEXT)


def test_an_exception_is_recorded_with_its_name_and_where_it_came_from() -> None:
    def fails() -> None:
        raise ValueError("no good \ud800 \x00")

    with pytest.raises(ValueError, match="no good") as raised:
        fails()
    recorded = run_error(raised.value)

    assert (recorded.message, recorded.name) == ("no good ? \x00", "ValueError")
    assert recorded.stack_trace is not None
    assert "in fails" in recorded.stack_trace


def test_an_exception_that_cannot_describe_itself_is_recorded_by_its_name() -> None:
    class Mute(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert run_error(Mute()).message == "Mute"
    assert run_error(ValueError()).message == "ValueError"
