"""What Alembic runs: the connection comes from `migrate.py`, which holds the lock and the transaction."""

from __future__ import annotations

from alembic import context

from mollifier.postgres.migrate import VERSION_TABLE
from mollifier.postgres.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    on_version_apply=context.config.attributes["on_version_apply"],
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
