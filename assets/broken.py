"""What stands in the place of a workflow that cannot be read, or has a mistake in it: an asset that says so and fails.

Belongs here: the asset. Does not: what is wrong (``pipeline.workflow`` and ``pipeline.workflow_validation`` say it), or which workflows there are.
"""

import re
from collections.abc import Sequence

import dagster as dg

STAGE = "broken"


def build(name: str, wrong: Sequence[str]) -> dg.AssetsDefinition:
    """The asset [name, broken] with a sentence for each thing that is wrong; materialising it fails with them.

    ``name``: the folder's; what Dagster allows in no name becomes ``_``.
    """
    group = re.sub(r"[^A-Za-z0-9_]", "_", name)
    said = "\n".join(wrong)

    @dg.asset(
        key=dg.AssetKey([group, STAGE]),
        group_name=group,
        description="This workflow has a mistake. Mend it, ask `signalbox validate`, then reload the code location.\n\n"
        + "\n\n".join(wrong),
    )
    def broken() -> None:
        raise dg.Failure(description=said, allow_retries=False)

    return broken
