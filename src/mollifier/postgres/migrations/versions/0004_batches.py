"""Batches, and which runs stand for their items."""

from alembic import op

revision = "0004"
down_revision = "0003"

STATEMENTS = """
CREATE TABLE batches (
    id text PRIMARY KEY,
    environment_id text NOT NULL,
    run_count integer NOT NULL,
    received int4multirange NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    idempotency_key text,
    idempotency_expires_at timestamptz,
    idempotency_slot bytea,
    request_key text,
    request_key_expires_at timestamptz,
    request_slot bytea,
    parent_run_id text,
    resume_parent_on_completion boolean NOT NULL
);
CREATE UNIQUE INDEX batches_idempotency_slot_key ON batches (environment_id, idempotency_slot)
    WHERE idempotency_slot IS NOT NULL;
CREATE UNIQUE INDEX batches_request_slot_key ON batches (environment_id, request_slot) WHERE request_slot IS NOT NULL;

CREATE TABLE batch_runs (
    batch_id text REFERENCES batches (id),
    index integer,
    run_id text NOT NULL,
    PRIMARY KEY (batch_id, index)
);
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(STATEMENTS, execution_options={"no_parameters": True})
