"""The specification, sentence by sentence: what has to hold after every step of every history, and once everything is at rest.

Each class is one sentence of docs/reliability.md or of the contract, quoted in its docstring, and says in code what would contradict it.
`after_step` looks at one change of the world, `after_answer` at what one caller was told, `at_rest` at the end, when all faults are over
and everything that was held has had time to be drained. Each yields what is wrong, in words. `steps` names the changes that the sentence
is about; without it, it is about all of them.

While a step is looked at, `facts` are those from before it, and the stores are as it left them.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import timedelta
from typing import Any, ClassVar

import msgspec

from mollifier import held
from mollifier.buffer import Ready
from mollifier.engine import Created
from mollifier.errors import BufferUnavailableError, InvalidRequestError, MollifierError, OverCapError
from mollifier.flags import ORG_FLAG
from mollifier.keys import is_request_digest
from mollifier.model import Action, Decision, GateInputs, Run, RunError, RunStatus, Snapshot, TriggerRequest
from mollifier.settings import Settings
from tests.model.records import Records
from tests.simulation.engine import FLAKY, POISON, STUBBORN
from tests.simulation.facts import Facts, count_of
from tests.simulation.history import Call, Step
from tests.simulation.server import START_US

Complaints = Iterator[str]

SKEW = timedelta(milliseconds=50)
"""Clocks of two processes never differ by more."""


class Sentence:
    """One sentence of the specification."""

    steps: ClassVar[Sequence[str]] = ()

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def after_step(self, step: Step) -> Complaints:
        """Yield what the step has made wrong."""
        yield from ()

    def after_answer(self, call: Call) -> Complaints:
        """Yield what is wrong with what the caller was told."""
        yield from ()

    def at_rest(self) -> Complaints:
        """Yield what is wrong in the end."""
        yield from ()


# --- nothing lost, nothing twice -----------------------------------------------------------------------------------


class EveryAcceptedTriggerIsSomewhere(Sentence):
    """Every trigger that was answered with a run id is one run: never none.

    Whatever either store has once taken is from then on, at every moment, a run in the engine, an entry in the buffer, or a dead letter.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._taken: dict[str, str] = {}

    def after_step(self, step: Step) -> Complaints:
        facts = self.facts
        if step.what == "accept" and step.reply[0] == b"accepted" and step.args["kind"] == "held":
            self._taken[step.runs[0]] = step.args["entry"]
        rows, hashes = facts.rows, facts.store.hashes
        for run_id, entry in self._taken.items():
            if run_id not in rows and entry not in hashes:
                yield f"{run_id} is neither in the engine nor in the buffer"

    def after_answer(self, call: Call) -> Complaints:
        for result in call.results:
            if result.run_id not in self.facts.rows and result.run_id not in self._taken:
                yield f"{result.run_id} was answered, and neither store has ever had it"


class EveryAcceptedTriggerBecomesARun(Sentence):
    """What cannot become a run becomes a run in `SYSTEM_FAILURE` with the error; what cannot even become that stays as a dead letter.

    Nothing else is left behind: lost = accepted without a run = 0.
    """

    def at_rest(self) -> Complaints:
        for run_id in self.facts.answered:
            if run_id in self.facts.rows:
                continue
            fields = self.facts.fields(run_id) or {}
            if fields.get("state") != b"FAILED":
                yield f"{run_id} was accepted and is no run"
            elif not fields.get("error") or "payload" not in fields:
                yield f"{run_id} is a dead letter without its reason or its payload"


