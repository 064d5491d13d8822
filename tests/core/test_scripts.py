"""Each script's header, the keys and arguments its body uses, and its typed function say the same."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from mollifier import scripts
from mollifier.buffer import Accepted, Buffer, Claimed, Look, Ready, Reclaimed, Revival
from mollifier.embedded import Stack
from mollifier.errors import BufferUnavailableError
from mollifier.model import EntryKind, GateInputs
from mollifier.scripts import Call, Restored, Scripts
from mollifier.server import Command, Reply, Server, connect
from mollifier.sweeps import SweepReport
from mollifier.trip import TripEvaluator
from tests.core.support import ENV, ORG, SCRIPT_NAMES, SETTINGS, ShimmedServer, bound, execute, expire_lease, hold, take

LUA = resources.files("mollifier") / "lua"
LIBRARIES = sorted(file.name for file in (LUA / "lib").iterdir())

TOUCHES_ONLY_DECLARED_KEYS = """
local declared = {}
for _, key in ipairs(KEYS) do declared[key] = true end
local server = redis
local function checked(name)
  return function(command, ...)
    local key = ...
    if command ~= 'TIME' and command ~= 'PUBLISH' and not declared[key] then error(command .. ' of undeclared ' .. tostring(key)) end
    return server[name](command, ...)
  end
