"""What Dagster loads: every workflow's assets and jobs, what may start them, and the resources.

Belongs here: the one object that workspace.yaml points to. Does not: any part of it.
"""

from __future__ import annotations

from orchestration.assembly import loaded
from orchestration.cli import sandbox
from pipeline.workflow import load_all

sandbox.environment()
defs = loaded(load_all())
