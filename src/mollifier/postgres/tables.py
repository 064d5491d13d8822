"""The tables, as SQLAlchemy Core sees them. The migrations make them; a test compares the two.

Who writes what in `runs`: creation writes a row once, with its keys and its job; the run's own API (cancel, tags, metadata,
reschedule) changes the columns it names; everything about execution belongs to the worker that holds the run's job.

Bytes columns hold what callers sent: text and jsonb refuse NUL, and jsonb rewrites numbers. `runs` has no foreign keys: each
insert would lock the row of its environment, and a burst is thousands of inserts into one environment.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, INT4MULTIRANGE, JSONB
from sqlalchemy.types import TypeEngine

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ix": "%(table_name)s_%(column_0_name)s_idx",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
    }
)


def _required(name: str, kind: TypeEngine[Any], default: str | None = None) -> Column[Any]:
    return Column(name, kind, nullable=False, server_default=None if default is None else text(default))


def _optional(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=True)


def _moment() -> DateTime:
    return DateTime(timezone=True)


def _json() -> JSONB:
    return JSONB(none_as_null=True)


organizations = Table(
    "organizations",
    metadata,
    Column("id", Text, primary_key=True),
    _required("name", Text()),
    _optional("feature_flags", _json()),
    _required("created_at", _moment(), "now()"),
)

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False, index=True),
    _required("name", Text()),
    _required("created_at", _moment(), "now()"),
)

environments = Table(
    "environments",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    _required("name", Text()),
    _required("created_at", _moment(), "now()"),
    UniqueConstraint("project_id", "name"),
)

# The key itself is shown once and never stored; `prefix` is as much of it as tells keys apart in a list.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("environment_id", Text, ForeignKey("environments.id"), nullable=False, index=True),
    _required("prefix", Text()),
    Column("key_hash", LargeBinary, nullable=False, unique=True),
    _required("created_at", _moment(), "now()"),
    _optional("revoked_at", _moment()),
    _optional("last_used_at", _moment()),
    # Set when the key is rotated: it works until then.
    _optional("expires_at", _moment()),
)

feature_flags = Table(
    "feature_flags",
    metadata,
    Column("name", Text, primary_key=True),
    _required("value", JSONB()),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", Text, primary_key=True),
    _required("module", Text()),
    _required("recorded_at", _moment(), "now()"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    _required("organization_id", Text()),
    _required("environment_id", Text()),
    _required("task_id", Text()),
    # Its life
    _required("status", Text()),
    _required("created_at", _moment()),
    _required("updated_at", _moment()),
    _optional("delayed_until", _moment()),
    # What upkeep looks for: set while the run is delayed, and while it may expire. No index is on `status`, so that starting and
    # finishing an ordinary run touches no index.
    _optional("due_at", _moment()),
    _optional("expires_at", _moment()),
    _optional("started_at", _moment()),
    _optional("finished_at", _moment()),
    _optional("expired_at", _moment()),
    _required("attempt_count", Integer(), "0"),
    # How many of the changes made while it was held are in it; see `carry_over`
    _required("patch_count", Integer(), "0"),
    # The job that executes it, while it executes: who else writes the outcome has lost the run.
    _optional("job_id", BigInteger()),
    # What was sent
    _required("payload", LargeBinary()),
    _required("payload_type", Text()),
    _optional("context", LargeBinary()),
    _optional("metadata", LargeBinary()),
    _required("metadata_type", Text()),
    _required("tags", ARRAY(Text)),
    # What came of it; the error is an encoded RunError
    _optional("output", LargeBinary()),
    _required("output_type", Text(), "'application/json'"),
    _optional("error", LargeBinary()),
    _optional("version", Text()),
    # Its keys; see slots.py
    _optional("idempotency_key", Text()),
    _optional("idempotency_key_shown", Text()),
    _optional("idempotency_expires_at", _moment()),
    _optional("idempotency_slot", LargeBinary()),
    _optional("request_key", Text()),
    _optional("request_key_expires_at", _moment()),
    _optional("request_slot", LargeBinary()),
    _optional("debounce_key", Text()),
    _optional("debounce_delay", Interval()),
    _optional("debounce_mode", Text()),
    _optional("debounce_max_delay", Interval()),
    _optional("debounce_slot", LargeBinary()),
    # Options
    _optional("ttl_s", BigInteger()),
    _optional("queue", Text()),
    _optional("concurrency_key", Text()),
    _required("priority", Integer()),
    _optional("machine", Text()),
    _optional("region", Text()),
    _optional("max_attempts", Integer()),
    _optional("max_duration_s", BigInteger()),
    _required("test", Boolean()),
    _optional("lock_to_version", Text()),
    _optional("external_deployment_id", Text()),
    _optional("bulk_action_id", Text()),
    # Its relatives and its origin
    _optional("parent_run_id", Text()),
    _optional("root_run_id", Text()),
    _required("depth", Integer()),
    _required("resume_parent_on_completion", Boolean()),
    _optional("batch_id", Text()),
    _required("trigger_function", Text()),
    _optional("trigger_source", Text()),
    _optional("replayed_from", Text()),
    _optional("traceparent", Text()),
    _optional("tracestate", Text()),
    postgresql_with={"fillfactor": "85"},
)

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    _required("environment_id", Text()),
    _required("run_count", Integer()),
    # The indexes of the items that are there. Their runs have ids that follow from the batch's, but for those in `batch_runs`.
    _required("received", INT4MULTIRANGE(), "'{}'"),
    _required("created_at", _moment()),
    _required("updated_at", _moment()),
    _optional("idempotency_key", Text()),
    _optional("idempotency_expires_at", _moment()),
    _optional("idempotency_slot", LargeBinary()),
    _optional("request_key", Text()),
    _optional("request_key_expires_at", _moment()),
    _optional("request_slot", LargeBinary()),
    _optional("parent_run_id", Text()),
    _required("resume_parent_on_completion", Boolean()),
)

# The runs of items that a key answered: they have ids of their own.
batch_runs = Table(
    "batch_runs",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    _required("run_id", Text()),
)

# The slots are the last arbiters of races.
for _table, _slots in (
    (runs, ("idempotency_slot", "request_slot", "debounce_slot")),
    (batches, ("idempotency_slot", "request_slot")),
):
    for _slot in _slots:
        Index(
            f"{_table.name}_{_slot}_key",
            _table.c.environment_id,
            _table.c[_slot],
            unique=True,
            postgresql_where=_table.c[_slot].is_not(None),
        )
# The list, newest first; it is read backwards.
Index("runs_list_idx", runs.c.environment_id, runs.c.created_at, runs.c.id)
for _name, _column in (
    ("children", runs.c.parent_run_id),
    ("batch", runs.c.batch_id),
    ("due", runs.c.due_at),
    ("expiry", runs.c.expires_at),
):
    Index(f"runs_{_name}_idx", _column, postgresql_where=_column.is_not(None))
