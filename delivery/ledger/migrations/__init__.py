"""The ledger's schema, step by step (Alembic). A released migration is never edited: add one and set ``database.HEAD``."""
