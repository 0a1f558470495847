"""Acting on downstream systems and taking it back: ledger, push, rollback, connectors, sandbox.

Here belongs what sends, verifies and reverses decisions. Not here: deciding (models), judging data (data_checks),
anything of Dagster.
"""
