"""Tenants, keys, flags, tasks and runs."""

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = """
CREATE TABLE organizations (
    id text PRIMARY KEY,
    name text NOT NULL,
    feature_flags jsonb,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE projects (
    id text PRIMARY KEY,
    organization_id text NOT NULL REFERENCES organizations (id),
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX projects_organization_id_idx ON projects (organization_id);

CREATE TABLE environments (
    id text PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects (id),
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (project_id, name)
);

CREATE TABLE api_keys (
    id text PRIMARY KEY,
    environment_id text NOT NULL REFERENCES environments (id),
    prefix text NOT NULL,
    key_hash bytea NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz,
    last_used_at timestamptz
);
CREATE INDEX api_keys_environment_id_idx ON api_keys (environment_id);

CREATE TABLE feature_flags (
    name text PRIMARY KEY,
    value jsonb NOT NULL
);

CREATE TABLE tasks (
    id text PRIMARY KEY,
    module text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE runs (
    id text PRIMARY KEY,
    organization_id text NOT NULL,
    environment_id text NOT NULL,
    task_id text NOT NULL,
    status text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    delayed_until timestamptz,
    due_at timestamptz,
    expires_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz,
    expired_at timestamptz,
    attempt_count integer NOT NULL DEFAULT 0,
    job_id bigint,
    payload bytea NOT NULL,
    payload_type text NOT NULL,
    context bytea,
    metadata bytea,
    metadata_type text NOT NULL,
    tags text[] NOT NULL,
    output bytea,
    output_type text NOT NULL DEFAULT 'application/json',
    error bytea,
    version text,
    idempotency_key text,
    idempotency_key_shown text,
    idempotency_expires_at timestamptz,
    idempotency_slot bytea,
    request_key text,
    request_key_expires_at timestamptz,
    request_slot bytea,
    debounce_key text,
    debounce_delay interval,
    debounce_mode text,
    debounce_max_delay interval,
    debounce_slot bytea,
    ttl_s bigint,
    queue text,
    concurrency_key text,
    priority integer NOT NULL,
    machine text,
    region text,
    max_attempts integer,
    max_duration_s bigint,
    test boolean NOT NULL,
    lock_to_version text,
    external_deployment_id text,
    bulk_action_id text,
    parent_run_id text,
    root_run_id text,
    depth integer NOT NULL,
    resume_parent_on_completion boolean NOT NULL,
    batch_id text,
    trigger_function text NOT NULL,
    trigger_source text,
    replayed_from text,
    traceparent text,
    tracestate text
) WITH (fillfactor = 85);
CREATE UNIQUE INDEX runs_idempotency_slot_key ON runs (environment_id, idempotency_slot) WHERE idempotency_slot IS NOT NULL;
CREATE UNIQUE INDEX runs_request_slot_key ON runs (environment_id, request_slot) WHERE request_slot IS NOT NULL;
CREATE UNIQUE INDEX runs_debounce_slot_key ON runs (environment_id, debounce_slot) WHERE debounce_slot IS NOT NULL;
CREATE INDEX runs_list_idx ON runs (environment_id, created_at, id);
CREATE INDEX runs_children_idx ON runs (parent_run_id) WHERE parent_run_id IS NOT NULL;
CREATE INDEX runs_batch_idx ON runs (batch_id) WHERE batch_id IS NOT NULL;
CREATE INDEX runs_due_idx ON runs (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX runs_expiry_idx ON runs (expires_at) WHERE expires_at IS NOT NULL;
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(STATEMENTS, execution_options={"no_parameters": True})
