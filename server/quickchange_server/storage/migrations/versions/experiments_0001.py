"""The tables of experiments, their audit trail, exposures and outcomes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "experiments_0001"
down_revision = None
branch_labels = ("experiments",)
depends_on = None


def upgrade() -> None:
    op.create_table(
        "experiment_audit",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("experiment", sa.String(32), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("key", sa.String(256), nullable=True),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("before", sa.Text(), nullable=True),
        sa.Column("after", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_experiment_audit"),
    )
    op.create_index("ix_experiment_audit_name", "experiment_audit", ["name"], unique=False)
    op.create_table(
        "experiment_exposures",
        sa.Column("completion", sa.String(64), nullable=False),
        sa.Column("variant", sa.String(64), nullable=False),
        sa.Column("experiment", sa.String(32), nullable=False),
        sa.Column("unit", sa.String(64), nullable=False),
        sa.Column("by", sa.String(8), nullable=False),
        sa.Column("counted", sa.Boolean(), nullable=False),
        sa.Column("shadow", sa.Boolean(), nullable=False),
        sa.Column("stretch", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("ending", sa.String(16), nullable=False),
        sa.Column("seconds", sa.Float(53), nullable=False),
        sa.Column("first_token", sa.Float(53), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("drafted", sa.Integer(), nullable=False),
        sa.Column("accepted", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("completion", "variant", name="pk_experiment_exposures"),
    )
    op.create_index(
        "ix_experiment_exposures_experiment_unit_at",
        "experiment_exposures",
        ["experiment", "unit", "at"],
        unique=False,
    )
    op.create_table(
        "experiment_outcomes",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("experiment", sa.String(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("variant", sa.String(64), nullable=False),
        sa.Column("unit", sa.String(64), nullable=False),
        sa.Column("completion", sa.String(64), nullable=True),
        sa.Column("counted", sa.Boolean(), nullable=False),
        sa.Column("value", sa.Float(53), nullable=True),
        sa.Column("label", sa.String(64), nullable=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("tenant", sa.String(256), nullable=False),
        sa.Column("idempotency_key", sa.String(128), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_experiment_outcomes"),
        sa.UniqueConstraint(
            "experiment",
            "tenant",
            "idempotency_key",
            "name",
            name="uq_experiment_outcomes_experiment_tenant_idempotency_key_name",
        ),
    )
    op.create_index(
        "ix_experiment_outcomes_experiment_name_variant_unit",
        "experiment_outcomes",
        ["experiment", "name", "variant", "unit"],
        unique=False,
    )
    op.create_table(
        "experiments",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_experiments"),
        sa.UniqueConstraint("name", name="uq_experiments_name"),
    )


def downgrade() -> None:
    op.drop_table("experiments")
    op.drop_index(
        "ix_experiment_outcomes_experiment_name_variant_unit", table_name="experiment_outcomes"
    )
    op.drop_table("experiment_outcomes")
    op.drop_index("ix_experiment_exposures_experiment_unit_at", table_name="experiment_exposures")
    op.drop_table("experiment_exposures")
    op.drop_index("ix_experiment_audit_name", table_name="experiment_audit")
    op.drop_table("experiment_audit")
