"""Putting the parts together: the assets, jobs, sensors and schedules of given workflows, and the resources.

Belongs here: `build`, and `loaded`, which shows a bad workflow beside the good ones. Does not: which workflows there are
(``orchestration.definitions`` takes all that are found).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import dagster as dg

from assets import broken
from assets.resources import resources
from orchestration.automation import unattended
from orchestration.jobs import assets_of, jobs_of
from pipeline import workflow_validation
from pipeline.workflow import Loaded, Workflow

log = logging.getLogger(__name__)


def build(
    workflows: Sequence[Workflow], now: str | None = None, wrong: Mapping[str, Sequence[str]] | None = None
) -> dg.Definitions:
    """Definitions of the given workflows; ``now`` fixes the clock. ``wrong``: what is wrong with folders, by name; each gets an
    asset that says so."""
    jobs = [j for w in workflows for j in jobs_of(w)]
    starters = [u.definition for u in unattended(workflows, jobs)]
    return dg.Definitions(
        assets=[
            *(a for w in workflows for a in assets_of(w)),
            *(broken.build(name, said) for name, said in (wrong or {}).items()),
        ],
        jobs=jobs,
        sensors=[s for s in starters if isinstance(s, dg.SensorDefinition)],
        schedules=[s for s in starters if isinstance(s, dg.ScheduleDefinition)],
        resources=resources(now),
    )


def loaded(found: Loaded) -> dg.Definitions:
    """Definitions of every workflow that can run, and of each that cannot, or has a mistake, the asset [workflow, broken].

    A mistake that only a run would meet leaves the workflow's other assets where they are.
    """
    wrong = {name: said.splitlines() for name, said in found.refused.items()}
    good = []
    for workflow in found.workflows:
        try:
            build([workflow])
        except Exception as error:
            # whatever Dagster refuses of one must not take the others with it
            wrong[workflow.name] = [f"{workflow.folder}: Dagster refuses it: {error}"]
            continue
        good.append(workflow)
        if said := workflow_validation.problems(workflow, thorough=False):
            wrong[workflow.name] = said
    for name, lines in wrong.items():
        log.warning("the workflow %s has a mistake: %s", name, "; ".join(lines))
    return build(good, wrong=wrong)