class OneKeyIsOneRun(Sentence):
    """Tried again with the same key it is the same run; one key, any number of concurrent triggers, any mix of held and created: one run.

    A held run whose key another run took, while nobody could know, is created CANCELED and names the winner.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._first: dict[tuple[str, str, str], str] = {}

    def after_answer(self, call: Call) -> Complaints:
        if self.facts.plan.changes:
            # Who does not divert any more does not ask what others still hold.
            return
        for request, result in zip(call.requests, call.results, strict=False):
            theirs = self.facts.requests[result.run_id]
            bound = _names(call.environment.id, theirs.idempotency_key, theirs.request_key)
            for key in _names(call.environment.id, request.idempotency_key, request.request_key):
                if key not in bound or _may_be_freed(self.facts, key):
                    continue
                first = self._first.setdefault(key, result.run_id)
                if first in self.facts.rows and _winner(self.facts.rows[first]) is not None:
                    # It gave way for its other key, and holds none of them.
                    first = self._first[key] = result.run_id
                calls = (call, self.facts.calls[first], self.facts.calls[result.run_id])
                if first != result.run_id and not any(one.met_faults for one in calls):
                    yield f"{key} answered with {first}, and now with {result.run_id}"

    def at_rest(self) -> Complaints:
        standing: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
        for run_id, row in self.facts.rows.items():
            winner = _winner(row)
            if winner is not None:
                yield from self._beaten(run_id, row, winner)
                continue
            for key in _names(row["environment_id"], row["idempotency_key"], row["request_key"]):
                standing[key].append(run_id)
        for key, runs in standing.items():
            if len(runs) > 1 and not _may_be_freed(self.facts, key):
                yield f"{key} has made {' and '.join(runs)}"

    def _beaten(self, run_id: str, row: Mapping[str, Any], winner: str) -> Complaints:
        if not self.facts.plan.changes and not any(self.facts.calls[one].met_faults for one in (run_id, winner)):
            yield f"{run_id} gave way to {winner}, though both stores were there all the time"
        other = self.facts.rows.get(winner)
        if other is None:
            yield f"{run_id} names {winner} as the winner, which is no run"
            return
        keys = ("idempotency_key", "request_key")
        if not any(row[key] is not None and row[key] == other[key] for key in keys):
            yield f"{run_id} gave way to {winner}, which has none of its keys"


class ALoserIsTold(Sentence):
    """A trigger whose key is already bound returns the existing run with `isCached: true`."""

    def after_answer(self, call: Call) -> Complaints:
        for place, (request, result) in enumerate(zip(call.requests, call.results, strict=False)):
            own = call.made[place : place + 1]
            theirs = self.facts.requests[result.run_id]
            by_request = request.request_key is not None and request.request_key == theirs.request_key
            by_key = request.idempotency_key is not None and request.idempotency_key == theirs.idempotency_key
            by_debounce = request.debounce is not None and theirs.debounce is not None
            if result.run_id in own:
                if result.is_cached:
                    yield f"{result.run_id} is new and was called cached"
            elif not (by_request or by_key or by_debounce):
                yield f"{result.run_id} answered a trigger that has none of its keys"
            elif result.is_cached and not by_key:
                yield f"{result.run_id} was called cached to a trigger without its idempotency key"
            elif not result.is_cached and not (by_request or by_debounce):
                yield f"{result.run_id} answered by its idempotency key and was not called cached"


class OnlyWhatWasTriggeredIsARun(Sentence):
    """Every run is the run of one trigger, created with what the trigger had, at the trigger's moment.

    No field is dropped between the snapshot and the created run; `createdAt` is the trigger's moment in both stores.
    """

    steps = ("create_runs", "create_held_runs")
    _CHANGING: ClassVar[set[str]] = {"tags", "metadata", "delayed_until", "idempotency_expires_at"}

    def after_step(self, step: Step) -> Complaints:
        if isinstance(step.reply, Exception):
            return
        for creation, outcome in zip(step.args["creations"], step.reply, strict=True):
            if not isinstance(outcome, Created):
                continue
            if outcome.run_id not in self.facts.requests:
                yield f"{outcome.run_id} was never triggered"
            taken = self.facts.snapshots.get(outcome.run_id, creation.snapshot)
            for name in Snapshot.__struct_fields__:
                ours, theirs = getattr(creation.snapshot, name), getattr(taken, name)
                if ours != theirs and name not in self._CHANGING:
                    yield f"{outcome.run_id} was accepted with {name} {theirs!r} and created with {ours!r}"


class ARunThatHasExpiredIsCreatedExpired(Sentence):
    """A held run whose `ttl` passes is created `EXPIRED`; it never starts."""

    steps = ("create_held_runs", "create_runs", "start")

    def after_step(self, step: Step) -> Complaints:
        if step.what == "start":
            row: Any = self.facts.rows[step.runs[0]]
            snapshot = self.facts.snapshots.get(step.runs[0])
            if snapshot is not None and row["due_at"] is None and self._is_over(row, step):
                yield f"{step.runs[0]} has started after it had expired"
        elif not isinstance(step.reply, Exception):
            for outcome in step.reply:
                row = self.facts.rows[outcome.run_id]
                is_over = isinstance(outcome, Created) and self._is_over(row, step)
                if is_over and row["status"] in (RunStatus.QUEUED.value, RunStatus.DELAYED.value):
                    yield f"{outcome.run_id} had expired and was created {row['status']}"

    def _is_over(self, row: Any, step: Step) -> bool:
        start = row["delayed_until"] or row["created_at"]
        if row["ttl_s"] is None:
            return False
        now_us = step.at_us - SKEW // timedelta(microseconds=1)
        # Created within the transaction's own time, which began by the clock of the process that asked.
        engine_us = self.facts.plan.engine_deadline_ms * 1000
        return (start + timedelta(seconds=row["ttl_s"])).timestamp() * 1_000_000 <= now_us - engine_us


# --- settling ------------------------------------------------------------------------------------------------------


class AnAcknowledgedRunExists(Sentence):
    """`ack(run_id)`: the run exists now, with every change that was made to it while it was held."""

    steps = ("ack",)

    def after_step(self, step: Step) -> Complaints:
        for (run_id, _, patches, _), verdict in zip(_fours(step.args["runs"]), step.reply, strict=True):
            if verdict != b"held" or self.facts.entries[run_id].kind != "held":
                continue
            row = self.facts.rows.get(run_id)
            if row is None:
                yield f"{run_id} was acknowledged and is no run"
            elif row["patch_count"] < int(patches):
                yield f"{run_id} was acknowledged with {patches} changes, of which its run has {row['patch_count']}"


class OnlyItsHolderSettlesAnEntry(Sentence):
    """A stale holder's ack, requeue or fail is refused by a fencing token and harms nothing."""

    steps = ("ack", "requeue", "fail", "extend")

    def after_step(self, step: Step) -> Complaints:
        if step.what == "ack":
            leases = [(run_id, int(lease)) for run_id, lease, *_ in _fours(step.args["runs"])]
            verdicts: Sequence[Any] = step.reply
        else:
            leases, verdicts = [(step.runs[0], step.args["lease"])], [step.reply]
        for (run_id, lease), verdict in zip(leases, verdicts, strict=True):
            known = self.facts.entries[run_id]
            if verdict == b"held" and (known.holder, known.lease) != (step.by, int(lease)):
                holder = f"{known.holder} held by lease {known.lease}" if known.holder else "nobody held"
                yield f"{step.by} settled by lease {lease} what {holder}: {run_id}"


class OnlyWhatRanOutIsReclaimed(Sentence):
    """Any worker reclaims expired leases, apart from attempts; so many times, then the entry is a dead letter."""

    steps = ("reclaim",)

    def after_step(self, step: Step) -> Complaints:
        if step.reply not in (b"held", b"failed"):
            return
        known = self.facts.entries[step.runs[0]]
        if known.lease_ends_ms > step.at_ms:
            yield f"{step.runs[0]} was reclaimed {known.lease_ends_ms - step.at_ms} ms before its lease ran out"
        reclaims = int((self.facts.fields(step.runs[0]) or {}).get("reclaims", b"0"))
        if (step.reply == b"failed") != (reclaims > step.args["max_reclaims"]):
            yield f"{step.runs[0]} came back {reclaims} times and is {step.reply.decode()}"


