"""A challenger in the shadow: what it would have decided beside what was, day by day.

Belongs here: the disagreement of two sets of scores through the same policy, its page and its table. Does not: scoring
(``pipeline.decisions.scoring``), or what a disagreement leads to (``pipeline.lifecycle.promotion``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.page import Table, Text
from common.page import page as html_page
from models import catalog
from pipeline import point_in_time
from pipeline.decisions import decide, scoring, tables
from pipeline.lake import Lake
from pipeline.workflow import Workflow

LARGEST = 10
ACTS = ("champion", "challenger")
"""The arms that are decided by scores."""


@dataclass(frozen=True)
class Disagreement:
    """How the challenger's decisions differ from the champion's on the same entities of one day.

    Counted over the arms that are decided by scores (champion, challenger); holdout and explore read none.
    """

    entities: int
    different: int
    by_arm: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """arm → entities, different."""
    by_level: Mapping[str, int] = field(default_factory=dict)
    """Priorities only: "the champion's → the challenger's" → how many entities."""
    moved: float | None = None
    """Money only: the sum of the absolute differences of ``after``, halved (what one has more another has less), as a share
    of the sum of ``before``."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Score column → mean absolute difference, over the rows that both have."""
    largest: tuple[Mapping[str, Any], ...] = ()
    """entity_id, arm, before, champion, challenger: the largest differences first, ties by name."""

    @property
    def share(self) -> float:
        """The share of entities decided differently; 0 where there is none."""
        return self.different / self.entities if self.entities else 0.0


def disagreement(
    workflow: Workflow, day: date, features: pa.Table, champion: pa.Table, challenger: pa.Table, drawn: pa.Table
) -> Disagreement:
    """Decide the day twice, by the champion's scores and by the challenger's, and compare: a pure function."""
    ours, _ = decide.decide(workflow, day, features, champion, drawn, "champion")
    theirs, _ = decide.decide(workflow, day, features, challenger, drawn, "champion")
    differences = _score_differences(champion, challenger)
    if ours.num_rows == 0:
        return Disagreement(0, 0, scores=differences)
    # both are sorted by entity, and are of the same entities
    table = ours.select(["entity_id", "arm", "before"]).append_column("champion", ours["after"])
    table = table.append_column("challenger", theirs["after"])
    table = table.filter(pc.is_in(table["arm"], value_set=pa.array(ACTS)))
    apart = pc.abs(pc.subtract(pc.fill_null(table["challenger"], 0), pc.fill_null(table["champion"], 0)))
    table = table.append_column("apart", apart)
    differ = table.filter(pc.greater(table["apart"], 0))
    counts = {r["arm"]: {"entities": r["count_all"], "different": 0} for r in _counted(table, ["arm"])}
    for row in _counted(differ, ["arm"]):
        counts[row["arm"]]["different"] = row["count_all"]
    levels = {}
    money = catalog.policy(workflow.policy.kind).money
    if not money:
        pairs = _counted(differ, ["champion", "challenger"])
        levels = {f"{r['champion']} → {r['challenger']}": r["count_all"] for r in pairs}
    whole, elsewhere = pc.sum(table["before"]).as_py() or 0, pc.sum(table["apart"]).as_py() or 0
    order = [("apart", "descending"), ("entity_id", "ascending")]
    return Disagreement(
        entities=table.num_rows,
        different=differ.num_rows,
        by_arm=counts,
        by_level=levels,
        moved=None if not money or not whole else elsewhere / 2 / whole,
        scores=differences,
        largest=tuple(differ.sort_by(order).slice(0, LARGEST).drop_columns(["apart"]).to_pylist()),
    )


