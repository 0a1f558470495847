"""Learners, their evaluation and promotion gate, the model card, and the two policies with their arms.

Belongs here: pure functions of tables and arrays, and the registry. Does not: Dagster, files, clocks, downstream systems.
"""

import os

# Set before LightGBM loads: OpenMP threads that spin while they wait slow a small training tenfold on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