class WhatADeadDrainerHeldIsPutBackInTime(Sentence):
    """An entry whose drainer died is put back at most `2 x lease` after the crash, while any drainer lives and the buffer's server is reachable.

    However many there are: what is more than one portion does not wait for another look.
    """

    def after_step(self, step: Step) -> Complaints:
        yield from self._late((step.at_us - START_US) / 1_000_000)

    def at_rest(self) -> Complaints:
        yield from self._late((self.facts.buffer.now_us - START_US) / 1_000_000)

    def _late(self, now_s: float) -> Complaints:
        reachable_s = self.facts.buffer.link.reachable_since_s
        drains_s = [one.drains_since_s for one in self.facts.processes if one.drains_since_s is not None]
        if reachable_s is None or not drains_s:
            return
        lease_s = self.facts.plan.settings.lease_ms / 1000
        for run_id, died_s in self.facts.stranded():
            # Whoever has been there longest is enough; time during which nobody could look does not count.
            since_s = max(died_s, reachable_s, min(drains_s))
            if now_s > since_s + 2 * lease_s:
                yield f"{run_id} is still leased {now_s - since_s:.3f} s after its drainer died, at a lease of {lease_s} s"


class AnEntryIsWhereItsStateSays(Sentence):
    """An entry is `QUEUED`, in its queue or waiting outside of it; `DRAINING`, under a lease; `MATERIALISED`; or a dead letter, `FAILED`.

    No operation ever writes a partial entry.
    """

    steps = ("accept", "pop", "ack", "requeue", "reclaim", "fail", "patch", "extend", "revive")
    _FIELDS: ClassVar[tuple[str, ...]] = ("state", "kind", "env", "org", "seq", "accepted_ms", "payload")

    def after_step(self, step: Step) -> Complaints:
        for run_id in step.runs:
            known, fields = self.facts.entries.get(run_id), self.facts.fields(run_id)
            if known is None or fields is None:
                continue
            missing = [name for name in self._FIELDS if name not in fields]
            if missing:
                yield f"{run_id} lacks {', '.join(missing)}"
                continue
            keys, members = self.facts.keys(known.org_id), self.facts.members
            waiting = f"{fields['seq'].decode()}:{run_id}"
            places = {
                "queued": run_id in members(keys.queue(known.env_id)),
                "waiting": waiting in members(keys.waiting(known.env_id)),
                "leased": run_id in members(keys.draining),
                "dead": run_id in members(keys.failed),
            }
            found = {place for place, is_there in places.items() if is_there}
            state = fields["state"].decode()
            expected = {"DRAINING": [{"leased"}], "MATERIALISED": [set[str]()], "FAILED": [{"dead"}]}
            if found not in expected.get(state, [{"queued"}, {"waiting"}]):
                yield f"{run_id} is {state} and {' and '.join(sorted(found)) or 'nowhere'}"


class AnEntryComesOutAsItWentIn(Sentence):
    """Payload bytes come back exactly as they went in; an entry keeps its place, which is by accept sequence, under any retry."""

    steps = ("pop",)

    def after_step(self, step: Step) -> Complaints:
        for run_id, *flat in step.reply[1]:
            run = run_id.decode()
            known, fields = self.facts.entries[run], dict(zip(flat[::2], flat[1::2], strict=True))
            if int(fields[b"seq"]) != known.sequence:
                yield f"{run} was accepted as number {known.sequence} and popped as number {fields[b'seq'].decode()}"
            if fields[b"payload"] != known.payload and run not in self.facts.spoilt:
                yield f"{run} came out with another payload than it went in with"


# --- order ---------------------------------------------------------------------------------------------------------


class FirstInFirstOut(Sentence):
    """What is held is first in, first out per environment, except for entries that wait for a retry; those block nobody."""

    steps = ("pop",)

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._last: dict[str, int] = {}

    def after_step(self, step: Step) -> Complaints:
        taken = [run_id.decode() for run_id, *_ in step.reply[1]]
        if not taken:
            return
        sequences = [self.facts.entries[run_id].sequence for run_id in taken]
        if sequences != sorted(sequences):
            yield f"{', '.join(taken)} came out of order"
        left = self.facts.members(step.args["queue"]).values()
        if left and min(left) < sequences[-1]:
            yield f"{taken[-1]} was taken before an older one of its environment"
        env_id = step.args["env_id"]
        for run_id, sequence in zip(taken, sequences, strict=True):
            if self.facts.entries[run_id].was_popped:
                continue
            if sequence < self._last.get(env_id, 0):
                yield f"{run_id}, never tried before, came after a younger one"
            self._last[env_id] = sequence


class NothingIsHandedOverBeforeItsTime(Sentence):
    """With a not-before time an entry waits outside the queue and blocks nobody."""

    steps = ("pop",)

    def after_step(self, step: Step) -> Complaints:
        for run_id, *_ in step.reply[1]:
            known = self.facts.entries[run_id.decode()]
            if known.not_before_ms > step.at_ms:
                yield f"{run_id.decode()} was to wait {known.not_before_ms - step.at_ms} ms longer"


class TheReadyIndexNamesWhatIsDue(Sentence):
    """The ready index is ordered by earliest due time: every environment with something queued or waiting is in it, in time."""

    steps = ("accept", "pop", "peek", "requeue", "reclaim", "ack", "fail", "revive")

    def after_step(self, step: Step) -> Complaints:
        for environment in self.facts.plan.tenants:
            org_id, env_id = environment.org_id, environment.id
            keys, members = self.facts.keys(org_id), self.facts.members
            waiting = members(keys.waiting(env_id))
            is_queued = bool(members(keys.queue(env_id)))
            if not is_queued and not waiting:
                if step.what == "pop" and step.args["env_id"] == env_id and env_id in members(keys.envs(org_id)):
                    yield f"{env_id} is in the ready index with nothing queued"
                continue
            due_ms = step.at_ms if is_queued else min(waiting.values())
            for what, index, member in ((env_id, keys.envs(org_id), env_id), (org_id, keys.orgs, org_id)):
                at_ms = members(index).get(member)
                if at_ms is None:
                    yield f"{what} has something {'queued' if is_queued else 'waiting'} and is not in the ready index"
                elif at_ms > due_ms:
                    yield f"{what} has something due {at_ms - due_ms:.0f} ms before the ready index says so"


