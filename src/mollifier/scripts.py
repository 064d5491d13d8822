"""The scripts in `lua/`, one typed function each, and how they are run.

A function here builds a `Call`: which script, on which keys, with which arguments, and how to read the reply. Its keyword names
are the names in the script's header. `Scripts` runs one call, or many in one round trip, by hash; a server that does not know a
script (restarted, or SCRIPT FLUSH) is sent the source of that one in the retry.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, Generic, Literal, TypeVar

import msgspec
from redis.exceptions import NoScriptError, RedisError

from mollifier import faults
from mollifier.errors import BufferRefusedError, BufferUnavailableError
from mollifier.model import EntryKind, Verdict
from mollifier.server import Command, Server

T = TypeVar("T")
Argument = str | bytes | int
Settlement = Literal["held", "changed", "evicted", "missing", "stale"]
ReclaimReply = Literal["held", "failed", "evicted", "malformed", "missing", "stale"]
ReviveReply = Literal["revived", "missing", "gone", "malformed", "alive"]
DiscardReply = Literal["discarded", "missing"]
IndexVerdict = Literal["", "missing", "late", "empty"]
_VERDICTS: Mapping[str, Settlement] = {"held": "held", "changed": "changed", "missing": "missing", "stale": "stale"}
ClaimReply = tuple[Literal["claimed", "bound", "doubted", "pending"], str]
AcceptReply = tuple[Literal["accepted", "duplicate_run", "duplicate_key", "over_cap"], str, int]

_INCLUDE = re.compile(r"^-- @include (\w+)\n", re.MULTILINE)


class Script(msgspec.Struct, frozen=True):
    """One script: its source with what it includes, and the hash by which the server knows it."""

    name: str
    source: str
    sha: str


class Call(msgspec.Struct, Generic[T], frozen=True):
    """One script call, not yet run. `parse` turns the server's reply into the function's result."""

    script: Script
    keys: tuple[str, ...]
    args: tuple[Argument, ...]
    parse: Callable[[Any], T]


class PoppedFields(msgspec.Struct, frozen=True):
    """What a pop took: entries as hashes, runs whose entry does not read as one, references dropped, held runs that vanished.

    `following` are the oldest that it left.
    """

    now_ms: int
    taken: tuple[tuple[str, Mapping[bytes, bytes]], ...]
    malformed: tuple[str, ...]
    dropped: int
    evicted: tuple[str, ...]
    following: tuple[str, ...]


class Books(msgspec.Struct, frozen=True):
    """How many held runs are listed of an environment, what its sums say, and the partition's counter at that moment."""

    sequence: int
    listed: int
    entries: int
    held_bytes: int


class Restored(msgspec.Struct, frozen=True):
    """What a look at runs of one environment found, and put right.

    `stale` were due for too long, `oldest_at_ms` is when the oldest that was due was accepted (None without one), `held_bytes` what
    those take that are held, by their records. `verdicts` has of each run that was not as it should be: the run, what was done, and
    where a run that is gone was still named.
    """

    stale: int
    oldest_at_ms: int | None
    held_bytes: int
    books: Books
    verdicts: tuple[tuple[str, str, tuple[str, ...]], ...]


@cache
def load(name: str) -> Script:
    """Read `lua/<name>.lua` and put the files it includes before it."""
    folder = resources.files("mollifier") / "lua"
    body = (folder / f"{name}.lua").read_text("utf-8")
    parts = [(folder / "lib" / f"{lib}.lua").read_text("utf-8") for lib in _INCLUDE.findall(body)]
    source = "\n".join([*parts, body])
    script = Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
    faults.name_script(name, script.sha, script.source)
    return script


