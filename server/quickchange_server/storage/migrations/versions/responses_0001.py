"""The table of stored responses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "responses_0001"
down_revision = None
branch_labels = ("responses",)
depends_on = None


def upgrade() -> None:
    op.create_table(
        "stored_responses",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("key", sa.String(256), nullable=False),
        sa.Column("previous", sa.String(64), nullable=True),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_stored_responses"),
    )
    op.create_index(
        "ix_stored_responses_tenant_expires_bytes",
        "stored_responses",
        ["tenant", "expires", "bytes"],
        unique=False,
    )
    op.create_index("ix_stored_responses_expires", "stored_responses", ["expires"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_stored_responses_expires", table_name="stored_responses")
    op.drop_index("ix_stored_responses_tenant_expires_bytes", table_name="stored_responses")
    op.drop_table("stored_responses")
