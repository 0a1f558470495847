"""Alembic's entry: migrates over the connection and in the transaction that ``delivery.ledger.database.migrate`` opened."""

from __future__ import annotations

from alembic import context

from delivery.ledger.schema import VERSION_TABLE, metadata

connection = context.config.attributes["connection"]
# SQLite can change a schema in a transaction too; Alembic does not assume so by itself.
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