class OrganizationsTakeTurns(Sentence):
    """Organizations rotate, and within an organization its environments rotate: one environment per organization per tick.

    The start of the rotation moves on each tick, so every participant reaches every position: one that is ready waits at most for one
    turn of each other.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._passed_over: Counter[tuple[str, str]] = Counter()

    def planned(
        self, process: str, ready: Mapping[str, Sequence[str]], capacity: int, shares: Sequence[tuple[Ready, int]]
    ) -> Complaints:
        """Yield what is wrong with one tick's plan."""
        served = [ready.org_id for ready, _ in shares]
        if len(set(served)) != len(served):
            yield f"{process} serves an organization twice in one tick: {served}"
        if sum(share for _, share in shares) > max(capacity, 0):
            yield f"{process} takes more than the {capacity} that it has room for"
        organizations = {environment.org_id for environment in self.facts.plan.tenants}
        most_envs = len(self.facts.plan.tenants)
        for org_id in organizations:
            for env_id in ready.get(org_id, ()):
                self._passed_over[process, env_id] += 1
                if self._passed_over[process, env_id] > len(organizations) * most_envs:
                    yield f"{process} has passed {env_id} over {self._passed_over[process, env_id]} times in a row"
        for one, _ in shares:
            self._passed_over[process, one.env_id] = 0
        for key in [key for key in self._passed_over if key[0] == process and not _is_ready(key[1], ready)]:
            del self._passed_over[key]


class ADrainerIsBounded(Sentence):
    """At most `concurrency` entries are popped and unsettled at any moment."""

    steps = ("pop",)

    def in_flight(self, process: str, number: int, settings: Settings, step: Step) -> Complaints:
        """Yield what is wrong with so many entries in the hands of a drainer that pops more."""
        if number + step.args["take"] > settings.drain_concurrency:
            yield f"{process} has {number} entries at hand and asks for {step.args['take']} more"


class ADrainerStopsInTime(Sentence):
    """`stop(timeout)` lets in-flight handlers finish up to a deadline, then returns, even when a handler hangs."""

    def ended(self, process: str, *, is_done: bool) -> Complaints:
        """Yield what is wrong when the deadline, and a little more, have passed."""
        if not is_done:
            yield f"{process} has not stopped within its deadline"


# --- failing -------------------------------------------------------------------------------------------------------


class OnlyFailuresAreAttempts(Sentence):
    """Attempts grow by a handler's failures alone; an engine that cannot be reached is no attempt of the entry's."""

    steps = ("requeue", "fail")

    def after_step(self, step: Step) -> Complaints:
        run_id = step.runs[0]
        if step.reply != b"held" or run_id in self.facts.spoilt or self.facts.came_back_too_often(run_id):
            return
        attempts = int((self.facts.fields(run_id) or {}).get("attempts", b"0"))
        failures = self.facts.history.failures[run_id]
        if attempts > failures:
            yield f"{run_id} has {attempts} attempts of {failures} failures"


class NothingIsGivenUpEarly(Sentence):
    """A retryable error requeues until `max_attempts`, then the terminal path; a non-retryable one goes there at once.

    So does an entry that has come back too often from holders that died.
    """

    steps = ("fail", "create_held_runs")

    def after_step(self, step: Step) -> Complaints:
        if step.what == "fail":
            given_up = [step.runs[0]] if step.reply == b"held" else []
        elif isinstance(step.reply, Exception):
            return
        else:
            given_up = [
                outcome.run_id
                for outcome, ended in zip(step.reply, step.args["ended"], strict=True)
                if isinstance(outcome, Created) and ended == "SYSTEM_FAILURE"
            ]
        for run_id in given_up:
            request = self.facts.requests[run_id]
            is_hopeless = run_id in self.facts.spoilt or request.payload == POISON
            is_hopeless |= self.facts.came_back_too_often(run_id)
            failures = self.facts.history.failures[run_id]
            if not is_hopeless and failures < self.facts.plan.settings.drain_max_attempts:
                yield f"{run_id} was given up after {failures} failures"


class NothingDiesOfAFault(Sentence):
    """The loop backs off under repeated errors and never dies of one; every fault is one that servers and rows have, none of its own."""

    def faulted(self, process: str, operation: str, error: BaseException) -> Complaints:
        """Yield what is wrong with a fault that a drainer survived."""
        is_row = operation in ("handle", "give up")
        expected = (MollifierError, RuntimeError) if is_row else (MollifierError, TimeoutError)
        if not isinstance(error, expected) or (isinstance(error, RuntimeError) and "row" not in str(error)):
            yield f"{process} survived, at {operation}: {error!r}"


# --- keys ----------------------------------------------------------------------------------------------------------


class OneClaimantAtATime(Sentence):
    """A claim carries its owner's token: only its owner turns it into a binding or gives it back.

    A late release harms nobody: the token is not the next owner's.
    """

    steps = ("claim", "release", "accept")

    def after_step(self, step: Step) -> Complaints:
        token, binding, strings = step.args["token"], step.args["binding"], self.facts.store.strings
        if step.what == "claim":
            for key, (outcome, _) in zip(binding, step.reply, strict=False):
                owner = self._owner(key, step)
                if outcome == b"claimed" and owner not in ("", token):
                    yield f"{token} claimed {_tail(key)} while it was {owner}'s"
        elif step.what == "release":
            for key in binding:
                owner = self._owner(key, step)
                if owner not in ("", token) and key not in strings:
                    yield f"{token} gave {_tail(key)} back, which was {owner}'s"
        elif step.reply[0] == b"accepted":
            for key in binding:
                owner = self._owner(key, step)
                if owner != token:
                    yield f"{token or 'nobody'} bound {_tail(key)}, which was {owner or 'nobody'}'s"

    def _owner(self, key: str, step: Step) -> str:
        token, ends_ms = self.facts.claims.get(key, ("", 0))
        return token if ends_ms > step.at_ms else ""


