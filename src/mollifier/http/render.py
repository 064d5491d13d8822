"""Runs as the wire format has them. Payload, output and metadata are put in as the JSON they are, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import Response
from litestar.background_tasks import BackgroundTask
from msgspec import Meta

from mollifier.durations import format_duration
from mollifier.model import Environment, Run, RunError, RunStatus, TriggerFunction
from mollifier.request import JSON, SUPER_JSON, super_json_value

_QUEUED = {RunStatus.PENDING_VERSION, RunStatus.QUEUED, RunStatus.DELAYED}
_EXECUTING = {RunStatus.DEQUEUED, RunStatus.EXECUTING}
_FAILED = {RunStatus.FAILED, RunStatus.CRASHED, RunStatus.SYSTEM_FAILURE, RunStatus.TIMED_OUT, RunStatus.EXPIRED}
_COMPLETED = {RunStatus.COMPLETED, RunStatus.CANCELED, *_FAILED}


class RunSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """What every mention of a run tells."""

    id: Annotated[str, Meta(examples=["run_0mh9k2vz1x3c5v7b9n1m3a5s7"])]
    status: RunStatus
    task_identifier: str
    is_queued: bool
    is_executing: bool
    is_waiting: bool
    is_completed: bool
    is_success: bool
    is_failed: bool
    is_cancelled: bool
    is_test: bool
    created_at: datetime
    updated_at: datetime
    tags: tuple[str, ...]
    cost_in_cents: float
    base_cost_in_cents: float
    duration_ms: int
    depth: int
    trigger_function: TriggerFunction
    idempotency_key: str | None = None
    version: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    delayed_until: datetime | None = None
    ttl: Annotated[str | None, Meta(description="A duration", examples=["1h30m"])] = None
    expired_at: datetime | None = None
    metadata: Annotated[Any, Meta(description="Any JSON")] = None
    batch_id: str | None = None


class EnvironmentName(msgspec.Struct, frozen=True):
    """The environment of a run."""

    id: str
    name: str


class ListedRun(RunSummary, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """A run in a list."""

    env: EnvironmentName


class RunFailure(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """Why a run did not succeed."""

    message: str
    name: str | None = None
    stack_trace: str | None = None


class RelatedRuns(msgspec.Struct, frozen=True, omit_defaults=True):
    """The runs a run came from and led to."""

    root: RunSummary | None = None
    parent: RunSummary | None = None
    children: tuple[RunSummary, ...] = ()


class RunDetails(RunSummary, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """A run with all that is known of it. `payload` and `output` are the values they stand for, whatever their format."""

    related_runs: RelatedRuns
    attempt_count: int
    payload: Annotated[Any, Meta(description="Any JSON")] = None
    output: Annotated[Any, Meta(description="Any JSON")] = None
    error: RunFailure | None = None


class ResultError(msgspec.Struct, frozen=True, rename="camel"):
    """Why the run did not succeed, in the form that clients tell kinds of errors apart by."""

    name: str
    message: str
    stack_trace: str = ""
    type: Literal["BUILT_IN_ERROR"] = "BUILT_IN_ERROR"


class RunResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """What a run came to: `ok` with its output, as the text of `outputType`, or not with the error."""

    ok: bool
    id: str
    task_identifier: str
    output: str | None = None
    output_type: str | None = None
    error: ResultError | None = None


def json_response(
    body: Any,
    status_code: int = 200,
    after: BackgroundTask | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response[Any]:
    """Return the struct as JSON; `after` runs once it has been sent."""
    return Response(
        msgspec.json.encode(body),
        media_type="application/json",
        status_code=status_code,
        headers=headers,
        background=after,
    )


def run_details(run: Run, root: Run | None, parent: Run | None, children: Sequence[Run]) -> RunDetails:
    """Return the run with its relatives."""
    snapshot, error = run.snapshot, run.error
    return RunDetails(
        **_summary(run),
        related_runs=RelatedRuns(
            root=None if root is None else RunSummary(**_summary(root)),
            parent=None if parent is None else RunSummary(**_summary(parent)),
            children=tuple(RunSummary(**_summary(child)) for child in children),
        ),
        attempt_count=run.attempt_count,
        payload=value_of(snapshot.payload, snapshot.payload_type),
        output=value_of(run.output, run.output_type),
        error=None if error is None else RunFailure(error.message, error.name, error.stack_trace),
    )


def run_result(run: Run) -> RunResult:
    """Return what the run, which has ended, came to."""
    name = run.snapshot.task_id
    if run.status is RunStatus.COMPLETED:
        output = None if run.output is None else run.output.decode("utf-8", "replace")
        form = None if output is None else run.output_type
        return RunResult(ok=True, id=run.id, task_identifier=name, output=output, output_type=form)
    error = run.error or RunError(message=f"The run ended {run.status}.", name=run.status)
    told = ResultError(error.name or "Error", error.message, error.stack_trace or "")
    return RunResult(ok=False, id=run.id, task_identifier=name, error=told)


def listed_run(run: Run, environment: Environment) -> ListedRun:
    """Return the run as a list shows it."""
    return ListedRun(**_summary(run), env=EnvironmentName(environment.id, environment.name))


def value_of(document: bytes | None, form: str) -> msgspec.Raw | None:
    """Return the JSON that a document of the given format stands for; None where there is no document, as empty JSON is none."""
    match form:
        case _ if document is None:
            return None
        case str() if form in (JSON, SUPER_JSON) and not document:
            return None
        case str() if form == JSON:
            return msgspec.Raw(document)
        case str() if form == SUPER_JSON:
            return msgspec.Raw(super_json_value(document) or document)
        case _:
            return msgspec.Raw(msgspec.json.encode(document.decode("utf-8", "replace")))


def _summary(run: Run) -> dict[str, Any]:
    snapshot, status = run.snapshot, run.status
    return {
        "id": run.id,
        "status": status,
        "task_identifier": snapshot.task_id,
        "is_queued": status in _QUEUED,
        "is_executing": status in _EXECUTING,
        "is_waiting": status is RunStatus.WAITING,
        "is_completed": status in _COMPLETED,
        "is_success": status is RunStatus.COMPLETED,
        "is_failed": status in _FAILED,
        "is_cancelled": status is RunStatus.CANCELED,
        "is_test": snapshot.test,
        "created_at": snapshot.created_at,
        "updated_at": run.updated_at,
        "tags": snapshot.tags,
        "cost_in_cents": 0.0,
        "base_cost_in_cents": 0.0,
        "duration_ms": _duration_ms(run),
        "depth": snapshot.depth,
        "trigger_function": snapshot.trigger_function,
        "idempotency_key": snapshot.idempotency_key_shown or snapshot.idempotency_key,
        "version": run.version,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "delayed_until": snapshot.delayed_until,
        "ttl": None if snapshot.ttl_s is None else format_duration(snapshot.ttl_s),
        "expired_at": run.expired_at,
        "metadata": value_of(snapshot.metadata, snapshot.metadata_type),
        "batch_id": snapshot.batch_id,
    }


def _duration_ms(run: Run) -> int:
    """Return how long the run has executed; a run in execution was last changed when it was last seen."""
    if run.started_at is None:
        return 0
    return max(0, int(((run.finished_at or run.updated_at) - run.started_at).total_seconds() * 1000))
