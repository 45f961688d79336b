"""How far each stream has accounted for each device, so that no minute is metered twice.

The table is a projection and begins empty: a rebuild fills it for what was journaled before.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "device_reach",
        sa.Column("stream_id", sa.Text(), nullable=False),
        sa.Column("device_key", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column(
            "end_boot_ms",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=False,
            autoincrement=False,
        ),
        sa.PrimaryKeyConstraint("stream_id", "device_key", "boot_id"),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