class ABindingIsWorthItsRun(Sentence):
    """A key that is bound belongs to a run that is held: settling the entry frees it, in the same step.

    The request key of a dead letter is not freed, and goes on answering with its run.
    """

    steps = ("accept", "ack", "fail", "reclaim", "patch", "release", "claim")

    def after_step(self, step: Step) -> Complaints:
        for key, holder in self.facts.store.strings.items():
            if ":idempotency:" not in key or not holder.startswith(b"run:"):
                continue
            run_id = holder[4:].decode()
            fields = self.facts.fields(run_id) or {}
            is_letters = fields.get("state") == b"FAILED" and is_request_digest(_tail(key))
            if fields.get("state") not in (b"QUEUED", b"DRAINING") and not is_letters:
                yield f"{_tail(key)} is bound to {run_id}, which is {fields.get('state', b'nowhere').decode()}"
            elif _tail(key) not in fields.get("bindings", b"").decode().split(","):
                yield f"{_tail(key)} is bound to {run_id}, which does not name it"


# --- the books of the buffer ---------------------------------------------------------------------------------------


class TheSumsAreThoseOfTheRecords(Sentence):
    """Every held entry has a record of whose it is and what it takes, and the sums of the records are kept beside them."""

    steps = ("accept", "ack", "fail", "requeue", "pop", "patch", "reclaim", "revive")

    def after_step(self, step: Step) -> Complaints:
        if step.args.get("org_id") == "":
            # What vanished before anybody could tell whose it was.
            return
        keys = self.facts.keys(_org_of(step, self.facts))
        hashes = self.facts.store.hashes
        records = Records(self.facts.store, keys.owners, keys.usage)
        total: Counter[str] = Counter()
        for run_id in hashes.get(keys.owners, {}):
            size, env, org = records.of(run_id) or (None, b"", b"")
            if size is not None:
                for scope in ("", f":org:{org.decode()}", f":env:{env.decode()}"):
                    total.update({f"entries{scope}": 1, f"bytes{scope}": size})
        kept = {name: int(number) for name, number in hashes.get(keys.usage, {}).items()}
        if kept != total:
            yield f"the sums are {kept} and the records make {dict(total)}"
        for run_id in step.runs:
            yield from self._recorded(run_id, records)

    def _recorded(self, run_id: str, records: Records) -> Complaints:
        known, fields = self.facts.entries.get(run_id), self.facts.fields(run_id)
        if known is None or fields is None or known.kind != "held" or run_id in self.facts.spoilt:
            return
        record = records.of(run_id)
        if fields["state"] in (b"QUEUED", b"DRAINING"):
            size = len(fields["payload"]) + sum(len(value) for name, value in fields.items() if name[:6] == "patch:")
            if record is None or record[0] != size:
                yield f"{run_id} takes {size} bytes, and its record says {record and record[0]}"
        elif fields["state"] == b"MATERIALISED" and record is not None:
            yield f"{run_id} has been settled and still has a record"


class HeldRunsHaveTheirPlaceInLists(Sentence):
    """Lists order by (createdAt, id) in both stores: a held run stands in its environment's index from its accept to its end."""

    steps = ("accept", "ack", "fail", "requeue", "pop", "patch", "reclaim", "revive")

    def after_step(self, step: Step) -> Complaints:
        for run_id in step.runs:
            known, fields = self.facts.entries.get(run_id), self.facts.fields(run_id)
            if known is None or fields is None:
                continue
            place = self.facts.members(self.facts.keys(known.org_id).held(known.env_id)).get(run_id)
            if known.kind != "held":
                if place is not None:
                    yield f"{run_id} is an audit copy and stands in lists"
            elif fields["state"] in (b"QUEUED", b"DRAINING"):
                if place != known.created_us:
                    yield f"{run_id} is held and stands in lists at {place}, not at {known.created_us}"
            elif fields["state"] == b"MATERIALISED" and place is not None:
                yield f"{run_id} has been settled and still stands in lists as held"


class NoCapIsExceeded(Sentence):
    """Caps on held entries and bytes per environment and per organization are exact; a rejected trigger has left nothing anywhere."""

    steps = ("accept",)

    def after_step(self, step: Step) -> Complaints:
        if step.reply[0] != b"accepted" or step.args["kind"] != "held":
            return
        keys, settings = self.facts.keys(step.args["org_id"]), self.facts.plan.settings
        sums = self.facts.store.hashes.get(keys.usage, {})
        caps = {
            f"entries:env:{step.args['env_id']}": settings.held_env_max_entries,
            f"entries:org:{step.args['org_id']}": settings.held_org_max_entries,
        }
        for name, most in caps.items():
            if int(sums.get(name, b"0")) > most:
                yield f"{name} are {sums[name].decode()}, at most {most} may be held"

    def after_answer(self, call: Call) -> Complaints:
        if not isinstance(call.answer, OverCapError):
            return
        if self.facts.plan.settings.held_over_cap != "reject":
            yield "a trigger was rejected for a cap, where such are created"
        for run_id in call.made:
            if run_id in self.facts.rows or run_id in self.facts.entries:
                yield f"{run_id} was rejected, and is there"


class NothingIsRepairedThatIsWhole(Sentence):
    """Scripts move an entry and everything that names it in one step, so its parts cannot come apart on a server that keeps what it is given.

    Of copies that expire the index may name the last for a while.
    """

    def repaired(self, process: str, kind: str) -> Complaints:
        """Yield what is wrong with a repair by a sweeper."""
        has_copies = any(known.kind == "audit" for known in self.facts.entries.values())
        if not (has_copies and kind in ("empty", "dropped")):
            yield f"{process} found something to repair: {kind}"


