"""Migrations: the tables' history, run in this process from wherever the package is installed.

Alembic finds its scripts as files beside this module. The sum of all migrations equals
`store/schema.py`; a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from flopledger_collector.errors import SchemaOutdated

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine


def migrate(engine: Engine) -> None:
    """Bring a database to the newest version, in one transaction; nothing to do is no error."""
    config = _config()
    newest = ScriptDirectory.from_config(config).get_current_head()
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current == newest:
            return
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise SchemaOutdated(
                f"database: its schema version is {current}, this program knows up to {newest}; "
                "run a program at least as new as the one that wrote it"
            ) from error


def step_back(engine: Engine, version: str) -> None:
    """Take a database back to an older version, before an older program is started with it.

    What the older tables cannot hold leaves the projections; the journal keeps all of it.
    """
    config = _config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, version)


def current_version(connection: Connection) -> str | None:
    """The version a database is at; None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def _config() -> Config:
    config = Config()
    # Percent signs are interpolated by the configuration parser underneath.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
