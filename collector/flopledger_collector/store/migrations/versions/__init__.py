"""One file a migration, numbered in order; Alembic runs those a database does not have yet."""
