"""Calling a task: the payload becomes its argument, its return value becomes the output."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import threading
import traceback
from typing import Any, cast

import msgspec

from mollifier.model import RunError, Snapshot
from mollifier.tasks import TaskContext, TaskFunction, accepts_context

STACK_TRACE_CHARACTERS_MAX = 16_000


class OutputError(Exception):
    """What the task returned cannot be written as JSON."""


async def invoke(function: TaskFunction, argument: Any, context: TaskContext) -> Any:
    """Call the task and return what it returns, or raise what it raises. A plain function runs in a thread of its own.

    Cancelling the call cancels a coroutine; a thread cannot be stopped, its result is dropped.
    """
    arguments = (argument, context) if accepts_context(function) else (argument,)
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    result = await _in_thread(function, arguments, name=context.run_id)
    return await result if inspect.isawaitable(result) else result


def argument_of(snapshot: Snapshot) -> Any:
    """Return the value that the payload stands for; a stored payload's reference stands for itself.

    Raises ValueError or RecursionError for a payload that is not what its type says.
    """
    match snapshot.payload_type:
        case "application/json":
            return json.loads(snapshot.payload) if snapshot.payload else None
        case "application/super+json":
            value = json.loads(snapshot.payload) if snapshot.payload else None
            return cast("dict[str, Any]", value).get("json") if isinstance(value, dict) else value
        case _:
            return snapshot.payload.decode()


def output_of(value: Any) -> bytes:
    """Return the value as JSON. Dataclasses, structs, dates and the like are written as msgspec writes them.

    Raises OutputError.
    """
    try:
        text = json.dumps(
            value, default=msgspec.to_builtins, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"The task returned a {type(value).__name__} that is not JSON: {error}") from error


def run_error(error: BaseException) -> RunError:
    """Return what is recorded of an exception that a task raised."""
    stack_trace = "".join(traceback.format_exception(error))[-STACK_TRACE_CHARACTERS_MAX:]
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - an exception that cannot describe itself is one all the same
        message = ""
    name = type(error).__name__
    return RunError(message=_encodable(message or name), name=name, stack_trace=_encodable(stack_trace))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


async def _in_thread(function: TaskFunction, arguments: tuple[Any, ...], name: str) -> Any:
    """Call the function in a daemon thread: one that hangs must not keep the worker from stopping."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_result((result, error))

    def run() -> None:
        try:
            outcome = context.run(function, *arguments), None
        except BaseException as error:  # noqa: BLE001 - sys.exit() in a task ends the task, not the worker
            outcome = None, error
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            # The worker has stopped without waiting for this thread; nobody asks for the outcome.
            return

    threading.Thread(target=run, name=name, daemon=True).start()
    result, error = await done
    if error is None:
        return result
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(f"the task raised {type(error).__name__}") from error