class Scripts:
    """Runs calls against one server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def run(self, call: Call[T]) -> T:
        """Run one call: one round trip, two when the server does not know the script. Raises BufferUnavailableError."""
        (result,) = await self.run_many([call])
        if isinstance(result, BufferUnavailableError):
            raise result
        return result

    async def run_many(self, calls: Sequence[Call[T]]) -> list[T | BufferUnavailableError]:
        """Run many calls in one round trip; a call that fails answers its own error and harms no other.

        Raises BufferUnavailableError when the server gave no replies at all.
        """
        replies = await self._server.run_many([command("EVALSHA", call.script.sha, call) for call in calls])
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            by_source = [command("EVAL", calls[index].script.source, calls[index]) for index in unknown]
            for index, reply in zip(unknown, await self._server.run_many(by_source), strict=True):
                replies[index] = reply
        return [result(call, reply) for call, reply in zip(calls, replies, strict=True)]


def command(verb: str, script: str, call: Call[Any]) -> Command:
    """Return the command that runs a call: by its script's hash with EVALSHA, by its source with EVAL."""
    return (verb, script, len(call.keys), *call.keys, *call.args)


def result(call: Call[T], reply: Any) -> T | BufferUnavailableError:
    """Read a call's reply."""
    if isinstance(reply, RedisError):
        return BufferRefusedError(f"{call.script.name}: {reply}")
    return call.parse(reply)


# --- one function per script ---------------------------------------------------------------------------------------


def trip(
    *, rate: str, tripped: str, bucket_us: int, buckets: int, threshold: int, hold_ms: int, number: int
) -> Call[tuple[Verdict, ...]]:
    """Count triggers that come together; see `lua/trip.lua`. Each has its own verdict, in order."""

    def verdicts(reply: Any) -> tuple[Verdict, ...]:
        held, before = bool(reply[0]), int(reply[1])
        counts = range(before + 1, before + number + 1)
        return tuple(Verdict(tripped=held or count > threshold, count=count) for count in counts)

    return Call(load("trip"), (rate, tripped), (bucket_us, buckets, threshold, hold_ms, number), verdicts)


def limit(*, requests: str, bucket_us: int, buckets: int, limit: int) -> Call[tuple[bool, int, int]]:
    """Count one request of an API key unless its limit is reached; see `lua/limit.lua`."""

    def answer(reply: Any) -> tuple[bool, int, int]:
        allowed, remaining, reset_ms = (int(number) for number in reply)
        return bool(allowed), remaining, reset_ms

    return Call(load("limit"), (requests,), (bucket_us, buckets, limit), answer)


def accept(
    *,
    entry: str,
    queue: str,
    envs: str,
    orgs: str,
    seq: str,
    held: str,
    failed: str,
    owners: str,
    usage: str,
    waiting: str,
    draining: str,
    children: str,
    binding: Sequence[str],
    run_id: str,
    env_id: str,
    org_id: str,
    kind: EntryKind,
    payload: bytes,
    ttl_ms: int,
    created_us: int,
    token: str,
    digests: str,
    wake: str,
    parent: str,
    taken: int,
    env_max_entries: int,
    env_max_bytes: int,
    org_max_entries: int,
    org_max_bytes: int,
    max_entries: int,
    max_bytes: int,
    expires_ms: Sequence[int],
) -> Call[AcceptReply]:
    """Store one entry; see `lua/accept.lua`."""
    limits = (env_max_entries, env_max_bytes, org_max_entries, org_max_bytes, max_entries, max_bytes)
    keys = (entry, queue, envs, orgs, seq, held, failed, owners, usage, waiting, draining, children, *binding)
    entry_args = (run_id, env_id, org_id, kind.value, payload, ttl_ms, created_us, token, digests, wake, parent, taken)
    return Call(load("accept"), keys, (*entry_args, *limits, *expires_ms), _accepted)


def peek(*, queue: str, waiting: str, limit: int) -> Call[tuple[str, ...]]:
    """Name the oldest queued runs; see `lua/peek.lua`."""
    return Call(load("peek"), (queue, waiting), (limit,), _texts)


def pop(
    *,
    queue: str,
    waiting: str,
    envs: str,
    orgs: str,
    draining: str,
    failed: str,
    seq: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    entry: Sequence[str],
    env_id: str,
    org_id: str,
    lease_ms: int,
    take: int,
    enough: int,
    run_id: Sequence[str],
) -> Call[PoppedFields]:
    """Take the oldest entries under a lease; see `lua/pop.lua`."""
    keys = (queue, waiting, envs, orgs, draining, failed, seq, held, owners, usage, children, *entry)
    return Call(load("pop"), keys, (env_id, org_id, lease_ms, take, enough, *run_id), _popped)