def _counted(table: pa.Table, by: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.group_by(by).aggregate([([], "count_all")]).to_pylist()
    return sorted(found, key=lambda r: [str(r[k]) for k in by])


def _score_differences(champion: pa.Table, challenger: pa.Table) -> dict[str, float]:
    """By score column of both: the mean absolute difference over the rows of the same key; columns of floats only."""
    keys = [k for k in point_in_time.keys_of(champion.schema.names) if k in challenger.schema.names]
    if not keys or not champion.num_rows or not challenger.num_rows:
        return {}
    ours, theirs = (
        pc.binary_join_element_wise(*(t[k].cast(pa.string()).combine_chunks() for k in keys), "\0", null_handling="replace")
        for t in (champion, challenger)
    )  # fmt: skip
    place = pc.index_in(ours, value_set=theirs)
    left, right = champion.filter(pc.is_valid(place)), challenger.take(place.drop_null())
    found = {}
    for name in left.schema.names:
        if name in keys or name not in right.schema.names:
            continue
        pair = [t[name].combine_chunks() for t in (left, right)]
        if all(pa.types.is_list(one.type) for one in pair):
            pair = [pc.list_flatten(one) for one in pair]
        if any(not pa.types.is_floating(one.type) for one in pair) or len(pair[0]) != len(pair[1]):
            continue
        apart = np.abs(np.asarray(pair[0], np.float64) - np.asarray(pair[1], np.float64))
        apart = apart[np.isfinite(apart)]
        if len(apart):
            found[name] = float(apart.mean())
    return found


def of_day(workflow: Workflow, lake: Lake, day: date) -> Disagreement | None:
    """The disagreement of a day that is scored and decided, from what is stored; None where the challenger did not score."""
    (made,) = lake.read(workflow.table("scoring"), days=[day]).to_pylist()
    theirs = tables.challenger_scores(workflow, lake, day, made)
    if theirs is None:
        return None
    ours = tables.scores_of(workflow, lake, day, made)
    features = lake.read(workflow.table("features"), version=made["features_version"], days=[day])
    standing = tables.standing_at(workflow, lake, day, made.get("standing_version"))
    features = scoring.with_standing(workflow, features, standing)
    units = pc.unique(decide.of_policy(workflow, features)["unit"]).sort().to_pylist()
    drawn = decide.draw_arms(workflow, day, units, lake.read(workflow.table("arms")))
    return disagreement(workflow, day, features, ours, theirs, drawn)


def sentence(found: Disagreement) -> str:
    """One line for a log, a check or a table."""
    said = f"{found.different} of {found.entities} entities decided differently ({found.share:.1%})"
    return said if found.moved is None else f"{said}, {found.moved:.1%} of the money placed elsewhere"


_SHADOW = pa.schema(
    {
        "day": pa.date32(),
        "version": pa.int64(),
        "digest": pa.string(),
        "stage": pa.string(),
        "beside": pa.int64(),
        "scored": pa.bool_(),
        "reason": pa.string(),
        "entities": pa.int64(),
        "different": pa.int64(),
        "share_different": pa.float64(),
        "share_moved": pa.float64(),
        "by_arm": pa.string(),
        "by_level": pa.string(),
        "scores": pa.string(),
        "page": pa.string(),
        "text": pa.string(),
    }
)


def report(
    workflow: Workflow, lake: Lake, day: date, write: Callable[[str], str]
) -> tuple[dict[str, Any], Disagreement | None] | None:
    """Measure a day's challenger, write its page (``write`` gives the address) and its row of the table ``shadow``.

    Returns the row and the disagreement; None where the day has no challenger. Whatever the challenger's scores do to the
    comparison is written down as its failure.
    """
    (made,) = lake.read(workflow.table("scoring"), days=[day]).to_pylist()
    if made.get("challenger_version") is None:
        return None
    reason, found = made["challenger_reason"] or "", None
    comparable = "shadow" not in catalog.policy(workflow.policy.kind).absent
    if not comparable:
        reason = reason or catalog.why_not(workflow.policy.kind, "shadow")
    try:
        found = of_day(workflow, lake, day) if comparable else None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"its scores cannot be compared: {type(error).__name__}: {error}"
    row: dict[str, Any] = {
        "day": day, "version": made["challenger_version"], "digest": made["challenger_digest"],
        "stage": made["challenger_stage"], "beside": made["model_version"], "scored": found is not None, "reason": reason,
        "text": f"version {made['challenger_version']} could not be compared: {reason}",
    }  # fmt: skip
    if found is not None:
        row |= {
            "entities": found.entities, "different": found.different, "share_different": found.share,
            "share_moved": found.moved, "by_arm": json.dumps(found.by_arm, sort_keys=True),
            "by_level": json.dumps(found.by_level, sort_keys=True, ensure_ascii=False),
            "scores": json.dumps(found.scores, sort_keys=True), "text": sentence(found),
        }  # fmt: skip
        row["page"] = write(page(workflow, row, found))
    lake.replace_days(workflow.table("shadow"), pa.Table.from_pylist([row], schema=_SHADOW), [day])
    return row, found


def page(workflow: Workflow, row: Mapping[str, Any], found: Disagreement) -> str:
    """The report for people, one HTML page without scripts."""
    who = f"Version {row['version']} ({row['stage']}) beside version {row['beside']}"
    return html_page(
        f"{workflow.name}: in the shadow, {row['day']}",
        Text(
            [
                f"{who}: {sentence(found)}.",
                "Both are decided by the same policy, limits and arms; only the scores differ. Holdout and explore read no score.",
            ]
        ),
        Table(
            ("arm", "entities", "different", "share"),
            [
                ("", (arm, n["entities"], n["different"], f"{n['different'] / n['entities']:.1%}"))
                for arm, n in found.by_arm.items()
            ],
            title="By arm",
        ),
        Table(
            ("priorities", "entities"),
            [("", one) for one in found.by_level.items()],
            title="By priority: champion → challenger",
        ),
        Table(
            ("score", "difference"),
            [("", one) for one in found.scores.items()],
            title="Scores: mean absolute difference",
        ),
        Table(
            ("entity", "arm", "before", "champion", "challenger"),
            [("", tuple(one.values())) for one in found.largest],
            title="Largest differences",
        ),
    )
