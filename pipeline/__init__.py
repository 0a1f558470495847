"""What the stages of a workflow do, without Dagster.

Belongs here: reading workflows, the lake, and everything between a landed file and a decision that is sent. Does not: Dagster's
assets (``assets``), algorithms that know no workflow (``models``, ``data_checks``), sending (``delivery``).
"""
