"""Every key that Mollifier has on the buffer's server: its name, type, lifetime and slot. Nothing else spells a key.

An organization belongs to one partition, a stable hash of its id. All keys of a partition carry its hash tag, so that a script
touches one slot, on one server and on a Cluster alike. A key has at most one variable part and that part stands last, so that
no two names alias, whatever the ids contain; customers' text (task ids, idempotency keys) enters only as a digest.

| key                           | type       | holds                                     | lives                                    |
|-------------------------------|------------|-------------------------------------------|------------------------------------------|
| `mollifier:partitions`        | string     | how many partitions there are             | for ever: fixed at the first boot        |
| `mollifier:{sweeper}:claim`   | string     | who sweeps: `claim:<token>`               | 15 s after it was renewed last           |
| `mollifier:{sweeper}:report`  | hash       | what the last sweep found                 | a week                                   |
| `mollifier:engine_away`       | string     | exists while a drainer's breaker is open  | 30 s after it last opened                |
| `mollifier:confirmation`      | string     | nothing: it is written to be waited for   | for ever                                 |
| `mollifier:{p07}:seq`         | string     | counter of sequences and leases           | for ever: one number per partition       |
| `mollifier:{p07}:orgs`        | sorted set | organizations by their earliest due time  | while something is queued or waiting     |
| `mollifier:{p07}:envs:O`      | sorted set | environments of O by earliest due time    | while something is queued or waiting     |
| `mollifier:{p07}:queue:E`     | sorted set | queued runs of E by sequence              | while something is queued                |
| `mollifier:{p07}:waiting:E`   | sorted set | `sequence:run` of E by not-before time    | while something waits                    |
| `mollifier:{p07}:draining`    | sorted set | leased runs by the end of their lease     | while something is leased                |
| `mollifier:{p07}:failed`      | sorted set | dead letters by the time they died        | until each is revived or discarded       |
| `mollifier:{p07}:entry:R`     | hash       | the entry of run R                        | audit: its TTL; held: until settled      |
| `mollifier:{p07}:held:E`      | sorted set | held runs of E by the trigger's moment    | while something is held                  |
| `mollifier:{p07}:children:E`  | sorted set | held runs of E by their parent's digest    | while something is held that has one     |
| `mollifier:{p07}:owners`      | hash       | held runs: bytes, env and org of each     | while something is held, or evicted      |
| `mollifier:{p07}:usage`       | hash       | held entries and bytes, by org and by env | while something is held                  |
| `mollifier:{p07}:idempotency:D` | string   | who a caller's key (by digest) belongs to | a claim, its deadline; a binding, its TTL |
| `mollifier:{p07}:rate:E`      | hash       | triggers of E per time bucket             | one window after the last trigger        |
| `mollifier:{p07}:tripped:E`   | string     | exists while E is held                    | `hold_ms` after the last overage         |
| `mollifier:{p07}:requests:K`  | hash       | requests of API key K per time bucket     | one window after the last request        |

A key that names only audit copies expires with the last of them; one that names a held entry does not expire while it does.
"""

from __future__ import annotations

import hashlib
import zlib

import msgspec

ROOT = "mollifier"
PARTITIONS = f"{ROOT}:partitions"
SWEEPER_CLAIM = f"{ROOT}:{{sweeper}}:claim"
SWEEPER_REPORT = f"{ROOT}:{{sweeper}}:report"
"""Of one slot: a report is stored by whoever has the claim."""
ENGINE_AWAY = f"{ROOT}:engine_away"
CONFIRMATION = f"{ROOT}:confirmation"
"""Of no partition: what a server is waited for is whatever it was given before this."""
WAKE = f"{ROOT}:wake"
"""The channel, no key, that tells drainers of an environment that has something queued again."""


class PartitionKeys(msgspec.Struct, frozen=True):
    """The keys of one partition."""

    number: int

    def _key(self, noun: str) -> str:
        return f"{ROOT}:{{p{self.number:02d}}}:{noun}"

    @property
    def seq(self) -> str:
        """Counter."""
        return self._key("seq")

    @property
    def orgs(self) -> str:
        """Ready index, upper level."""
        return self._key("orgs")

    @property
    def draining(self) -> str:
        """Leased runs."""
        return self._key("draining")

    @property
    def failed(self) -> str:
        """Dead letters."""
        return self._key("failed")

    @property
    def owners(self) -> str:
        """Whose each held entry is, and its bytes."""
        return self._key("owners")

    @property
    def usage(self) -> str:
        """How much is held."""
        return self._key("usage")

    def envs(self, org_id: str) -> str:
        """Ready index, lower level."""
        return self._key(f"envs:{org_id}")

    def queue(self, env_id: str) -> str:
        """Queued runs of an environment."""
        return self._key(f"queue:{env_id}")

    def held(self, env_id: str) -> str:
        """Held runs of an environment, for lists: queued, waiting and leased ones alike."""
        return self._key(f"held:{env_id}")

    def children(self, env_id: str) -> str:
        """Held runs of an environment that another run triggered, each under that one's `parent_number`."""
        return self._key(f"children:{env_id}")

    def waiting(self, env_id: str) -> str:
        """Runs of an environment that wait for their not-before time."""
        return self._key(f"waiting:{env_id}")

    def entry(self, run_id: str) -> str:
        """One entry."""
        return self._key(f"entry:{run_id}")

    def idempotency(self, digest: str) -> str:
        """Who one of the callers' keys belongs to: `run:<id>`, `claim:<token>`, or `doubt`."""
        return self._key(f"idempotency:{digest}")

    def rate(self, env_id: str) -> str:
        """The trip evaluator's counts."""
        return self._key(f"rate:{env_id}")

    def tripped(self, env_id: str) -> str:
        """The trip evaluator's hold."""
        return self._key(f"tripped:{env_id}")

    def requests(self, key_id: str) -> str:
        """The rate limiter's counts."""
        return self._key(f"requests:{key_id}")


class Keyspace:
    """Finds the partition of an organization among `partitions`, a number that never changes for the life of a buffer."""

    def __init__(self, partitions: int) -> None:
        self.partitions = tuple(PartitionKeys(number) for number in range(partitions))

    def of(self, org_id: str) -> PartitionKeys:
        """Return the keys of the partition the organization belongs to (CRC-32 of its id: stable everywhere, cheap)."""
        return self.partitions[zlib.crc32(org_id.encode()) % len(self.partitions)]


_IDEMPOTENCY, _REQUEST = "0", "1"
"""The first digit of a digest: the kind of key that it names."""


def idempotency_digest(env_id: str, task_id: str, key: str) -> str:
    """Name an idempotency key without its text."""
    return _digest(_IDEMPOTENCY, env_id, task_id, key)


def parent_number(run_id: str) -> int:
    """Name a parent by a number, which is what sorted sets are ordered by: as many bits of a digest as one keeps exactly.

    Of two parents with one number, whoever reads the children's entries can tell whose they are.
    """
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "big") >> 11


def request_digest(env_id: str, key: str) -> str:
    """Name a request key without its text."""
    return _digest(_REQUEST, env_id, key)


def is_request_digest(digest: str) -> bool:
    """Tell whether the digest names a request key, which outlives the failure of its run."""
    return digest.startswith(_REQUEST)


def _digest(kind: str, *parts: str) -> str:
    """The kind, then SHA-256 over the length-prefixed parts, so that no two lists of parts alias, whatever they contain; 156 bits of it."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(4, "big") + data)
    return kind + digest.hexdigest()[:39]