def ack(
    *,
    draining: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    entries: Sequence[str],
    grace_ms: int,
    runs: Sequence[str],
) -> Call[tuple[Settlement | BufferUnavailableError, ...]]:
    """Settle entries of one environment whose runs exist; see `lua/ack.lua`. Each has its own answer, in order."""
    return Call(load("ack"), (draining, held, owners, usage, children, *entries), (grace_ms, *runs), _settlements)


def requeue(
    *,
    entry: str,
    queue: str,
    waiting: str,
    envs: str,
    orgs: str,
    draining: str,
    failed: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    run_id: str,
    env_id: str,
    org_id: str,
    lease: int,
    not_before_ms: int,
    attempts: int,
) -> Call[Settlement]:
    """Put a leased entry back; see `lua/requeue.lua`."""
    keys = (entry, queue, waiting, envs, orgs, draining, failed, held, owners, usage, children)
    return Call(load("requeue"), keys, (run_id, env_id, org_id, lease, not_before_ms, attempts), _settlement)


def fail(
    *,
    entry: str,
    draining: str,
    failed: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    binding: Sequence[str],
    run_id: str,
    lease: int,
    error: str,
    env_id: str,
    org_id: str,
) -> Call[Settlement]:
    """Give an entry up; see `lua/fail.lua`."""
    keys = (entry, draining, failed, held, owners, usage, children, *binding)
    return Call(load("fail"), keys, (run_id, lease, error, env_id, org_id), _settlement)


def patch(
    *,
    entry: str,
    owners: str,
    usage: str,
    binding: Sequence[str],
    run_id: str,
    patches: int,
    patch: bytes,
    taken: int,
) -> Call[Settlement]:
    """Append one change to a held entry; see `lua/patch.lua`."""
    return Call(load("patch"), (entry, owners, usage, *binding), (run_id, patches, patch, taken), _settlement)


def mark(*, entry: str) -> Call[Settlement]:
    """Mark a held entry as taken; see `lua/mark.lua`."""
    return Call(load("mark"), (entry,), (), _settlement)


def claim(
    *, binding: Sequence[str], token: str, lifetime_ms: int, lease_ms: int, void: Sequence[str]
) -> Call[tuple[ClaimReply, ...]]:
    """Claim callers' keys; see `lua/claim.lua`."""
    return Call(load("claim"), tuple(binding), (token, lifetime_ms, lease_ms, *void), _claimed)


def prolong(*, binding: Sequence[str], token: str, lifetime_ms: int) -> Call[int]:
    """Begin the life of claims anew; see `lua/prolong.lua`."""
    return Call(load("prolong"), tuple(binding), (token, lifetime_ms), int)


def release(*, binding: Sequence[str], token: str) -> Call[int]:
    """Give claims back; see `lua/release.lua`."""
    return Call(load("release"), tuple(binding), (token,), int)


def extend(*, entry: str, draining: str, run_id: str, lease: int, lease_ms: int) -> Call[Settlement]:
    """Push the end of a lease; see `lua/extend.lua`."""
    return Call(load("extend"), (entry, draining), (run_id, lease, lease_ms), _settlement)


def reclaim(
    *,
    entry: str,
    queue: str,
    envs: str,
    orgs: str,
    draining: str,
    failed: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    binding: Sequence[str],
    run_id: str,
    env_id: str,
    org_id: str,
    max_reclaims: int,
) -> Call[ReclaimReply]:
    """Put back an entry whose lease ran out, or give it up; see `lua/reclaim.lua`."""
    keys = (entry, queue, envs, orgs, draining, failed, held, owners, usage, children, *binding)
    return Call(load("reclaim"), keys, (run_id, env_id, org_id, max_reclaims), _reclaimed)


def revive(
    *,
    entry: str,
    queue: str,
    waiting: str,
    envs: str,
    orgs: str,
    draining: str,
    failed: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    run_id: str,
    env_id: str,
    org_id: str,
    created_us: int,
    parent: str,
    wake: str,
) -> Call[ReviveReply]:
    """Put a dead letter back to its place in the queue; see `lua/revive.lua`."""
    keys = (entry, queue, waiting, envs, orgs, draining, failed, held, owners, usage, children)
    return Call(load("revive"), keys, (run_id, env_id, org_id, created_us, parent, wake), _revived)