end
local redis = { call = checked('call'), pcall = checked('pcall') }
"""


class Parameter(NamedTuple):
    position: int
    name: str
    variadic: bool


class Header(NamedTuple):
    purpose: str
    keys: list[Parameter]
    args: list[Parameter]
    returns: str


def source(name: str) -> str:
    return (LUA / f"{name}.lua").read_text("utf-8")


def header_of(text: str) -> Header:
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        lines.append(line[2:].strip())
    sections: dict[str, list[Parameter]] = {"KEYS": [], "ARGV": []}
    section = ""
    for line in lines:
        found = re.match(r"(?:(KEYS|ARGV)\s+)?(\d+)(\.\.\.)? (\w+)", line)
        if found:
            section = found[1] or section
            sections[section].append(Parameter(int(found[2]), found[4], found[3] is not None))
    returns = [line for line in lines if line.startswith("Returns ")]
    return Header(lines[0], sections["KEYS"], sections["ARGV"], returns[0] if returns else "")


def body_of(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("--"))


def typed_function(name: str) -> Callable[..., Call[Any]]:
    return getattr(scripts, name)


def sample(name: str, parameter: inspect.Parameter, number: int) -> Any:
    """Return a value for the parameter that tells which parameter it was given for."""
    match parameter.annotation:
        case "str" | "str | None":
            return name
        case "bytes":
            return name.encode()
        case "int":
            return number
        case "Sequence[str]":
            return [name]
        case "Sequence[int]":
            return [number]
        case "EntryKind":
            return EntryKind.HELD
        case other:
            raise AssertionError(f"no sample for {other}")


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_a_script_is_headed_by_purpose_keys_arguments_and_returns(name: str) -> None:
    header = header_of(source(name))
    assert header.purpose.endswith(".")
    assert header.keys
    assert header.returns
    for parameters in (header.keys, header.args):
        assert [p.position for p in parameters] == list(range(1, len(parameters) + 1))
        assert not any(p.variadic for p in parameters[:-1])


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_a_script_uses_exactly_the_keys_and_arguments_of_its_header(name: str) -> None:
    header, body = header_of(source(name)), body_of(source(name))
    for table, parameters in (("KEYS", header.keys), ("ARGV", header.args)):
        used = {int(index) for index in re.findall(rf"\b{table}\[(\d+)\]", body)}
        assert used == {p.position for p in parameters if not p.variadic}
        computed = re.search(rf"\b{table}\[[^\d]", body) is not None
        assert computed == any(p.variadic for p in parameters)


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_the_typed_function_of_a_script_takes_the_names_of_its_header_in_order(name: str) -> None:
    header = header_of(source(name))
    parameters = inspect.signature(typed_function(name)).parameters
    assert list(parameters) == [p.name for p in (*header.keys, *header.args)]


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_the_typed_function_of_a_script_puts_each_value_where_the_header_says(name: str) -> None:
    header = header_of(source(name))
    function = typed_function(name)
    parameters = inspect.signature(function).parameters
    values = {key: sample(key, p, number) for number, (key, p) in enumerate(parameters.items())}
    call = function(**values)
    assert call.script == scripts.load(name)
    assert list(call.keys) == [p.name for p in header.keys]
    expected = [values[p.name] for p in header.args]
    assert list(call.args) == [value[0] if isinstance(value, list) else value for value in expected]


def test_every_script_has_a_typed_function_and_every_typed_function_a_script() -> None:
    functions = {
        name
        for name, function in inspect.getmembers(scripts, inspect.isfunction)
        if function.__module__ == scripts.__name__
        and str(inspect.signature(function).return_annotation).startswith("Call[")
    }
    assert functions == set(SCRIPT_NAMES)


@pytest.mark.parametrize("file", [*(f"{name}.lua" for name in SCRIPT_NAMES), *(f"lib/{name}" for name in LIBRARIES)])
def test_no_script_decodes_payloads_enumerates_keys_or_spells_a_key(file: str) -> None:
    body = body_of((LUA / file).read_text("utf-8"))
    assert "cjson" not in body
    assert "cmsgpack" not in body
    calls = re.findall(r"redis\.p?call\('(\w+)'(?:,\s*([^,)]+))?", body)
    assert len(calls) == body.count("redis.call(") + body.count("redis.pcall(")
    assert not {command for command, _ in calls} & {"KEYS", "SCAN", "RANDOMKEY", "EVAL", "FLUSHALL", "FLUSHDB"}
    assert [key for _, key in calls if key.startswith(("'", '"'))] == []


@pytest.mark.parametrize("file", LIBRARIES)
def test_a_library_touches_no_keys_or_arguments_but_those_it_is_given(file: str) -> None:
    body = body_of((LUA / "lib" / file).read_text("utf-8"))
    assert re.search(r"\b(KEYS|ARGV)\b", body) is None


leaves_a_dead_letter = pytest.mark.leaves_keys("*:failed", "*:owners")


async def play_every_script(server: Server, redis: Redis) -> None:
    """Have an entry go through every transition there is."""
    buffer = Buffer(server, lambda: SETTINGS)
    keys = buffer.keyspace.of(ORG)
    await TripEvaluator(Scripts(server), buffer.keyspace, lambda: SETTINGS).evaluate(GateInputs(org_id=ORG, env_id=ENV))
    await hold(buffer, "acked", "failed", "requeued", "waiting", "reclaimed")
    assert isinstance(await buffer.accept("bound", ENV, ORG, b"", bindings=bound("task", "key")), Accepted)
    taken = {run_id: await take(buffer) for run_id in ("acked", "failed", "requeued", "waiting", "reclaimed", "bound")}
    assert await buffer.extend_many([taken["acked"]]) == ["held"]
    assert await buffer.ack(taken["acked"]) == "held"
    assert await buffer.fail(taken["failed"], "error") == "held"
    assert await buffer.requeue(taken["requeued"]) == "held"
    assert await buffer.requeue(taken["waiting"], not_before_ms=1) == "held"
    await expire_lease(redis, keys, "reclaimed")
    assert await buffer.reclaim_expired() == Reclaimed(returned=("reclaimed",))
    assert await buffer.patch(taken["bound"], b"patch", unbind=[taken["bound"].bindings[0]]) == "held"
    assert await buffer.ack(taken["bound"]) == "changed"
    patched = await buffer.get_entry(ORG, "bound")
    assert patched is not None
    assert await buffer.ack(patched) == "held"
    assert await buffer.claim(ORG, "digest", "token", 1000) == Claimed()
    await hold(buffer, "vanished", kind=EntryKind.HELD)
    await execute(redis, "DEL", keys.entry("vanished"))
    await buffer.release(ORG, ["digest"], "token")
    assert [(await take(buffer)).run_id for _ in range(3)] == ["requeued", "waiting", "reclaimed"]
    assert await buffer.pop(ORG, ENV) is None
    (revived,) = await buffer.revive_many(["failed"])
    assert isinstance(revived, Revival)
    assert revived.reply == "revived"
    assert await buffer.fail(await take(buffer), "error") == "held"
    assert len(await buffer.discard_many(["failed"])) == 1
    await hold(buffer, "lost", "gone")
    await execute(redis, "DEL", keys.entry("gone"), keys.envs(ORG))
    await execute(redis, "ZREM", keys.queue(ENV), "lost")
    assert await buffer.repair_many([Ready(ORG, ENV)]) == [("missing", "")]
    look = Look(keys, Ready(ORG, ENV), [("lost", ""), ("gone", ""), ("failed", ""), ("reclaimed", "")])
    (found,) = await buffer.restore_many([look], stalled_ms=1)
    assert isinstance(found, Restored)
    assert {run_id: verdict for run_id, verdict, _ in found.verdicts} == {"lost": "returned", "gone": "dropped"}
    assert await buffer.claim_sweep("token", 1000)
    assert await buffer.record_sweep("token", SweepReport(at_ms=1))
    await buffer.release_sweep("token")
    assert (await take(buffer)).run_id == "lost"


@leaves_a_dead_letter
async def test_scripts_touch_only_keys_they_declare(redis_client: Redis) -> None:
    await play_every_script(ShimmedServer(redis_client, TOUCHES_ONLY_DECLARED_KEYS), redis_client)


class SlotRecorder(Server):
    """Notes the slots of every script call's keys."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.slots: list[set[int]] = []

    async def run_many(self, commands: list[Command]) -> list[Reply]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for verb, _, count, *rest in (command for command in commands if command[0] == "EVALSHA"):
            assert verb == "EVALSHA"
            self.slots.append({key_slot(str(key).encode()) for key in rest[: int(count)]})
        return await super().run_many(commands)


