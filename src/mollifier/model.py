"""The nouns of the system, as frozen structs: no I/O, no clock, no environment.

Read them in the order in which data flows: an `Environment` sends a `TriggerRequest`; the gate makes a `Decision` of its
`GateInputs`; the trigger becomes a `Snapshot`, everything needed to create the run later; the buffer holds the snapshot in an
`Entry`; the run engine turns it into a `Run`.

An entry's states. Only the scripts in `lua/` move an entry from one to another:

    accept ──> QUEUED ──pop──> DRAINING ──ack──> MATERIALISED (for a short grace)
                 ^                │  │
                 └──── requeue ───┘  └──fail──> FAILED ──discard──> gone
                 └──── reclaim ───┘      │  (its lease ran out; far too often, and it is FAILED too)
                 └──── revive ───────────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

import msgspec

MAX_TAGS = 10
REQUEST_KEY_LIFETIME = timedelta(hours=24)
IDEMPOTENCY_KEY_LIFETIME = timedelta(days=30)
DEBOUNCE_MAX_DELAY = timedelta(hours=1)


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Who is asking: one environment of one project of one organization, as its API key proved.

    `org_flags` is the organization's own `feature_flags` value as stored, unparsed: flags decide what of it counts.
    """

    id: str
    name: str
    project_id: str
    org_id: str
    org_flags: Any = None


# --- the trigger ---------------------------------------------------------------------------------------------------


class Debounce(msgspec.Struct, frozen=True, kw_only=True):
    """Triggers with one `key` share one delayed run; each pushes it by `delay`, never beyond `max_delay` from its creation."""

    key: str
    delay: timedelta
    mode: Literal["leading", "trailing"] = "leading"
    max_delay: timedelta = DEBOUNCE_MAX_DELAY


TriggerFunction = Literal["trigger", "triggerAndWait", "batchTrigger", "batchTriggerAndWait"]


class TriggerRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One trigger, parsed and valid in itself; whether its task and its parent exist is not known yet.

    `payload`, `context` and `metadata` are the caller's bytes, untouched. Durations count from the trigger's moment.
    `idempotency_key` is the bound key (a run- or attempt-scoped one already combined with its scope);
    `idempotency_key_shown` is what the caller called it. `run_id` is what its run is to be called where the same trigger may be made
    twice, as an item of a batch is when the batch is sent again; otherwise the run gets a new id. `one_time_token` marks a caller who
    needs a synchronous answer, in a host application that has such tokens: its trigger passes the gate. It is never read from a request.
    """

    task_id: str
    run_id: str | None = None
    payload: bytes = b""
    payload_type: str = "application/json"
    context: bytes | None = None
    metadata: bytes | None = None
    metadata_type: str = "application/json"
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None
    idempotency_key_shown: str | None = None
    idempotency_lifetime: timedelta | None = None
    request_key: str | None = None
    delay: timedelta | datetime | None = None
    ttl: timedelta | None = None
    debounce: Debounce | None = None
    queue: str | None = None
    concurrency_key: str | None = None
    priority: int = 0
    machine: str | None = None
    region: str | None = None
    max_attempts: int | None = None
    max_duration_s: int | None = None
    test: bool = False
    lock_to_version: str | None = None
    external_deployment_id: str | None = None
    bulk_action_id: str | None = None
    parent_run_id: str | None = None
    resume_parent_on_completion: bool = False
    parent_batch: str | None = None
    trigger_function: TriggerFunction = "trigger"
    trigger_source: str | None = None
    one_time_token: str | None = None
    replayed_from: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything needed to create one run later exactly as it would be created now.

    The moments are absolute and fixed at the trigger's moment (`created_at`), so that creating the run late changes nothing.
    """

    run_id: str
    org_id: str
    env_id: str
    task_id: str
    created_at: datetime
    payload: bytes = b""
    payload_type: str = "application/json"
    context: bytes | None = None
    metadata: bytes | None = None
    metadata_type: str = "application/json"
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None
    idempotency_key_shown: str | None = None
    idempotency_expires_at: datetime | None = None
    request_key: str | None = None
    request_key_expires_at: datetime | None = None
    delayed_until: datetime | None = None
    ttl_s: int | None = None
    debounce: Debounce | None = None
    queue: str | None = None
    concurrency_key: str | None = None
    priority: int = 0
    machine: str | None = None
    region: str | None = None
    max_attempts: int | None = None
    max_duration_s: int | None = None
    test: bool = False
    lock_to_version: str | None = None
    external_deployment_id: str | None = None
    bulk_action_id: str | None = None
    parent_run_id: str | None = None
    root_run_id: str | None = None
    depth: int = 0
    resume_parent_on_completion: bool = False
    batch_id: str | None = None
    trigger_function: TriggerFunction = "trigger"
    trigger_source: str | None = None
    replayed_from: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


