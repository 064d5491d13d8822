"""Runs that were held before they were created: how many of the changes made meanwhile are in them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("runs", sa.Column("patch_count", sa.Integer, nullable=False, server_default=sa.text("0")))
