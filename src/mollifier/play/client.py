"""The trigger calls of a play, and what each was answered."""

from __future__ import annotations

import resource
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from typing import NamedTuple, Self
from urllib.parse import quote

import msgspec

from mollifier.model import Tenant
from mollifier.play.wire import CALL_TIMEOUT_S, Origin, WireError

CONNECTIONS_MAX = 1000
_COMPLAINTS_KEPT = 5
_OK = 200
_CLIENT_ERRORS = range(400, 500)


class Call(NamedTuple):
    """One trigger to be sent: the `number`-th of the play, `at_s` seconds after its start, for the tenant of that place."""

    number: int
    at_s: float
    tenant: int
    body: bytes


class Marker:
    """Marks the calls of one play, so that its runs are found again, each with the call that asked for it."""

    def __init__(self, name: str) -> None:
        self._prefix = f"play-{name}-"

    def tag(self, number: int) -> str:
        """Return the tag that marks the call."""
        return f"{self._prefix}{number}"

    def body(self, number: int, payload: bytes) -> bytes:
        """Return the body of the call: the payload is JSON text."""
        return b'{"payload":%b,"options":{"tags":["%b"]}}' % (payload, self.tag(number).encode())

    def call_of(self, tags: Iterable[str]) -> int | None:
        """Return which call of this play made the run with these tags, None for a run of somebody else."""
        for tag in tags:
            if tag.startswith(self._prefix):
                return int(tag.removeprefix(self._prefix))
        return None


class Answers:
    """What the calls of one tenant were answered. `run_ids` has the accepted ones by call; a complaint is why a call was not accepted."""

    def __init__(self) -> None:
        self.offered = 0
        self.rejected = 0
        self.errors = 0
        self.run_ids: dict[int, str] = {}
        self.latencies_ms = array("d")
        self.complaints: Counter[str] = Counter()

    @property
    def accepted(self) -> int:
        """Calls that were answered with a run id."""
        return len(self.run_ids)

    @property
    def settled(self) -> int:
        """Calls that are no longer in flight."""
        return self.accepted + self.rejected + self.errors

    def complain(self, detail: str) -> None:
        """Note why a call was not accepted; a few different reasons are kept."""
        if detail in self.complaints or len(self.complaints) < _COMPLAINTS_KEPT:
            self.complaints[detail] += 1


class TriggerClient:
    """Sends calls to the API processes in turn, and notes the answers of each tenant in `answers`."""

    def __init__(
        self,
        api_urls: Sequence[str],
        tenants: Sequence[Tenant],
        task_id: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        path = f"/api/v1/tasks/{quote(task_id, safe='')}/trigger"
        self._origins = [Origin(url) for url in api_urls]
        self._heads = [[origin.head(path, _headers(tenant)) for tenant in tenants] for origin in self._origins]
        self._clock = clock
        self.answers = [Answers() for _ in tenants]

    async def send(self, call: Call) -> None:
        """Send one call and note its answer. Failures are noted too, never raised."""
        answers = self.answers[call.tenant]
        answers.offered += 1
        left_s = self._clock()
        replica = call.number % len(self._origins)
        try:
            status, body = await self._origins[replica].post(self._heads[replica][call.tenant], call.body)
        except (WireError, TimeoutError) as error:
            answers.errors += 1
            answers.complain(f"no answer: {error}" if str(error) else f"no answer within {CALL_TIMEOUT_S:g} s")
            return
        answers.latencies_ms.append((self._clock() - left_s) * 1000)
        if status == _OK and (run_id := _run_id(body)) is not None:
            answers.run_ids[call.number] = run_id
            return
        if status in _CLIENT_ERRORS:
            answers.rejected += 1
        else:
            answers.errors += 1
        answers.complain(f"{status}: {_reason(body)}")

    async def open(self, connections: int) -> None:
        """Open so many connections, to all API processes together, ahead of the calls. Raises WireError."""
        for origin in self._origins:
            await origin.open(ceil(min(connections, CONNECTIONS_MAX) / len(self._origins)))

    async def __aenter__(self) -> Self:
        _allow_many_connections()
        return self

    async def __aexit__(self, *_: object) -> None:
        for origin in self._origins:
            await origin.close()


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the nearest-rank percentile; 0 for no values."""
    ordered = sorted(values)
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0


def all_latencies_ms(answers: Iterable[Answers]) -> Iterator[float]:
    """Yield how long each answered call took."""
    for each in answers:
        yield from each.latencies_ms


def _headers(tenant: Tenant) -> dict[str, str]:
    return {"Authorization": f"Bearer {tenant.api_key}", "Content-Type": "application/json"}


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _TriggerAnswer(msgspec.Struct):
    id: str


class _Problem(msgspec.Struct):
    error: str = ""
    detail: str = ""


_answer = msgspec.json.Decoder(_TriggerAnswer)
_problem = msgspec.json.Decoder(_Problem)


def _run_id(body: bytes) -> str | None:
    try:
        return _answer.decode(body).id
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _reason(body: bytes) -> str:
    try:
        problem = _problem.decode(body)
        return problem.error or problem.detail or "no reason given"
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode(errors="replace") or "empty answer"
