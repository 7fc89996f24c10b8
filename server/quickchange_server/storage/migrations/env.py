"""Alembic's environment: runs migrations on the given connection, in its transaction."""

from __future__ import annotations

from alembic import context

from quickchange_server.storage.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,  # SQLite too: all migrations or none
)
with context.begin_transaction():
    context.run_migrations()