class TriggerResult(msgspec.Struct, frozen=True):
    """What the caller is told: the run that stands for this trigger, and whether an idempotency key answered."""

    run_id: str
    is_cached: bool = False


# --- batches -------------------------------------------------------------------------------------------------------


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Many triggers to come under one name: how many, and what holds for all of them."""

    run_count: int
    idempotency_key: str | None = None
    request_key: str | None = None
    parent_run_id: str | None = None
    resume_parent_on_completion: bool = False


class BatchItem(msgspec.Struct, frozen=True):
    """One trigger of a batch, at its place. Items with one index are one item."""

    index: int
    request: TriggerRequest


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. `runs` has the run that stands for each item there is so far, by index: a new one, or one that a key answered with."""

    id: str
    env_id: str
    run_count: int
    created_at: datetime
    updated_at: datetime
    idempotency_key: str | None = None
    idempotency_expires_at: datetime | None = None
    request_key: str | None = None
    request_key_expires_at: datetime | None = None
    parent_run_id: str | None = None
    resume_parent_on_completion: bool = False
    runs: Mapping[int, str] = {}

    @property
    def sealed(self) -> bool:
        """True when every item is there."""
        return len(self.runs) == self.run_count


class BatchStatus(StrEnum):
    """COMPLETED when every item is there and its run has ended, PENDING before."""

    PENDING = "PENDING"
    COMPLETED = "COMPLETED"


# --- the gate ------------------------------------------------------------------------------------------------------


class Action(StrEnum):
    """What the gate says of one trigger; also the `outcome` label of the `mollifier.decisions` counter."""

    PASS_THROUGH = "pass_through"
    SHADOW_LOG = "shadow_log"
    MOLLIFY = "mollify"


class GateInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate may know of one trigger. The last three mark callers that need a synchronous answer: they pass it by."""

    org_id: str
    env_id: str
    task_id: str = ""
    org_flags: Any = None
    debounce: bool = False
    one_time_token: bool = False
    trigger_and_wait: bool = False

    @property
    def bypasses(self) -> bool:
        """True when the gate must let this trigger pass without counting it."""
        return self.debounce or self.one_time_token or self.trigger_and_wait


class Verdict(msgspec.Struct, frozen=True):
    """The trip evaluator's answer: is the environment bursting, and how many triggers its window has seen."""

    tripped: bool
    count: int


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The gate's answer for one trigger. `reason` names what tripped; `enrolled` says whether the organization's flag is on."""

    action: Action
    reason: str | None = None
    enrolled: bool = False
    count: int | None = None


# --- the buffer ----------------------------------------------------------------------------------------------------


class EntryState(StrEnum):
    """Where an entry is in its life: waiting for its turn, in the hands of a drainer, given up, or settled and kept for a moment."""

    QUEUED = "QUEUED"
    DRAINING = "DRAINING"
    MATERIALISED = "MATERIALISED"
    FAILED = "FAILED"


class EntryKind(StrEnum):
    """An AUDIT copy (monitor) duplicates a run and expires; a HELD entry (divert) is the only copy and never does."""

    AUDIT = "audit"
    HELD = "held"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One held trigger as the buffer has it.

    `sequence` orders the entries of an environment; `accepted_at_ms`, `not_before_ms` and `failed_at_ms` are the server's clock,
    milliseconds since the epoch. `lease` is the fencing token of the pop that holds it: only its holder may settle the entry.
    `patches` are the changes made since, oldest first; `bindings` the digests of the caller's keys that are bound to it. `taken`:
    it has been popped at least once, so its run may be created at any moment.
    """

    run_id: str
    env_id: str
    org_id: str
    kind: EntryKind
    state: EntryState
    sequence: int
    attempts: int
    reclaims: int = 0
    taken: bool = False
    accepted_at_ms: int
    payload: bytes
    lease: int = 0
    dwell_ms: int = 0
    not_before_ms: int | None = None
    patches: tuple[bytes, ...] = ()
    bindings: tuple[str, ...] = ()
    error: str | None = None
    failed_at_ms: int | None = None


