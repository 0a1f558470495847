"""Putting the parts together: the assets, jobs, sensors and schedules of given workflows, and the resources.

Belongs here: `build`. Does not: which workflows there are (``orchestration.definitions`` takes all that are shipped).
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from assets.resources import resources
from assets.workflow import Workflow
from orchestration.automation import unattended
from orchestration.jobs import assets_of, jobs_of


def build(workflows: Sequence[Workflow], now: str | None = None) -> dg.Definitions:
    """Definitions of the given workflows; ``now`` fixes the clock."""
    jobs = [j for w in workflows for j in jobs_of(w)]
    starters = [u.definition for u in unattended(workflows, jobs)]
    return dg.Definitions(
        assets=[a for w in workflows for a in assets_of(w)],
        jobs=jobs,
        sensors=[s for s in starters if isinstance(s, dg.SensorDefinition)],
        schedules=[s for s in starters if isinstance(s, dg.ScheduleDefinition)],
        resources=resources(now),
    )