def discard(
    *,
    entry: str,
    queue: str,
    waiting: str,
    draining: str,
    failed: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    binding: Sequence[str],
    run_id: str,
) -> Call[DiscardReply]:
    """Drop a dead letter for good; see `lua/discard.lua`."""
    keys = (entry, queue, waiting, draining, failed, held, owners, usage, children, *binding)
    return Call(load("discard"), keys, (run_id,), _discarded)


def repair(
    *, queue: str, waiting: str, envs: str, orgs: str, env_id: str, org_id: str
) -> Call[tuple[IndexVerdict, IndexVerdict]]:
    """Put the ready index right about one environment; see `lua/repair.lua`."""
    return Call(load("repair"), (queue, waiting, envs, orgs), (env_id, org_id), _repaired)


def restore(
    *,
    queue: str,
    waiting: str,
    envs: str,
    orgs: str,
    draining: str,
    failed: str,
    held: str,
    owners: str,
    usage: str,
    children: str,
    seq: str,
    entry: Sequence[str],
    env_id: str,
    org_id: str,
    lease_ms: int,
    stalled_ms: int,
    runs: Sequence[str],
) -> Call[Restored]:
    """Put runs of one environment back to their places; see `lua/restore.lua`."""
    keys = (queue, waiting, envs, orgs, draining, failed, held, owners, usage, children, seq, *entry)
    return Call(load("restore"), keys, (env_id, org_id, lease_ms, stalled_ms, *runs), _restored)


def report(*, claim: str, report: str, token: str, lifetime_ms: int, fields: Sequence[str]) -> Call[bool]:
    """Store what a sweep found; see `lua/report.lua`."""
    return Call(load("report"), (claim, report), (token, lifetime_ms, *fields), bool)


# --- reading replies -----------------------------------------------------------------------------------------------


def _accepted(reply: Any) -> AcceptReply:
    return reply[0].decode(), reply[1].decode(), int(reply[2])


def _claimed(reply: Any) -> tuple[ClaimReply, ...]:
    return tuple((state.decode(), run_id.decode()) for state, run_id in reply)


def _settlement(reply: Any) -> Settlement:
    return reply.decode()


def _reclaimed(reply: Any) -> ReclaimReply:
    return reply.decode()


def _revived(reply: Any) -> ReviveReply:
    return reply.decode()


def _discarded(reply: Any) -> DiscardReply:
    return reply.decode()


def _repaired(reply: Any) -> tuple[IndexVerdict, IndexVerdict]:
    return reply[0].decode(), reply[1].decode()


def _restored(reply: Any) -> Restored:
    stale, oldest_at_ms, held_bytes, books, verdicts = reply
    return Restored(
        stale=int(stale),
        oldest_at_ms=int(oldest_at_ms) if oldest_at_ms >= 0 else None,
        held_bytes=int(held_bytes),
        books=Books(*map(int, books)),
        verdicts=tuple((run_id.decode(), verdict.decode(), _texts(named)) for run_id, verdict, *named in verdicts),
    )


def _settlements(reply: Any) -> tuple[Settlement | BufferUnavailableError, ...]:
    texts = _texts(reply)
    return tuple(_VERDICTS.get(text) or BufferUnavailableError(text) for text in texts)


def _texts(reply: Any) -> tuple[str, ...]:
    return tuple(item.decode() for item in reply)


def _popped(reply: Any) -> PoppedFields:
    now_ms, taken, malformed, dropped, evicted, following = reply
    return PoppedFields(
        now_ms=int(now_ms),
        taken=tuple((run_id.decode(), as_fields(fields)) for run_id, *fields in taken),
        malformed=_texts(malformed),
        dropped=int(dropped),
        evicted=_texts(evicted),
        following=_texts(following),
    )


def as_fields(flat: Sequence[bytes]) -> Mapping[bytes, bytes]:
    """Pair up a flat hash reply: name, value, name, value."""
    return {flat[i]: flat[i + 1] for i in range(0, len(flat), 2)}
