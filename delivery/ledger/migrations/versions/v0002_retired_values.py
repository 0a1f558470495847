"""Acknowledged values whose deliveries a retention removed, sealed by its event."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "retired_values",
        sa.Column("system", sa.String(), nullable=False),
        sa.Column("entity", sa.String(length=32), nullable=False),
        sa.Column("target", sa.String(length=32), nullable=True),
        sa.Column("value", sa.BigInteger(), nullable=True),
        sa.Column("verified_at", sa.DateTime(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["sequence"], ["batches.sequence"]),
        sa.PrimaryKeyConstraint("system", "entity"),
    )
