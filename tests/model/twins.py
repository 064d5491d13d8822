"""The real buffer and the model side by side: every operation runs on both, answers the same, and leaves the same behind."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from redis import Redis

from mollifier.buffer import Buffer
from mollifier.errors import MollifierError
from mollifier.keys import Keyspace
from mollifier.model import GateInputs, Verdict
from mollifier.scripts import Call, Scripts
from mollifier.server import Command, Reply, Server
from mollifier.settings import Settings
from mollifier.trip import TripEvaluator
from tests.model.server import ModelServer
from tests.model.virtual import UNUSED, Edit, VirtualServer, unedited

T = TypeVar("T")
START_US = 1_800_000_000_000_000
SETTINGS = Settings(
    enabled=True,
    redis_url="unix:///unused",
    partitions=2,
    lease_ms=100,
    ack_grace_ttl_s=1,
    entry_ttl_s=1,
    drain_max_reclaims=2,
    trip_window_ms=40,
    trip_threshold=4,
    hold_ms=50,
    held_env_max_entries=6,
    held_env_max_bytes=120,
    held_org_max_entries=7,
    held_org_max_bytes=150,
    held_max_entries=8,
    held_max_bytes=190,
)

KeyState = tuple[str, int | None, Any]
"""A key's type, the last millisecond of its life (None: for ever) and its value."""


class Side:
    """One implementation, with everything that stands on it."""

    def __init__(self, server: Server, settings: Settings, now_us: Callable[[], int]) -> None:
        # Sums are read again after each second, all at once: reading ahead takes an event loop, and the twins have none.
        self.buffer = Buffer(server, lambda: settings, monotonic=lambda: now_us() // 1_000_000)
        self.scripts = Scripts(server)
        self.evaluator = TripEvaluator(self.scripts, self.buffer.keyspace, lambda: settings)


class OnModel(Server):
    """The model's side of the twins: every command is answered at once."""

    def __init__(self, model: ModelServer) -> None:
        super().__init__(UNUSED)
        self._model = model

    async def run_many(self, commands: Sequence[Command]) -> list[Reply]:
        return [self._model.execute(command) for command in commands]


class Twins:
    """Both sides, and the one clock that they live by."""

    def __init__(self, client: Redis, edit: Edit = unedited) -> None:
        self._server = VirtualServer(client, edit)
        self.steps = 0
        self.first_difference: int | None = None
        self.begin()

    def begin(self) -> None:
        """Begin anew: nothing held, no script known."""
        self.now_us = START_US
        self._server.prepare(self.now_us)
        self.model = ModelServer(self.now_us)
        # A buffer remembers what its last pops told, and how much is held.
        self._real, self._modelled = (
            Side(server, SETTINGS, lambda: self.now_us) for server in (self._server, OnModel(self.model))
        )

    @property
    def keyspace(self) -> Keyspace:
        return self._real.buffer.keyspace

    # --- doing -----------------------------------------------------------------------------------------------------

    def both(self, operation: Callable[[Buffer], Coroutine[Any, Any, T]]) -> T:
        """Run the operation on both sides; return the answer of both, once both hold the same after it."""
        return self._both(lambda side: operation(side.buffer))

    def call(self, call: Call[T]) -> T:
        """Run one script on both sides."""
        return self._both(lambda side: side.scripts.run(call))

    def evaluate(self, inputs: Sequence[GateInputs]) -> Sequence[Verdict]:
        return self._both(lambda side: side.evaluator.evaluate_many(inputs))

    def turn(self, now_us: int) -> None:
        """Let it be this moment, if it has not been before."""
        self.now_us = max(self.now_us, now_us)
        self._server.turn(self.now_us)
        self.model.store.now_us = self.now_us
        self.model.store.expire()
        self.compare()

    def drop(self, key: str) -> None:
        """Have a key vanish on both sides, as by eviction."""
        self._server.drop(key)
        self.model.store.delete(key)

    def forget(self, key: str, member: str) -> None:
        """Have a member of a sorted set vanish on both sides, as by a defect."""
        self._server.forget(key, member)
        self.model.store.remove(key, member)

    def overwrite(self, key: str, field: str, value: bytes | None) -> None:
        """Spoil a field of an entry on both sides; None takes it out."""
        fields = self.model.store.hashes[key]
        if value is None:
            self._server.execute("HDEL", key, field)
            fields.pop(field, None)
        else:
            self._server.execute("HSET", key, field, value)
            fields[field] = value

    def _both(self, operation: Callable[[Side], Coroutine[Any, Any, T]]) -> T:
        real, modelled = _outcome(operation(self._real)), _outcome(operation(self._modelled))
        self.steps += 1
        if comparable(real) != comparable(modelled):
            self._differ(f"the server and the model answer differently:\n  server: {real}\n  model:  {modelled}")
        self.compare()
        if isinstance(real, MollifierError):
            raise real
        return real

    # --- comparing -------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Fail where the two sides do not hold the same."""
        real, modelled = self._state(), self._model_state()
        if real != modelled:
            differing = sorted(key for key in real.keys() | modelled.keys() if real.get(key) != modelled.get(key))
            lines = [f"{key}\n  server: {real.get(key)}\n  model:  {modelled.get(key)}" for key in differing]
            self._differ("the server and the model hold different things:\n" + "\n".join(lines))

    def _differ(self, how: str) -> NoReturn:
        self.first_difference = self.first_difference or self.steps
        raise AssertionError(how)

    def _state(self) -> Mapping[str, KeyState]:
        state: dict[str, KeyState] = {}
        for name, kind, end_ms, raw in self._server.dump():
            value = raw
            if kind == b"hash":
                value = {raw[i].decode(): raw[i + 1] for i in range(0, len(raw), 2)}
            elif kind == b"zset":
                value = {raw[i].decode(): float(raw[i + 1]) for i in range(0, len(raw), 2)}
            state[name.decode()] = (kind.decode(), None if end_ms is None else int(end_ms), value)
        return _compared(state)

    def _model_state(self) -> Mapping[str, KeyState]:
        store = self.model.store
        kinds: Mapping[str, Mapping[str, Any]] = {"string": store.strings, "hash": store.hashes, "zset": store.sets}
        return _compared(
            {
                key: (kind, store.ends_ms.get(key), value)
                for kind, values in kinds.items()
                for key, value in values.items()
            }
        )


def comparable(value: Any) -> Any:
    """Return what can be compared: errors by type and text."""
    match value:
        case BaseException():
            return type(value), str(value)
        case list() | tuple():
            return [comparable(item) for item in value]  # pyright: ignore[reportUnknownVariableType] - of whatever type
        case _ if hasattr(value, "__struct_fields__"):
            return type(value), [comparable(getattr(value, name)) for name in value.__struct_fields__]
        case _:
            return value


def _compared(state: Mapping[str, KeyState]) -> Mapping[str, KeyState]:
    # The evaluator's and the limiter's counts are compared by their verdicts; how they cut their buckets is their own business.
    return {key: held for key, held in state.items() if ":rate:" not in key and ":requests:" not in key}


def _outcome(operation: Coroutine[Any, Any, T]) -> T | MollifierError:
    """Return what comes of an operation that never has to wait."""
    try:
        operation.send(None)
    except StopIteration as done:
        return done.value
    except MollifierError as error:
        return error
    operation.close()
    raise AssertionError("an operation on the twins waits for something")
