"""Judging data and batches: contracts (Great Expectations), drift (Evidently), guardrails.

Belongs here: is this table what was promised, has it moved, may this batch be sent. Everything takes Arrow tables and
returns plain results and pages. Does not: reading the lake or Dagster's check results (``assets``), nor choosing
(``models``).
"""
