"""Measurements behind the figures in docs/benchmarks.md; claims about speed live here and not in the tests.

Belongs here: scripts that print what they measured. Does not: anything that the product imports.
"""