@leaves_a_dead_letter
async def test_every_script_call_touches_one_slot(redis_client: Redis) -> None:
    recorder = SlotRecorder(redis_client)
    await play_every_script(recorder, redis_client)
    assert recorder.slots
    assert all(len(slots) == 1 for slots in recorder.slots)


@leaves_a_dead_letter
async def test_scripts_run_again_after_the_server_forgot_them(redis_client: Redis) -> None:
    await play_every_script(Server(redis_client), redis_client)
    await execute(redis_client, "FLUSHALL")
    await execute(redis_client, "SCRIPT", "FLUSH")
    await play_every_script(Server(redis_client), redis_client)


@leaves_a_dead_letter
async def test_scripts_run_again_after_the_server_was_restarted(redis_url: str, stack: Stack) -> None:
    async with connect(redis_url) as redis:
        await play_every_script(Server(redis), redis)
        await stack.restart_valkey()
        await play_every_script(Server(redis), redis)


async def test_a_call_that_the_server_refuses_harms_no_other_of_its_batch(redis_client: Redis) -> None:
    await execute(redis_client, "SET", "wrong", "type", "EX", 60)
    good = scripts.trip(rate="r", tripped="t", bucket_us=1000, buckets=2, threshold=5, hold_ms=10, number=1)
    bad = scripts.trip(rate="wrong", tripped="t", bucket_us=1000, buckets=2, threshold=5, hold_ms=10, number=1)
    first, second, third = await Scripts(Server(redis_client)).run_many([good, bad, good])
    assert isinstance(second, BufferUnavailableError)
    assert not isinstance(first, BufferUnavailableError)
    assert not isinstance(third, BufferUnavailableError)


async def test_a_server_that_is_not_there_is_an_error_of_its_own_kind() -> None:
    async with connect("unix:///nowhere/valkey.sock") as redis:
        buffer = Buffer(Server(redis), lambda: SETTINGS)
        with pytest.raises(BufferUnavailableError):
            await buffer.accept("run", ENV, ORG, b"payload")
