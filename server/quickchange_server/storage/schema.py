"""Migration of a database to this version's tables. Safe while other replicas do the same."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from quickchange_server.errors import SettingError

OLDEST_POSTGRES = (13,)  # has pg_xact_status with xid8
_LOCK = 0x717569636B  # advisory lock's key: "quick" in ASCII


def upgrade(engine: Engine, *, create: bool = True) -> None:
    """Apply missing migrations in one transaction, one replica at a time.

    `engine`: from `engines.writing`. Raises SettingError if the database has migrations that this
    version does not know, none though they are not to be made (`create`), or PostgreSQL is too old.
    """
    config = Config()
    config.set_main_option("script_location", "quickchange_server.storage:migrations")
    scripts = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            _refuse_older_server(connection)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        applied = set(MigrationContext.configure(connection).get_current_heads())
        if not applied and not create:
            raise SettingError(
                f"database: {engine.url.render_as_string(hide_password=True)} holds nothing of "
                "Quickchange's; see that it is the right one",
                param="database",
            )
        _refuse_newer(applied, scripts)
        config.attributes["connection"] = connection
        command.upgrade(config, "heads")


def _refuse_older_server(connection: Connection) -> None:
    version = connection.dialect.server_version_info or ()
    if version < OLDEST_POSTGRES:
        shown = ".".join(str(part) for part in version)
        raise SettingError(
            f"database: PostgreSQL {shown} is too old; use {OLDEST_POSTGRES[0]} or newer",
            param="database",
        )


def _refuse_newer(applied: set[str], scripts: ScriptDirectory) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    if unknown := sorted(applied - known):
        raise SettingError(
            f"database: its tables are newer than this version of Quickchange (migration "
            f"{', '.join(unknown)}); start the version that made them, or name another database",
            param="database",
        )
