"""What Alembic runs: the migrations, on the connection that `migrate` handed over.

Never opens a connection of its own, so that migrations commit together with nothing else.
"""

from alembic import context

from flopledger_collector.store.schema import METADATA

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=METADATA)
context.run_migrations()