# --- the gate ------------------------------------------------------------------------------------------------------


class AtMostTheThresholdPasses(Sentence):
    """In any span of one window's length, at most `threshold` triggers of an environment pass.

    Those that passed because nobody could be asked are not the evaluator's.
    """

    steps = ("trip",)

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._passes: defaultdict[str, deque[int]] = defaultdict(deque)

    def after_step(self, step: Step) -> Complaints:
        settings = self.facts.plan.settings
        was_held, before = step.reply
        passes = self._passes[step.args["rate"]]
        while passes and passes[0] <= step.at_us - settings.trip_window_ms * 1000:
            passes.popleft()
        passed = 0 if was_held else max(0, min(step.args["number"], settings.trip_threshold - before))
        passes.extend([step.at_us] * passed)
        if len(passes) > settings.trip_threshold:
            yield f"{len(passes)} triggers of {_tail(step.args['rate'])} passed within one window"


class WhoStaysUnderTheThresholdIsNeverHeld(Sentence):
    """An environment whose rate stays under the threshold over any slightly longer span (5 %) is never held."""

    steps = ("trip",)

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._arrivals: defaultdict[str, deque[int]] = defaultdict(deque)
        self._over_us: dict[str, int] = {}

    def after_step(self, step: Step) -> Complaints:
        settings, rate = self.facts.plan.settings, step.args["rate"]
        arrivals = self._arrivals[rate]
        while arrivals and arrivals[0] <= step.at_us - settings.trip_window_ms * 1050:
            arrivals.popleft()
        arrivals.extend([step.at_us] * step.args["number"])
        was_held, before = step.reply
        over_us = self._over_us.get(rate)
        if was_held and (over_us is None or step.at_us - over_us > (settings.hold_ms + 1) * 1000):
            yield f"{_tail(rate)} is held, and was not over its threshold within the last {settings.hold_ms} ms"
        if len(arrivals) > settings.trip_threshold:
            self._over_us[rate] = step.at_us
        elif before + step.args["number"] > settings.trip_threshold:
            yield f"{_tail(rate)} was counted {before + step.args['number']}, and {len(arrivals)} came"


class WhoCannotWaitIsNeitherCountedNorHeld(Sentence):
    """Debounced triggers, one-time-token triggers and trigger-and-wait always pass the gate by: they count against no rate."""

    steps = ("trip", "accept")

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._counted: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._calls = 0

    def after_step(self, step: Step) -> Complaints:
        if step.what == "accept":
            if _cannot_wait(self.facts.requests[step.runs[0]]):
                yield f"{step.runs[0]} needs an answer at once, and is in the buffer"
            return
        for call in self.facts.history.calls[self._calls :]:
            self._asked[call.environment.id] += sum(not _cannot_wait(one) for one in call.requests)
        self._calls = len(self.facts.history.calls)
        env_id = _tail(step.args["rate"])
        self._counted[env_id] += step.args["number"]
        if self._counted[env_id] > self._asked[env_id]:
            yield f"{self._counted[env_id]} triggers of {env_id} were counted, of which {self._asked[env_id]} count"


class TheGateDecidesByItsTable(Sentence):
    """Only an enrolled organization's burst is held. Its own flag wins over the global one; one that cannot be read counts as absent."""

    steps = ("accept",)

    def decided(self, inputs: GateInputs, decision: Decision) -> Complaints:
        """Yield what is wrong with one decision."""
        settings = self.facts.plan.settings
        if self.facts.plan.has("the flag flips"):
            return
        is_enrolled = _is_enrolled(self.facts, inputs.org_flags)
        if decision.enrolled != is_enrolled:
            yield f"{inputs.org_id} is enrolled: {is_enrolled}, and was decided as {decision.enrolled}"
        if decision.action is Action.MOLLIFY and not is_enrolled:
            yield f"a trigger of {inputs.org_id} is held, which is not enrolled"
        if decision.action is Action.SHADOW_LOG and (is_enrolled or not settings.shadow_mode):
            yield f"a trigger of {inputs.org_id} is only watched"
        if decision.action is not Action.PASS_THROUGH and inputs.bypasses:
            yield "a trigger that passes the gate by was decided"

    def after_step(self, step: Step) -> Complaints:
        call = self.facts.calls[step.runs[0]]
        if not call.mollified and not call.engine_faults:
            yield f"{step.runs[0]} is in the buffer, which neither a burst nor an outage put there"
        is_held, plan = step.args["kind"] == "held", self.facts.plan
        if not plan.changes and is_held != plan.settings.divert:
            yield f"{step.runs[0]} is {step.args['kind']} with MOLLIFIER_DIVERT={int(plan.settings.divert)}"


class SwitchedOffNobodyIsAsked(Sentence):
    """Switched off, neither the gate nor the buffer's server is touched."""

    steps = ("accept", "claim", "release", "trip", "patch")

    def after_step(self, step: Step) -> Complaints:
        plan = self.facts.plan
        # A worker that is told to drain does so, and sweeps, until nothing is left.
        is_asked = step.what != "patch" and step.by.startswith("api")
        if not plan.settings.enabled and not plan.changes and is_asked:
            yield f"{step.by} asked the buffer's server for {step.what}"


