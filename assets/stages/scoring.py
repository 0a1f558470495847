"""Stage 6, ``scores``: what a model, or the rule, says of each entity of a day.

Belongs here: the asset. Does not: the steps of a bad day (``assets.deciding``) or the learners (``models.learners``).
"""

import dagster as dg

from assets import deciding
from assets.resources import ClockResource, LakeResource, RegistryResource, preview
from assets.stages.common import days, folded, stage
from assets.workflow import Workflow


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, scores]."""

    @stage(
        workflow,
        "scores",
        deps=["features"],
        description="Scores by the champion; on a bad day by the previous champion or the rule, or none. The step is recorded.",
        kinds={"lightgbm", "deltalake"},
        checks={"step": (False, "The champion scored the day")},
    )
    def scores(
        context: dg.AssetExecutionContext, lake: LakeResource, registry: RegistryResource, clock: ClockResource
    ) -> dg.MaterializeResult:
        steps = {}
        last = None
        for day in days(context):
            scored = deciding.score_day(workflow, lake.lake, registry.registry, day, now=clock.now())
            deciding.write_scores(workflow, lake.lake, day, scored)
            steps[day] = (scored.step == "champion", f"{scored.step}: {'; '.join(scored.reasons) or 'as it should be'}")
            context.add_asset_metadata(
                {"dagster/partition_row_count": scored.table.num_rows, "step": scored.step},
                partition_key=day.isoformat(),
            )
            last = scored
        assert last is not None, "a run always has a day"
        version = last.model
        return dg.MaterializeResult(
            metadata={
                "step": last.step,
                "why": "; ".join(last.reasons) or "the champion scored",
                "first rows": preview(last.table.slice(0, 5)),
                **(
                    {"model": dg.MetadataValue.url(registry.version_url(version.name, version.number))}
                    if version
                    else {}
                ),
            },
            check_results=[folded("step", steps, warn=True)],
        )

    return scores
