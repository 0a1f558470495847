"""Learners, their evaluation and promotion gate, the model card, and the two policies with their arms.

Belongs here: pure functions of tables and arrays, and the registry. Does not: Dagster, files, clocks, downstream systems.
"""