class TriggersDoNotFailOfTheBuffer(Sentence):
    """A failure of Mollifier is not a failure of a trigger. Only when neither store takes it does the caller get a 503.

    Or when a held run that would be its answer is not confirmed where that is asked for, and cannot be created at that moment.
    """

    def after_answer(self, call: Call) -> Complaints:
        if call.kind != "trigger":
            return
        plan, payloads = self.facts.plan, {one.payload for one in call.requests}
        match call.outcome:
            case "unavailable":
                waited = "key" in str(call.answer)
                unsafe = plan.settings.confirmation.is_asked and "neither be confirmed" in str(call.answer)
                # Whether a parent exists that is not in the engine, the buffer alone knows.
                has_parent = any(one.parent_run_id for one in call.requests)
                of_buffer = isinstance(call.answer, BufferUnavailableError)
                if not (has_parent and of_buffer) and (of_buffer or not (call.engine_faults or waited or unsafe)):
                    yield f"a trigger failed of the buffer: {call.answer!r}"
                bypasses = any(map(_cannot_wait, call.requests))
                # Of an organization whose flag is off nothing is ever held.
                is_enrolled = _is_enrolled(self.facts, call.environment.org_flags) and not plan.has("the flag flips")
                diverts = plan.settings.divert and plan.settings.enabled and not plan.changes and is_enrolled
                if diverts and not (bypasses or waited or has_parent or call.buffer_faults or call.over_caps):
                    yield f"a trigger failed with the buffer's server there: {call.answer!r}"
            case "refused" if not self._is_right(call, payloads):
                yield f"a trigger was refused: {call.answer!r}"
            case "broken" if isinstance(call.answer, RuntimeError) and not payloads & {FLAKY, STUBBORN}:
                yield f"a trigger broke: {call.answer!r}"
            case _:
                pass

    def _is_right(self, call: Call, payloads: AbstractSet[bytes]) -> bool:
        """Return whether the trigger was to be refused: the engine cannot hold it, or nobody can read its parent."""
        unread = any(
            one.parent_run_id is not None
            and (one.parent_run_id in self.facts.spoilt or _is_left_behind(self.facts, one.parent_run_id))
            for one in call.requests
        )
        if isinstance(call.answer, OverCapError):
            return True
        return isinstance(call.answer, InvalidRequestError) and (POISON in payloads or unread)


class TriggersAreAnsweredInTime(Sentence):
    """Gate and accept each have a deadline: with the server hanging or slow, a trigger takes no longer than these and its engine."""

    _WAYS_S: ClassVar[float] = 0.001

    def after_answer(self, call: Call) -> Complaints:
        is_keyed = any(one.idempotency_key or one.request_key for one in call.requests)
        # Who waits for another's claim, or for a parent that only the buffer may know, waits for more than the two.
        has_parent = any(one.parent_run_id for one in call.requests)
        if call.kind != "trigger" or is_keyed or has_parent or call.was_stopped or call.outcome == "broken":
            return
        settings = self.facts.plan.settings
        accept_ms = settings.accept_deadline_ms
        if settings.held_over_cap == "reject" and len(call.requests) > 1:
            # Whether all of them fit is asked before.
            accept_ms += settings.accept_deadline_ms
        if settings.confirmation.is_asked:
            accept_ms += settings.accept_confirm_timeout_ms
        most_s = (settings.gate_deadline_ms + accept_ms) / 1000 + call.engine_s + self._WAYS_S
        took_s = call.ended_s - call.began_s
        if took_s > most_s:
            yield f"a trigger took {took_s * 1000:.0f} ms, of which the engine {call.engine_s * 1000:.0f} ms"


# --- reading and changing ------------------------------------------------------------------------------------------


class WhatWasAnsweredShows(Sentence):
    """What was answered shows at once and for good: no change is lost, none is made twice, wherever the run is.

    While the engine is away an entry takes changes after somebody has set out to create its run; should that creation have arrived all
    the same, they come to the run when the drainer has come back to the entry; a cancellation is answered by the engine alone then. So do
    changes, cancellations too, of an entry whose accept had no answer in time, so that its run is created directly.
    """

    def after_step(self, step: Step) -> Complaints:
        for run_id in step.runs:
            yield from self._shows(run_id)

    def after_answer(self, call: Call) -> Complaints:
        if call.run_id:
            yield from self._shows(call.run_id)

    def at_rest(self) -> Complaints:
        for run_id in self.facts.changes:
            yield from self._shows(run_id)

    def _shows(self, run_id: str) -> Complaints:
        changes = self.facts.changes.get(run_id)
        if changes is None:
            return
        is_moving, known = self.facts.is_moving(run_id), self.facts.entries.get(run_id)
        run = self.facts.run(run_id, self.facts.now)
        if run is None:
            return
        tags = changes.tags - set(run.snapshot.tags)
        if tags and not is_moving:
            yield f"{run_id} lacks {', '.join(sorted(tags))}"
        least = 0 if is_moving else changes.counts
        if not least <= count_of(run) <= changes.counts_asked:
            asked = f"{changes.counts} of {changes.counts_asked} increments were answered"
            yield f"{run_id} counts {count_of(run)}, and {asked}"
        is_late = known is not None and known.late
        is_sure = changes.until is not None and not changes.moves_open and not is_late and not run.snapshot.debounce
        if is_sure and run.snapshot.delayed_until != changes.until:
            yield f"{run_id} was moved to {changes.until} and is due at {run.snapshot.delayed_until}"
        is_cancelled = changes.is_cancelled and not self.facts.is_cancelled_aside(run_id)
        if is_cancelled and run.status is not RunStatus.CANCELED:
            yield f"{run_id} was cancelled and is {run.status}"


class ACancelledRunNeverStarts(Sentence):
    """Cancelling is linearised by the run's primary key: a run whose cancellation was answered never executes.

    But for one that was created directly, its accept having had no answer in time, and cancelled in an outage where the accept left it.
    """

    steps = ("start",)

    def after_step(self, step: Step) -> Complaints:
        changes = self.facts.changes.get(step.runs[0])
        if changes is not None and changes.is_cancelled and not self.facts.is_cancelled_aside(step.runs[0]):
            yield f"{step.runs[0]} was cancelled and has started"


