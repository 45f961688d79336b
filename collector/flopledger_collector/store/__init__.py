"""The database: tables, engine, migrations and the SQL over them, and nothing that decides.

SQLAlchemy is imported in this room only; SQL that only SQLite understands is in `sqlite.py` only.
What may be admitted, how a record is folded, and what a figure means is said elsewhere.
"""
