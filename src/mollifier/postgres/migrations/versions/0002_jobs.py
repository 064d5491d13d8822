"""Procrastinate's tables and functions, which hold the jobs that execute runs.

The installed release knows its newest schema only. The name of its newest own migration is kept, so that `migrate.py` can apply
those that later releases bring.
"""

import sqlalchemy as sa
from alembic import op
from procrastinate.schema import SchemaManager

from mollifier.postgres.job_schema import newest_script

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    connection = op.get_bind()
    connection.exec_driver_sql(SchemaManager.get_schema(), execution_options={"no_parameters": True})
    op.create_table("job_schema", sa.Column("applied", sa.Text, nullable=False))
    connection.execute(sa.text("INSERT INTO job_schema (applied) VALUES (:newest)"), {"newest": newest_script()})
    # Runs recorded before there were jobs are executed too.
    connection.execute(
        sa.text(
            """
            INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args)
            SELECT coalesce(queue, 'default'), 'mollifier.execute', priority, jsonb_build_object('run_id', id)
            FROM runs WHERE status = 'QUEUED' ORDER BY created_at, id
            """
        )
    )
