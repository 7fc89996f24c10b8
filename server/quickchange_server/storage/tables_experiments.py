"""Tables of experiments: definitions, audit trail, exposures and outcomes."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from quickchange_server.storage.tables import METADATA

ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite autoincrements only INTEGER keys

EXPERIMENTS = Table(
    "experiments",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(256), nullable=False, unique=True),
    Column("version", Integer, nullable=False),
    Column("document", Text, nullable=False),  # the experiment as JSON
)

# Entries outlive their experiment.
EXPERIMENT_AUDIT = Table(
    "experiment_audit",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("experiment", String(32), nullable=False),
    Column("name", String(256), nullable=False, index=True),
    Column("at", Float(53), nullable=False),
    Column("tenant", String(256), nullable=False),
    Column("key", String(256)),
    Column("action", String(32), nullable=False),
    Column("before", Text),  # JSON
    Column("after", Text),
)

EXPERIMENT_EXPOSURES = Table(
    "experiment_exposures",
    METADATA,
    Column("completion", String(64), primary_key=True),
    Column("variant", String(64), primary_key=True),
    Column("experiment", String(32), nullable=False),
    Column("unit", String(64), nullable=False),  # hashed subject, or the completion if random
    Column("by", String(8), nullable=False),
    Column("counted", Boolean, nullable=False),
    Column("shadow", Boolean, nullable=False),
    Column("stretch", Integer, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("tenant", String(256), nullable=False),
    Column("ending", String(16), nullable=False),
    Column("seconds", Float(53), nullable=False),
    Column("first_token", Float(53)),
    Column("prompt_tokens", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("drafted", Integer, nullable=False),
    Column("accepted", Integer, nullable=False),
    Index(None, "experiment", "unit", "at"),
)

EXPERIMENT_OUTCOMES = Table(
    "experiment_outcomes",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("experiment", String(32), nullable=False),
    Column("name", String(64), nullable=False),
    Column("variant", String(64), nullable=False),
    Column("unit", String(64), nullable=False),
    Column("completion", String(64)),  # null: the outcome is the unit's
    Column("counted", Boolean, nullable=False),
    Column("value", Float(53)),  # a flag: 0 or 1
    Column("label", String(64)),
    Column("at", Float(53), nullable=False),
    Column("tenant", String(256), nullable=False),
    Column("idempotency_key", String(128)),
    UniqueConstraint("experiment", "tenant", "idempotency_key", "name"),
    Index(None, "experiment", "name", "variant", "unit"),
)
