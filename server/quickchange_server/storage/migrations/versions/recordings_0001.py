"""The tables of recordings."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "recordings_0001"
down_revision = None
branch_labels = ("recordings",)
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "recordings",
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("adapter", sa.String(256), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "adapter", name="pk_recordings"),
    )
    op.create_table(
        "recorded_requests",
        sa.Column("id", _ID, autoincrement=True, nullable=False),
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("adapter", sa.String(256), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("prompt", sa.LargeBinary(), nullable=False),
        sa.Column("output", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_recorded_requests"),
    )
    op.create_index(
        "ix_recorded_requests_tenant_adapter_id",
        "recorded_requests",
        ["tenant", "adapter", "id"],
        unique=False,
    )


def downgrade() -> None:
    op.drop_table("recorded_requests")
    op.drop_table("recordings")
