"""What every room may use and no room owns.

Belongs here: errors in words, YAML that people write, the one locked DuckDB session, progress of long ranges. Does not: anything
that knows a workflow, a model or a system.
"""