class AnAcceptedRunIsAlwaysRead(Sentence):
    """A run id at once; reads, cancels, tags and so on work at once, wherever the run is. Lists show every run, once, and nothing else.

    Pages stay where they are while runs move from one store to the other. Audit copies of monitor mode never show as runs.
    """

    def after_answer(self, call: Call) -> Complaints:
        if call.outcome != "answered":
            return
        if call.kind == "list":
            yield from self._listed(call, call.answer)
        elif (
            call.run_id
            and call.answer is None
            and call.run_id not in self.facts.spoilt
            and not _is_left_behind(self.facts, call.run_id)
        ):
            yield f"{call.run_id} was accepted and is not there to {call.kind}"
        elif call.kind == "read" and isinstance(call.answer, Run):
            taken = self.facts.snapshots[call.run_id]
            if call.answer.snapshot.payload != taken.payload:
                yield f"{call.run_id} reads with another payload than it was accepted with"

    def _listed(self, call: Call, runs: Sequence[Run]) -> Complaints:
        listed = {run.id for run in runs}
        places = [(run.snapshot.created_at, run.id) for run in runs]
        if places != sorted(set(places), reverse=True):
            yield "a list, read to its end, shows a run twice, or out of order"
        for run_id, since in self.facts.answered.items():
            is_ours = self.facts.calls[run_id].environment.id == call.environment.id
            is_exempt = run_id in self.facts.spoilt or _is_left_behind(self.facts, run_id)
            if is_ours and since < call.began and run_id not in listed and not is_exempt:
                yield f"{run_id} was accepted and is missing from a list"
        for run in runs:
            known = self.facts.entries.get(run.id)
            if run.id not in self.facts.rows and (known is None or known.kind != "held"):
                yield f"{run.id} is no run, and is listed"
            elif run.snapshot.env_id != call.environment.id:
                yield f"{run.id} is another environment's, and is listed"


# --- the end -------------------------------------------------------------------------------------------------------


class WhatIsHeldIsDrained(Sentence):
    """Once servers answer and drainers run, the buffer is empty in the end: of entries, of index, of bound keys; only dead letters stay.

    Switching off or flag off stops holding, but what is held is drained.
    """

    def at_rest(self) -> Complaints:
        store = self.facts.store
        nouns = [":queue:", ":waiting:", ":draining", ":orgs", ":envs:"]
        if any(known.kind == "audit" for known in self.facts.entries.values()):
            # The index outlives copies that expire while nobody drains them, until its own end.
            nouns = nouns[:3]
        for key, members in store.sets.items():
            if any(noun in key for noun in nouns):
                yield f"{key} still has {sorted(members)}"
        for key, fields in store.hashes.items():
            if ":entry:" in key and fields["state"] in (b"QUEUED", b"DRAINING"):
                yield f"{key} is still {fields['state'].decode()}"
        for key, holder in store.strings.items():
            is_bound = ":idempotency:" in key and not holder.startswith((b"claim:", b"doubt"))
            if is_bound and not is_request_digest(_tail(key)):
                yield f"{key} is still bound: {holder.decode()}"
            elif ":idempotency:" in key and key not in store.ends_ms:
                yield f"{key} is claimed for ever"


SENTENCES: Sequence[type[Sentence]] = tuple(
    kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, Sentence) and kind is not Sentence
)
"""The whole of it, in order."""


# --- words ---------------------------------------------------------------------------------------------------------


def _names(env_id: str, idempotency_key: str | None, request_key: str | None) -> list[tuple[str, str, str]]:
    found = {"idempotency": idempotency_key, "request": request_key}
    return [(kind, env_id, key) for kind, key in found.items() if key is not None]


def _may_be_freed(facts: Facts, key: tuple[str, str, str]) -> bool:
    """True when something may end the key's life before the seed's end: its time, a reset, or how one of its runs ended."""
    kind, env_id, name = key
    for run_id, request in facts.requests.items():
        call = facts.calls[run_id]
        ours = request.idempotency_key if kind == "idempotency" else request.request_key
        if call.environment.id != env_id or ours != name:
            continue
        row: Any = facts.rows.get(run_id)
        has_failed = row is not None and row["status"] in (RunStatus.SYSTEM_FAILURE.value, RunStatus.FAILED.value)
        known = facts.entries.get(run_id)
        is_dead = facts.is_dead(run_id) or (known is not None and known.has_died)
        has_expired = request.ttl is not None or request.idempotency_lifetime is not None
        if is_dead or run_id in facts.spoilt or has_failed or (kind == "idempotency" and has_expired):
            return True
    return kind == "idempotency" and any(
        call.kind == "reset" and call.environment.id == env_id and call.value == name for call in facts.history.calls
    )


def _is_left_behind(facts: Facts, run_id: str) -> bool:
    """Return whether the run may be overlooked: where nothing is diverted any more, a buffer that is away is taken to hold nothing."""
    return facts.plan.changes and facts.fields(run_id) is not None


def _is_enrolled(facts: Facts, own: Any) -> bool:
    """Return whether an organization with these flags of its own is enrolled, while the global one stays as it is."""
    return bool(facts.plan.global_flag if own is None or isinstance(own, str) else own[ORG_FLAG])


def _cannot_wait(request: TriggerRequest) -> bool:
    """Return whether the caller needs an answer that a held trigger cannot give."""
    return bool(request.debounce or request.one_time_token or request.resume_parent_on_completion)


def _winner(row: Any) -> str | None:
    """Return the run that the row's run gave way to."""
    if row["error"] is None:
        return None
    error = msgspec.json.decode(row["error"], type=RunError)
    return error.message.split()[4].rstrip(",") if error.name == held.SUPERSEDED else None


def _fours(runs: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    return zip(*[iter(runs)] * 4, strict=True)  # pyright: ignore[reportReturnType] - of four


def _is_ready(env_id: str, ready: Mapping[str, Sequence[str]]) -> bool:
    return any(env_id in envs for envs in ready.values())


def _org_of(step: Step, facts: Facts) -> str:
    org_id = step.args.get("org_id")
    return org_id if org_id is not None else facts.entries[step.runs[0]].org_id


def _tail(key: str) -> str:
    return key.rsplit(":", 1)[-1]
