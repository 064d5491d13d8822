"""1. The refuge: triggers that the buffer may hold instead do not wait for an engine that is away.

An engine that hangs costs whoever asks it the whole of its own deadline, which is made for statements that are slow and worth waiting
for. A trigger that can be held has no need of that: it waits for `CREATE_DEADLINE_MS`, and while the circuit is open not at all.
What was asked and not answered may have been done, or may yet be; what was not asked is not. Where the buffer cannot take that either, the
engine is asked all the same, for as long as it takes.

Only that there was no answer counts against the engine: an error of one trigger's own is an answer. A look that had no answer counts, too; one that
had one says nothing of creations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mollifier.backoff import Backoff
from mollifier.circuit import Circuit
from mollifier.deadline import within
from mollifier.engine import Created, Existing, RunEngine
from mollifier.errors import EngineNotAskedError, EngineUnavailableError
from mollifier.model import RunProgress, Snapshot
from mollifier.telemetry import Telemetry

CREATE_DEADLINE_MS = 2_000
"""Far above what a healthy engine needs, and no longer than a caller waits who thinks nothing of it."""
SAFE_DEADLINE_MS = 5_000
"""How long creating what is held and could not be confirmed may take, however much it is: what is left then is created when it is asked for again."""
_PAUSES_MS = (200, 5_000)
_AWAY = "not asked: it has given no answers of late"
_FULL = 16
"""How many are under way at once before an engine that has come back is asked by everybody again."""


class Refuge:
    """Asks the engine for triggers that can be held. `monotonic` returns seconds, `jitter` a number in [0, 1)."""

    def __init__(
        self, engine: RunEngine, telemetry: Telemetry, *, monotonic: Callable[[], float], jitter: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._telemetry = telemetry
        self._circuit = Circuit(
            Backoff(*_PAUSES_MS),
            full=lambda: _FULL,
            monotonic=monotonic,
            jitter=jitter,
            on_change=lambda state: telemetry.breaker_changed("create", state),
        )

    async def create_runs(self, snapshots: Sequence[Snapshot]) -> Sequence[Created | Existing]:
        """Create the runs, as the engine does. Raises EngineUnavailableError without an answer in time, EngineNotAskedError."""
        if self._circuit.room() < 1:
            self._telemetry.sheltered(len(snapshots))
            raise EngineNotAskedError(_AWAY)
        asked = self._circuit.ask()
        try:
            outcomes = await within(CREATE_DEADLINE_MS, self._engine.create_runs(snapshots))
        except EngineUnavailableError:
            asked.failed()
            raise
        except TimeoutError as error:
            asked.failed()
            raise EngineUnavailableError(f"no run was created within {CREATE_DEADLINE_MS} ms") from error
        except Exception:
            asked.answered()
            raise
        else:
            asked.answered()
            return outcomes
        finally:
            # Cancelled, it has told nothing.
            asked.dropped()

    async def find_by_keys_many(self, snapshots: Sequence[Snapshot]) -> Sequence[Existing | None]:
        """Look up the runs that keys belong to, for as long as that takes, or raise EngineNotAskedError."""
        if self._circuit.wait_s():
            raise EngineNotAskedError(_AWAY)
        return await self._engine.find_by_keys_many(snapshots)

    async def get_progress(self, env_id: str, run_ids: Sequence[str]) -> Mapping[str, RunProgress]:
        """Return how far those of the runs are that the engine has. Raises EngineUnavailableError without an answer in time, EngineNotAskedError."""
        if self._circuit.wait_s():
            raise EngineNotAskedError(_AWAY)
        try:
            return await within(CREATE_DEADLINE_MS, self._engine.get_progress(env_id, run_ids))
        except EngineUnavailableError:
            self._circuit.failed(self._circuit.term, 0)
            raise
        except TimeoutError as error:
            self._circuit.failed(self._circuit.term, 0)
            raise EngineUnavailableError(f"no run was looked up within {CREATE_DEADLINE_MS} ms") from error