# --- the run engine ------------------------------------------------------------------------------------------------


class RunStatus(StrEnum):
    """A run's status, in the words of the wire format."""

    PENDING_VERSION = "PENDING_VERSION"
    QUEUED = "QUEUED"
    DEQUEUED = "DEQUEUED"
    EXECUTING = "EXECUTING"
    WAITING = "WAITING"
    COMPLETED = "COMPLETED"
    CANCELED = "CANCELED"
    FAILED = "FAILED"
    CRASHED = "CRASHED"
    SYSTEM_FAILURE = "SYSTEM_FAILURE"
    DELAYED = "DELAYED"
    EXPIRED = "EXPIRED"
    TIMED_OUT = "TIMED_OUT"


FINAL_STATUSES = frozenset(
    {
        RunStatus.COMPLETED,
        RunStatus.CANCELED,
        RunStatus.FAILED,
        RunStatus.CRASHED,
        RunStatus.SYSTEM_FAILURE,
        RunStatus.EXPIRED,
        RunStatus.TIMED_OUT,
    }
)
"""No run ever leaves one of these."""

KEY_FREEING_STATUSES = frozenset(
    {RunStatus.FAILED, RunStatus.CRASHED, RunStatus.TIMED_OUT, RunStatus.SYSTEM_FAILURE, RunStatus.EXPIRED}
)
"""A run that ends in one of these frees its idempotency key."""


class RunError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a run did not succeed."""

    message: str
    name: str | None = None
    stack_trace: str | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run as the engine has it: the snapshot it was created from, as it stands now, and what happened since."""

    snapshot: Snapshot
    status: RunStatus
    updated_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expired_at: datetime | None = None
    attempt_count: int = 0
    output: bytes | None = None
    output_type: str = "application/json"
    error: RunError | None = None
    version: str | None = None
    children: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The run's id."""
        return self.snapshot.run_id


class RunProgress(msgspec.Struct, frozen=True):
    """How far a run is, without what it carries."""

    status: RunStatus
    updated_at: datetime


class RunFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs a list shows; every given condition must hold. `after` and `before` are opaque cursors of earlier pages."""

    page_size: int = 25
    after: str | None = None
    before: str | None = None
    statuses: tuple[RunStatus, ...] = ()
    task_ids: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    is_test: bool | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    batch_id: str | None = None


class RunPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of runs, newest first by (created_at, id), and the cursors of its neighbours.

    Its runs come without payload, context, output and children: a list shows none of them, and they may be large.
    """

    runs: tuple[Run, ...]
    next: str | None = None
    previous: str | None = None


class MetadataOperation(msgspec.Struct, frozen=True, kw_only=True):
    """One change to a run's metadata. `value` is JSON text; `update` replaces the whole document, the rest name a `key`."""

    type: Literal["update", "set", "append", "remove", "delete", "increment"]
    key: str | None = None
    value: bytes | None = None


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """A new organization with one project, one environment and one API key; the key is shown this once."""

    org_id: str
    project_id: str
    env_id: str
    api_key: str


FeatureFlags = Mapping[str, Any]
