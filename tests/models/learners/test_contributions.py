"""Why a score: what moved it adds up to it, and what is said to decide does decide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from models import booster
from models.learners.duration import DurationRule
from models.learners.response import ResponseRule


@pytest.fixture(scope="module")
def tickets(queue: Any) -> tuple[Any, Any, pa.Table]:
    """A model, another one, and open tickets."""
    rows = queue.lake.read(queue.workflow.table("features"), days=[queue.last])
    return queue.fit(queue.last), queue.fit(queue.days[-4]), rows.filter(pc.field("moment") == "open").slice(0, 40)


@pytest.fixture(scope="module")
def lines(ads: Any) -> tuple[Any, pa.Table]:
    return ads.fit(ads.last), ads.lake.read(ads.workflow.table("features"), days=[ads.last])


def adds_up(head: booster.Head) -> None:
    assert head.baseline + sum(head.effects.values()) == pytest.approx(head.score, abs=1e-9)
    sizes = [abs(v) for v in head.effects.values()]
    assert sizes == sorted(sizes, reverse=True) and set(head.values) == set(head.effects)


def test_what_moved_a_score_adds_up_to_it(tickets, lines):
    model, other, rows = tickets
    averaged = replace(model, miss=[*model.miss, *other.miss])  # several members are averaged
    for one in (model, averaged):
        for i in range(5):
            for head in one.because(rows.slice(i, 1)).heads:
                adds_up(head)
    learned, features = lines
    for i in range(5):
        (head,) = learned.because(features.slice(i, 1)).heads
        adds_up(head)
        assert any(head.effects.values())


def test_a_category_is_told_by_its_name(tickets):
    model, _, rows = tickets
    row = rows.slice(0, 1)
    head = model.because(row).heads[0]
    assert head.values["team"] == row["team"][0].as_py()


def test_a_lines_level_is_its_parts_multiplied(lines):
    learned, features = lines
    scores = learned.score(features)
    for i in range(features.num_rows):
        row = features.slice(i, 1)
        because = learned.because(row)
        parts = because.parts
        assert parts["level"] == pytest.approx(scores["level"][i].as_py(), rel=1e-12)
        assert parts["elasticity"] == scores["elasticity"][i].as_py()
        lift = row["explore_multiplier_today"][0].as_py() ** min(max(parts["elasticity"], 0), 1)
        product = parts["trailing return"] * parts["usual spend"] * parts["correction"] * lift
        assert product == pytest.approx(parts["level"])
        assert "the line's own" in because.says


def test_a_line_never_seen_says_whose_elasticity_it_uses(lines):
    learned, features = lines
    row = features.slice(0, 1)
    at = row.schema.get_field_index("entity_id")
    stranger = row.set_column(at, "entity_id", pa.array(["a new line"]))
    assert learned.because(stranger).parts["elasticity is"] == "that of its group"
    lost = stranger.set_column(row.schema.get_field_index("segment"), "segment", pa.array(["nowhere"]))
    assert learned.because(lost).parts["elasticity is"] == "that of all lines"


@pytest.mark.parametrize("due", [True, False], ids=["due known", "no due time"])
@pytest.mark.parametrize("timed", [True, False], ids=["effort recorded", "effort not recorded"])
def test_the_index_rests_on_just_the_heads_that_say_so(tickets, due, timed):
    """A head is swapped for another model's: the index moves where the head decides, and nowhere else."""
    model, other, rows = tickets
    hours = pa.array([2.0 + n % 30 for n in range(rows.num_rows)] if due else [None] * rows.num_rows, pa.float64())
    rows = rows.set_column(rows.schema.get_field_index("hours_to_due"), "hours_to_due", hours)
    if not due:  # of a day's delay nearly all of these short tickets would be late, whatever they take
        model = replace(model, spec={**model.spec, "delay_hours": 0.5})
        # no ticket of this training lacked its due time, and such a row would get no score
        model = replace(model, encoding=replace(model.encoding, nulls=None))
    if not timed:
        model = replace(model, effort=None, effort_spread=None)
    heads = {h.name: h.decides for h in model.because(rows.slice(0, 1)).heads}
    for name in ("miss", "duration", "effort"):
        if name == "effort" and not timed:
            assert name not in heads
            continue
        swapped = replace(model, **{name: getattr(other, name)})
        index = ["p_miss_now", "p_miss_later", "effort_hours"]
        moved = not swapped.score(rows).select(index).equals(model.score(rows).select(index))
        assert moved is heads.get(name, False), name
    swapped = replace(model, miss=other.miss)
    assert not swapped.score(rows)["uncertainty"].equals(model.score(rows)["uncertainty"])
    assert "review line" in next(h for h in model.because(rows.slice(0, 1)).heads if h.name == "miss").rests


def test_one_row_at_a_time(tickets):
    model, _, rows = tickets
    with pytest.raises(ValueError, match="one row at a time, 2 were given"):
        model.because(rows.slice(0, 2))


def test_the_rules_say_what_they_went_by(ads, queue, lines, tickets):
    from pipeline.decisions import scoring

    for bench, kind, rows in ((ads, ResponseRule, lines[1]), (queue, DurationRule, tickets[2])):
        rule = scoring.fit_rule(bench.workflow, bench.lake, bench.last, None, None)
        assert isinstance(rule, kind)
        because = rule.because(rows.slice(0, 1))
        assert because.heads == () and because.parts and "No model scored" in because.says
        score = rule.score(rows.slice(0, 1)).to_pylist()[0]
        told = {k: v for k, v in because.parts.items() if k in score}
        assert told and all(score[k] == v for k, v in told.items())
