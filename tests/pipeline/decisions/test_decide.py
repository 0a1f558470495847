"""Deciding: the steps of a bad day, what a batch records, and the same decision again from its row alone."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import mlflow.store.db.utils
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from delivery.ledger import Ledger
from models.registry import CHAMPION, ModelUnreadable, Registry
from pipeline import dispatch
from pipeline.decisions import decide, scoring, tables
from pipeline.decisions import replay as replaying
from pipeline.decisions.replay import ReplayImpossible, replay
from pipeline.decisions.scoring import FeaturesMissing
from pipeline.lake import Lake, TableMissing, content_digest
from tests.support.aliases import promote
from tests.support.properties import examples


@pytest.fixture
def small(ads: Any, tmp_path: Path) -> Any:
    """``ad_budget`` alone, to write to."""
    return ads.copy(tmp_path / "small")


def spoil(registry: Registry, bench: Any, number: int, how: str) -> None:
    """Make one version unreadable."""
    found = registry.client.get_model_version(bench.workflow.name, str(number))
    model = registry.client.get_logged_model(str(found.source).removeprefix("models:/"))
    folder = Path(str(model.artifact_location).removeprefix("file://"))
    if how == "tampered":
        path = next(iter(sorted((folder / "artifacts" / "files").glob("*.txt"))))
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    elif how == "deleted":
        shutil.rmtree(folder)
    elif how == "flavour":
        text = (folder / "MLmodel").read_text()
        (folder / "MLmodel").write_text(text.replace("mlflow.pyfunc.loaders.code_model", "mlflow.sklearn"))
    elif how == "untagged":
        registry.client.delete_model_version_tag(bench.workflow.name, str(number), "signalbox.files")


def batch_row(bench: Any, day: date | None = None) -> dict[str, Any]:
    (row,) = bench.lake.read(bench.workflow.table("batches"), days=[day or bench.last]).to_pylist()
    return dict(row)


# --- the steps of a bad day -------------------------------------------------------------------------------------------


def test_on_a_good_day_the_champion_decides_and_every_row_says_why(bench: Any, registry: Registry) -> None:
    batch = bench.decide(registry, bench.last)
    row = batch_row(bench)
    assert (batch.step, row["step"], row["reasons"]) == ("champion", "champion", [])
    assert row["model_version"] == 2 and row["model_digest"] == registry.by_number(bench.workflow.name, 2).digest
    assert batch.changed == row["changed"] > 0
    assert batch.status in {"READY", "HELD"}
    decided = bench.decided(bench.last)
    assert len(decided) == row["rows"] and len({d["decision_id"] for d in decided}) == len(decided)
    assert all(d["reasons"] and all(d["reasons"]) for d in decided)
    assert all(d["arm"] and 0 < d["arm_probability"] <= 1 for d in decided)
    assert all(d["after"] == d["before"] for d in decided if d["arm"] == "holdout" or d["review"])
    recorded = ("features_version", "outcomes_version", "arms_version", "spec_digest", "code_digest", "code_commit")
    assert all(d[c] == row[c] is not None for d in decided for c in recorded)


@pytest.mark.parametrize("how", ["tampered", "deleted", "flavour", "untagged"])
def test_an_unreadable_champion_leaves_it_to_the_one_before(small: Any, registry: Registry, how: str) -> None:
    spoil(registry, small, 2, how)
    small.decide(registry, small.last)
    row = batch_row(small)
    assert row["step"] == "previous_champion" and row["model_version"] == 1
    assert len(row["reasons"]) == 1 and "champion (version 2) cannot be used" in row["reasons"][0]
    assert {d["step"] for d in small.decided(small.last)} == {"previous_champion"}


def test_with_both_unreadable_the_rule_decides(bench: Any, registry: Registry) -> None:
    spoil(registry, bench, 2, "tampered")
    spoil(registry, bench, 1, "deleted")
    batch = bench.decide(registry, bench.last)
    row = batch_row(bench)
    assert row["step"] == "rule" and row["model_version"] is None and row["model_digest"] is None
    assert [r.split(" cannot")[0] for r in row["reasons"]] == ["champion (version 2)", "previous_champion (version 1)"]
    assert batch.decisions.num_rows and row["status"] in {"READY", "HELD"}


def test_without_any_version_the_rule_decides(bench: Any, empty_registry: Registry) -> None:
    batch = bench.decide(empty_registry, bench.last)
    row = batch_row(bench)
    assert row["step"] == batch.step == "rule"
    assert "had passed its gate" in row["reasons"][0]


def test_a_model_that_does_not_know_the_days_columns_is_passed_over(small: Any, registry: Registry) -> None:
    """Features changed under a model: it cannot score, and the rule (which does not need the column) does."""
    features = small.lake.read(small.workflow.table("features"))
    shutil.rmtree(small.lake.uri(small.workflow.table("features")))
    small.lake.replace_days(
        small.workflow.table("features"), features.drop_columns(["against_campaign"]), list(small.days)
    )
    small.decide(registry, small.last)
    row = batch_row(small)
    assert row["step"] == "rule"
    assert len(row["reasons"]) == 2 and all("against_campaign" in r for r in row["reasons"])


@pytest.mark.parametrize("kind", ["no database", "not a database", "no server"])
def test_a_registry_that_cannot_be_reached_leaves_it_to_the_rule(
    small: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow.store.db.utils, "MAX_RETRY_COUNT", 1)  # MLflow's own waiting: 100 s
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "garbage.db").write_bytes(b"no database at all, but long enough to look like one" * 100)
    (tmp_path / "file").write_text("")
    uri = {
        "no database": f"sqlite:///{tmp_path}/file/mlflow.db",
        "not a database": f"sqlite:///{tmp_path}/garbage.db",
        "no server": "http://127.0.0.1:9",
    }[kind]
    small.decide(Registry(uri, (tmp_path / "a").as_uri()), small.last)
    row = batch_row(small)
    assert row["step"] == "rule"
    assert len(row["reasons"]) == 1 and "the registry cannot be read" in row["reasons"][0]


def test_a_registrys_password_stays_out_of_the_reasons(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    small.decide(Registry("http://someone:hunter2@127.0.0.1:9", (tmp_path / "a").as_uri()), small.last)
    row = batch_row(small)
    assert row["step"] == "rule" and row["reasons"]
    assert "hunter2" not in json.dumps(row, default=str)


def empty(bench: Any, day: date) -> None:
    """Take a day's features away."""
    features = bench.lake.read(bench.workflow.table("features"), days=[day])
    bench.lake.replace_days(bench.workflow.table("features"), features.slice(0, 0), [day])


def test_features_that_are_missing_before_the_deadline_are_waited_for(bench: Any, registry: Registry) -> None:
    empty(bench, bench.last)
    with pytest.raises(FeaturesMissing, match=rf"no features of {bench.last}; materialise \[{bench.workflow.name}"):
        bench.decide(registry, bench.last)
    with pytest.raises(FeaturesMissing):
        bench.decide(registry, bench.last, now=bench.workflow.deadline_of(bench.last))
    assert not bench.lake.exists(bench.workflow.table("batches"))


def test_features_that_are_missing_after_the_deadline_change_nothing(bench: Any, registry: Registry) -> None:
    empty(bench, bench.last)
    batch = bench.decide(registry, bench.last, now=bench.workflow.deadline_of(bench.last) + timedelta(minutes=1))
    row = batch_row(bench)
    assert row["step"] == "no_change" and "not there by the deadline 06:00 UTC" in row["reasons"][0]
    assert row["late"] is True and row["changed"] == 0 and batch.status == "READY"
    assert bench.decided(bench.last) == []


def test_the_very_first_day_can_be_missed_too(small: Any, registry: Registry) -> None:
    """No table but the events was ever written."""
    for table in ("features", "outcomes"):
        shutil.rmtree(small.lake.uri(small.workflow.table(table)))
    small.decide(registry, small.last, now=small.workflow.deadline_of(small.last) + timedelta(minutes=1))
    row = batch_row(small)
    assert row["step"] == "no_change" and row["rows"] == 0 and row["features_version"] is None


def test_after_the_deadline_no_model_is_tried(bench: Any, registry: Registry) -> None:
    batch = bench.decide(registry, bench.last, now=bench.workflow.deadline_of(bench.last) + timedelta(seconds=1))
    row = batch_row(bench)
    assert row["step"] == batch.step == "rule" and row["late"] is True and row["model_version"] is None
    assert len(row["reasons"]) == 1 and "deadline 06:00 UTC had passed" in row["reasons"][0]
    assert batch.decisions.num_rows > 0


@pytest.mark.parametrize(
    ("clock", "days_on", "step"),
    [
        (time(4), 1, "champion"),
        (time(6), 1, "champion"),
        (time(6, 0, 1), 1, "rule"),
        (time(23, 59), 1, "rule"),
        # the day on which D takes effect is over: a backfill, for which there is no deadline
        (time(0), 2, "champion"),
        (time(12), 40, "champion"),
    ],
)
def test_the_deadline_holds_while_the_day_can_still_take_effect(
    small: Any, registry: Registry, clock: time, days_on: int, step: str
) -> None:
    now = datetime.combine(small.last + timedelta(days=days_on), clock)
    assert scoring.score_day(small.workflow, small.lake, registry, small.last, now=now).step == step


def test_a_backfill_without_features_asks_for_them(small: Any, registry: Registry) -> None:
    empty(small, small.last)
    with pytest.raises(FeaturesMissing):
        scoring.score_day(
            small.workflow, small.lake, registry, small.last, now=small.morning(small.last + timedelta(days=9))
        )


def test_a_backfill_takes_the_model_of_its_time(small: Any, registry: Registry) -> None:
    for days_ago, version, step in ((0, 2, "champion"), (1, 2, "champion"), (2, 1, "champion"), (6, None, "rule")):
        day = small.last - timedelta(days=days_ago)
        small.decide(registry, day, now=small.morning(small.last))
        row = batch_row(small, day)
        assert (row["model_version"], row["step"]) == (version, step)


def test_a_rule_with_nothing_to_go_by_changes_nothing(queue: Any, tmp_path: Path, empty_registry: Registry) -> None:
    bench = queue.copy(tmp_path / "young")
    outcomes = bench.workflow.table("outcomes")
    bench.lake.replace_days(outcomes, bench.lake.read(outcomes).slice(0, 0), list(bench.days))
    batch = bench.decide(empty_registry, bench.last)
    row = batch_row(bench)
    assert row["step"] == "no_change" and "the rule has nothing to go by" in row["reasons"][-1]
    assert batch.decisions.num_rows > 0 and batch.changed == 0
    assert all(d["after"] == d["before"] and d["reasons"] for d in bench.decided(bench.last))


def test_a_day_scored_again_with_less_leaves_no_old_scores_behind(small: Any, registry: Registry) -> None:
    small.decide(registry, small.last)
    empty(small, small.last)
    small.decide(registry, small.last, now=small.workflow.deadline_of(small.last) + timedelta(minutes=1))
    assert small.lake.read(small.workflow.table("scores"), days=[small.last]).num_rows == 0
    assert small.decided(small.last) == [] and batch_row(small)["step"] == "no_change"


def test_a_day_that_was_never_scored_says_so(small: Any) -> None:
    with pytest.raises(TableMissing):
        decide.decide_day(small.workflow, small.lake, small.last)


# --- the batch --------------------------------------------------------------------------------------------------------


def test_deciding_a_day_again_gives_the_same_decisions(bench: Any, registry: Registry) -> None:
    first = bench.decide(registry, bench.last)
    again = bench.decide(registry, bench.last)
    assert content_digest(first.decisions) == content_digest(again.decisions)
    assert again.batch_id == first.batch_id and again.digest == first.digest
    assert len(bench.decided(bench.last)) == first.decisions.num_rows


def test_the_digest_of_a_batch_covers_its_decisions_and_what_they_were_made_from(
    small: Any, registry: Registry
) -> None:
    one = small.decide(registry, small.last)
    small.build([small.last])  # the same bytes, another version
    two = small.decide(registry, small.last)
    assert content_digest(one.decisions) == content_digest(two.decisions) and one.digest != two.digest


def test_units_keep_their_arm_while_others_join(small: Any, registry: Registry) -> None:
    days = small.days[-3:]
    units = []
    for day in days:
        small.decide(registry, day)
        units.append({d["unit"]: d["arm"] for d in small.decided(day)})
    assert units[0] == units[1] == units[2]
    features = small.lake.read(small.workflow.table("features"), days=[days[-1]])
    at = features.schema.get_field_index("campaign")
    renamed = pc.if_else(pc.equal(features["entity_id"], features["entity_id"][0]), "newcomer", features["campaign"])
    small.lake.replace_days(small.workflow.table("features"), features.set_column(at, "campaign", renamed), [days[-1]])
    small.decide(registry, days[-1])
    after = {d["unit"]: d["arm"] for d in small.decided(days[-1])}
    assert after.pop("newcomer") in small.workflow.arms.shares
    assert after == units[0]
    for row in small.decided(days[-1]):
        assert replaying.replay_row(row, small.lake, registry).equal, "drawn as it was: one after the other"


def test_largest_changes_come_first() -> None:
    table = pa.table({"entity_id": ["a", "b", "c", "d"], "before": [10, 10, None, 10], "after": [11, 3, 2, 3]})
    found = tables.largest_changes(table, 3)
    assert found["entity_id"].to_pylist() == ["b", "d", "c"]


FEATURES = st.lists(
    st.tuples(
        st.integers(0, 2**40),  # budget, micros
        st.sampled_from("pqrs"),  # campaign
        st.sampled_from([0.8, 1.0, 1.2]),  # today's multiplier
        st.lists(st.floats(0, 1e6), min_size=3, max_size=3),  # values on the curve
        st.booleans(),  # has a score
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=FEATURES, step=st.sampled_from(tables.STEPS), shift=st.integers(0, 60))
def test_money_is_conserved_in_every_arm_and_the_holdout_is_left_alone(
    ads: Any, rows: list[Any], step: str, shift: int
) -> None:
    workflow, day = ads.workflow, ads.last + timedelta(days=shift)
    before = [r[0] for r in rows]
    names = [f"line {n}" for n in range(len(rows))]
    features = pa.table(
        {
            "entity_id": names,
            "campaign": [r[1] for r in rows],
            "budget_micros": pa.array(before, pa.int64()),
            "explore_multiplier_today": [r[2] for r in rows],
            "budget_age": pa.array([0] * len(rows), pa.int64()),
        }
    )
    scored = [n for n, r in enumerate(rows) if r[4] and r[0] > 0 and step != "no_change"]
    scores = pa.table(
        {
            "entity_id": pa.array([names[n] for n in scored], pa.string()),
            "spends": pa.array([[int(before[n] * 0.7), before[n], int(before[n] * 1.3)] for n in scored],
                               pa.list_(pa.int64())),
            "values": pa.array([rows[n][3] for n in scored], pa.list_(pa.float64())),
        }
    )  # fmt: skip
    units = sorted({r[1] for r in rows})
    drawn = decide.draw_arms(workflow, day, units, None)
    decisions, _ = decide.decide(workflow, day, features, scores, drawn, step)
    assert decisions["entity_id"].to_pylist() == sorted(n for n, b in zip(names, before, strict=True) if b > 0)
    arm_of = dict(zip(drawn["unit"].to_pylist(), drawn["arm"].to_pylist(), strict=True))
    pools: dict[str, int] = {}
    for row in decisions.to_pylist():
        assert row["arm"] == arm_of[row["unit"]] and row["reasons"]
        assert row["changed"] == (row["after"] != row["before"]) and row["after"] >= 0
        if row["arm"] == "holdout" or step == "no_change":
            assert row["after"] == row["before"]
        pools[row["arm"]] = pools.get(row["arm"], 0) + row["after"] - row["before"]
    assert set(pools.values()) <= {0}
    other, _ = decide.decide(workflow, day, features.take(pa.array(np.arange(len(rows))[::-1])), scores, drawn, step)
    assert content_digest(other) == content_digest(decisions), "the order of rows decides nothing"


# --- replay -----------------------------------------------------------------------------------------------------------


def live_on(bench: Any, registry: Registry) -> None:
    """Days pass: later files, a backfill that rewrites the day's features, another champion, another workflow.yaml."""
    later = [bench.last + timedelta(days=n) for n in (1,)]
    bench.land(later)
    events = bench.lake.read(bench.workflow.table("events"), days=[bench.last])
    bench.lake.replace_days(
        bench.workflow.table("events"), events.slice(0, events.num_rows - events.num_rows // 3), [bench.last]
    )
    bench.build([bench.last, *later])
    promote(registry, registry.by_number(bench.workflow.name, 1))
    other = replace(
        bench, workflow=bench.workflow.model_copy(update={"arms": bench.workflow.arms.model_copy(update={"epoch": 29})})
    )
    for day in (bench.last, *later):
        other.decide(registry, day, now=other.morning(later[-1]))


@pytest.mark.parametrize("step", ["champion", "previous_champion", "rule", "no_change"])
def test_a_decision_is_made_again_from_its_row_alone(bench: Any, registry: Registry, step: str) -> None:
    now = None
    if step == "previous_champion":
        spoil(registry, bench, 2, "tampered")
    elif step == "rule":
        now = bench.workflow.deadline_of(bench.last) + timedelta(hours=1)
    elif step == "no_change":
        outcomes = bench.workflow.table("outcomes")
        if bench.workflow.name == "ad_budget":
            pytest.skip("the budget's rule learns nothing, so that it always has something to go by")
        bench.lake.replace_days(outcomes, bench.lake.read(outcomes).slice(0, 0), list(bench.days))
        spoil(registry, bench, 2, "tampered")
        spoil(registry, bench, 1, "tampered")
    batch = bench.decide(registry, bench.last, now)
    assert batch.step == step
    rows = bench.decided(bench.last)
    features = content_digest(bench.lake.read(bench.workflow.table("features"), days=[bench.last]))
    live_on(bench, registry)
    assert content_digest(bench.lake.read(bench.workflow.table("features"), days=[bench.last])) != features
    assert bench.decided(bench.last) != rows
    changed = [r for r in rows if r["changed"]]
    for row in [*changed[:2], rows[0], rows[-1]]:
        again = replaying.replay_row(row, bench.lake, registry)
        assert again.equal and again.same_code, again.as_dict()
        assert again.recorded == {c: row[c] for c in tables.DECISIONS.names}
        assert again.as_dict()["equal to the bit"] is True


def test_a_recorded_decision_is_found_by_its_id(small: Any, registry: Registry) -> None:
    small.decide(registry, small.last)
    row = small.decided(small.last)[0]
    assert replay(small.workflow.name, small.lake, registry, row["decision_id"]).equal


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("after", 1),
        ("before", 1),
        ("arm_probability", 0.123),
        ("reasons", ["because"]),
        ("expected_gain", 1e-9),
        ("changed", None),
        ("unit", "another"),
    ],
)
def test_a_changed_record_does_not_pass_for_the_decision(
    small: Any, registry: Registry, column: str, value: Any
) -> None:
    small.decide(registry, small.last)
    row = next(r for r in small.decided(small.last) if r["changed"])
    again = replaying.replay_row({**row, column: value}, small.lake, registry)
    assert not again.equal
    assert again.as_dict()["equal to the bit"] is False and again.as_dict()["differs in"] == column


def test_code_that_changed_since_is_told(small: Any, registry: Registry) -> None:
    small.decide(registry, small.last)
    row = {**small.decided(small.last)[0], "code_digest": "other"}
    again = replaying.replay_row(row, small.lake, registry)
    assert again.equal and not again.same_code


def _cut(lake: Lake, table: str) -> None:
    shutil.rmtree(lake.uri(table))


def _vacuumed(lake: Lake, table: str) -> None:
    for file in Path(lake.uri(table)).rglob("*.parquet"):
        file.unlink()


@pytest.mark.parametrize("table", ["features", "arms", "specs", "outcomes"])
@pytest.mark.parametrize("lose", [_cut, _vacuumed])
def test_a_table_that_retention_has_cut_is_named(
    small: Any, registry: Registry, table: str, lose: Callable[[Lake, str], None]
) -> None:
    late = small.workflow.deadline_of(small.last) + timedelta(hours=1)
    small.decide(registry, small.last, now=late)  # by the rule: it reads all of them
    row = small.decided(small.last)[0]
    lose(small.lake, small.workflow.table(table))
    with pytest.raises(ReplayImpossible, match=f"ad_budget.*{table}"):
        replaying.replay_row(row, small.lake, registry)


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [("features_version", 999, "999"), ("arms_version", 999, "999"), ("spec_digest", "0" * 64, "000000")],
)
def test_a_version_that_is_gone_is_named(small: Any, registry: Registry, column: str, value: Any, why: str) -> None:
    small.decide(registry, small.last)
    row = {**small.decided(small.last)[0], column: value}
    with pytest.raises(ReplayImpossible, match=why):
        replaying.replay_row(row, small.lake, registry)


def test_a_decision_that_was_never_recorded_is_not_replayed(small: Any, registry: Registry) -> None:
    with pytest.raises(ReplayImpossible, match="ad_budget"):
        replay("ad_budget", small.lake, registry, "nobody")
    small.decide(registry, small.last)
    with pytest.raises(ReplayImpossible, match="'nobody'"):
        replay("ad_budget", small.lake, registry, "nobody")


def test_a_model_that_is_gone_or_changed_is_named(small: Any, registry: Registry) -> None:
    small.decide(registry, small.last)
    row = small.decided(small.last)[0]
    with pytest.raises(ReplayImpossible, match="version 2 is not the one that decided"):
        replaying.replay_row({**row, "model_digest": "0" * 64}, small.lake, registry)
    spoil(registry, small, 2, "tampered")
    scoring._model.cache_clear()
    with pytest.raises(ModelUnreadable, match=r"'ad_budget' version 2: file .*differs"):
        replaying.replay_row(row, small.lake, registry)
    registry.client.delete_model_version("ad_budget", "2")
    with pytest.raises(ReplayImpossible, match="'ad_budget' has no version 2"):
        replaying.replay_row(row, small.lake, registry)
    assert registry.by_alias("ad_budget", CHAMPION) is None


# --- scores and their record ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process died here."""


class Dying(Lake):
    """A lake whose process dies before a write to a table."""

    def __init__(self, root: str, before: str) -> None:
        super().__init__(root)
        object.__setattr__(self, "before", before)

    def replace_days(self, table: str, data: pa.Table, days: Sequence[date]) -> int:
        if table.endswith(f"/{self.before}"):  # type: ignore[attr-defined]
            raise Killed
        return super().replace_days(table, data, days)


def scored(bench: Any, registry: Registry, hour: int = 4, **more: Any) -> scoring.Scored:
    now = bench.morning(bench.last, hour)
    return scoring.score_day(bench.workflow, bench.lake, registry, bench.last, now=now, **more)


@pytest.mark.parametrize("table", ["scores", "scoring"])
def test_a_run_killed_between_scores_and_their_record_decides_nothing_of_the_day(
    bench: Any, registry: Registry, table: str
) -> None:
    by_model, by_rule = scored(bench, registry), scored(bench, registry, hour=7)
    assert (by_model.step, by_rule.step) == ("champion", "rule")
    scoring.write_scores(bench.workflow, bench.lake, bench.last, by_model)
    good = decide.decide_day(bench.workflow, bench.lake, bench.last)
    with pytest.raises(Killed):
        scoring.write_scores(bench.workflow, Dying(bench.lake.root, table), bench.last, by_rule)
    again = decide.decide_day(bench.workflow, bench.lake, bench.last)
    assert again.batch_id == good.batch_id and again.decisions.equals(good.decisions)
    recorded = tables.recorded_scores(bench.workflow, bench.lake, [bench.last])
    kept = recorded.drop_columns(["day", "scoring_id"]).select(by_model.table.schema.names)
    keys = [(k, "ascending") for k in ("entity_id", "moment") if k in kept.schema.names]
    assert kept.sort_by(keys).equals(by_model.table.sort_by(keys).cast(kept.schema))
    decide.write_batch(bench.workflow, bench.lake, bench.last, again, decided_at=bench.morning(bench.last), run_id="r")
    for row in bench.decided(bench.last)[:10]:
        assert replaying.replay_row(row, bench.lake, registry).equal


def test_of_two_runs_at_once_the_record_and_its_scores_are_of_one(bench: Any, registry: Registry) -> None:
    """Whatever order their commits fall in: the second writer's scores stand, the first one's record comes last."""
    by_model, by_rule = scored(bench, registry), scored(bench, registry, hour=7)
    workflow, day = bench.workflow, bench.last

    class Slow(Lake):
        def replace_days(self, table: str, data: pa.Table, days: Sequence[date]) -> int:
            if table.endswith("/scoring"):
                scoring.write_scores(workflow, Lake(self.root), day, by_rule)
            return super().replace_days(table, data, days)

    scoring.write_scores(workflow, Slow(bench.lake.root), day, by_model)
    batch = decide.decide_day(workflow, bench.lake, day)
    assert batch.step == "champion" and batch.record["model_version"] == 2
    decide.write_batch(workflow, bench.lake, day, batch, decided_at=bench.morning(day), run_id="r")
    assert all(replaying.replay_row(row, bench.lake, registry).equal for row in bench.decided(day)[:10])


def test_of_runs_at_once_in_threads_the_record_and_its_scores_are_of_one(small: Any, registry: Registry) -> None:
    both = {made.step: made for made in (scored(small, registry), scored(small, registry, hour=7))}

    def write(step: str) -> None:
        for _ in range(4):
            scoring.write_scores(small.workflow, small.lake, small.last, both[step])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, [*both, *both]))
    (made,) = small.lake.read(small.workflow.table("scoring"), days=[small.last]).to_pylist()
    read = tables.scores_of(small.workflow, small.lake, small.last, made)
    want = both[made["step"]].table
    assert read.sort_by("entity_id").equals(want.sort_by("entity_id").cast(read.schema))


def test_scores_from_before_they_were_named_are_read_as_they_stand(bench: Any, registry: Registry) -> None:
    good = bench.decide(registry, bench.last)
    table = bench.workflow.table("scoring")
    rows = bench.lake.read(table).drop_columns(["scoring_id", "scores_version", "shadow_version", "standing_version"])
    shutil.rmtree(bench.lake.uri(table))
    bench.lake.replace_days(table, rows, [bench.last])
    again = decide.decide_day(bench.workflow, bench.lake, bench.last)
    assert again.batch_id == good.batch_id and again.decisions.equals(good.decisions)
    assert tables.recorded_scores(bench.workflow, bench.lake, [bench.last]).num_rows > 0


# --- arms -------------------------------------------------------------------------------------------------------------


def test_days_that_draw_at_once_put_each_unit_in_one_arm(small: Any) -> None:
    workflow, lake = small.workflow, small.lake
    first = workflow.start + timedelta(days=1)
    days = [first + timedelta(days=n) for n in range(6)]
    spread = {d: [f"unit {i}" for i in range(4 + 5 * n)] for n, d in enumerate(days)}
    start = threading.Barrier(len(days))

    def draw(day: date) -> dict[str, str]:
        units = spread[day]
        features = pa.table({"entity_id": units, "campaign": units, "budget_micros": [1_000_000] * len(units)})
        start.wait()
        version, drawn = decide._arms(workflow, lake, day, features)
        kept = lake.read(workflow.table("arms"), version=version)
        mine = dict(zip(drawn["unit"].to_pylist(), drawn["arm"].to_pylist(), strict=True))
        named = dict(zip(kept["unit"].to_pylist(), kept["arm"].to_pylist(), strict=True))
        assert mine.items() <= named.items(), "the version that the day names holds other arms than it acted on"
        return mine

    with ThreadPoolExecutor(len(days)) as pool:
        found = list(pool.map(draw, days))
    stands = lake.read(workflow.table("arms")).to_pylist()
    table = {row["unit"]: row["arm"] for row in stands}
    assert len(stands) == len(table) == len(spread[days[-1]])
    for mine in found:
        assert mine.items() <= table.items(), "a unit was in two arms of one epoch"


# --- scores that are no numbers ---------------------------------------------------------------------------------------


class Spoilt:
    """A learner some of whose scores are no numbers."""

    def __init__(self, inner: Any, value: float, column: str, only: int | None) -> None:
        self.inner, self.value, self.column, self.only = inner, value, column, only

    def score(self, rows: pa.Table) -> pa.Table:
        table = self.inner.score(rows)
        values = table[self.column].to_pylist()
        which = range(len(values)) if self.only is None else [self.only]
        for i in which:
            values[i] = [self.value] * len(values[i]) if isinstance(values[i], list) else self.value
        column = pa.array(values, table.schema.field(self.column).type)
        return table.set_column(table.schema.get_field_index(self.column), self.column, column)

    def unread(self, rows: pa.Table) -> Any:
        return self.inner.unread(rows)


def spoil_scores(
    monkeypatch: pytest.MonkeyPatch, bench: Any, value: float, versions: set[int], column: str, only: int | None = None
) -> None:
    honest = scoring.read_model

    def read(workflow: Any, registry: Registry, version: Any) -> Any:
        model = honest(workflow, registry, version)
        return Spoilt(model, value, column, only) if version.number in versions else model

    monkeypatch.setattr(scoring, "read_model", read)


COLUMNS = {"ad_budget": ("values", "level"), "ticket_priority": ("p_miss_now", "effort_hours")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_champion_without_usable_numbers_leaves_it_to_the_next_step(
    bench: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch, value: float, which: int
) -> None:
    column = COLUMNS[bench.workflow.name][which]
    spoil_scores(monkeypatch, bench, value, {2}, column)
    made = scored(bench, registry)
    assert made.step == "previous_champion" and made.model is not None and made.model.number == 1
    assert len(made.reasons) == 1 and "champion (version 2)" in made.reasons[0]
    assert f"of {column} are NaN or infinite" in made.reasons[0]
    spoil_scores(monkeypatch, bench, value, {1}, column)
    made = scored(bench, registry)
    assert made.step == "rule" and len(made.reasons) == 2


def test_a_rule_without_usable_numbers_changes_nothing(
    bench: Any, empty_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, column = scoring.fit_rule, COLUMNS[bench.workflow.name][0]
    monkeypatch.setattr(scoring, "fit_rule", lambda *given: Spoilt(honest(*given), float("nan"), column, None))
    batch = bench.decide(empty_registry, bench.last)
    assert batch.step == "no_change" and batch.changed == 0 and batch.decisions.num_rows
    assert "the rule's scores cannot be used" in batch.reasons[-1] and column in batch.reasons[-1]


def test_columns_that_may_be_empty_are_no_fault(
    bench: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where too few days calibrated an interval there is none."""
    column = "value_low" if bench.workflow.name == "ad_budget" else "hours_low"
    spoil_scores(monkeypatch, bench, None, {2}, column)  # type: ignore[arg-type]
    made = scored(bench, registry)
    assert made.step == "champion" and made.table[column].null_count == made.table.num_rows


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "https://reader:hunter2@store.example/adv_{day}.csv.gz?sig=hunter2",
        "https://reader:hunter2@store.example/adv_{day}.csv.gz#hunter2",
        "https://hunter2@store.example/adv_{day}.csv.gz",
        "https://reader:SE/hunter2@store.example/adv_{day}.csv.gz",
        "https://reader:SE@hunter2@store.example/adv_{day}.csv.gz",
        "zip://*.csv::https://reader:hunter2@store.example/adv_{day}.zip?sig=hunter2",
        "s3://key:hunter2@bucket/folder@v1/adv_{day}.csv.gz",
    ],
)
def test_an_addresss_secret_stays_out_of_the_recorded_spec(small: Any, registry: Registry, address: str) -> None:
    source = small.workflow.sources["export"].model_copy(update={"files": address})
    there = replace(small, workflow=small.workflow.model_copy(update={"sources": {"export": source}}))
    there.decide(registry, there.last)
    for file in Path(there.lake.root).rglob("*"):
        if file.is_file():
            assert b"hunter2" not in file.read_bytes(), file
    assert "hunter2" not in there.lake.read(there.workflow.table("specs"))["said"].to_pylist()[0]
    row = next(r for r in there.decided(there.last) if r["changed"])
    said = replaying.spec_of(there.workflow.name, there.lake, row["spec_digest"])
    assert "adv_{day}" in said.sources["export"].files
    assert replaying.replay_row(row, there.lake, registry).equal


def test_a_spec_without_secrets_keeps_its_text_and_its_digest(bench: Any) -> None:
    said, digest = decide.said_by(bench.workflow)
    assert said == bench.workflow.model_dump_json(exclude={"folder"})
    assert digest == decide.record_spec(bench.workflow, bench.lake)


# --- what stands ------------------------------------------------------------------------------------------------------


def proofs(*rows: tuple[str, int, int, str, str, date, datetime]) -> pa.Table:
    """entity, value, prior, batch, kind, day, verified."""
    names = ["entity_id", "value", "prior", "batch_id", "kind", "day", "verified_at"]
    table = pa.Table.from_pylist([dict(zip(names, r, strict=True)) for r in rows])
    return table.append_column("sequence", pa.array(range(len(rows)), pa.int64()))


class Said:
    """A ledger that says what was proven, of the time that it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def proven(self, workflow: str, since: datetime, until: datetime) -> pa.Table:
        at = pc.field("verified_at")
        return self.table.filter((at > pc.scalar(since)) & (at <= pc.scalar(until)))

    def promotions(self, workflow: str) -> list[Any]:
        return []

    def events(self, kind: str, workflow: str) -> list[Any]:
        return []


def test_what_stood_before_a_day_is_what_others_proved_last_else_what_its_own_first_delivery_found(small: Any) -> None:
    day, other = small.last, small.last - timedelta(days=1)
    at = [small.morning(day, hour) for hour in range(24)]
    book = Said(
        proofs(
            ("late", 7, 5, "y", "decision", other, at[1]),
            ("late", 8, 7, "x", "decision", day, at[5]),
            ("taken back", 9, 1, "x", "decision", day, at[5]),
            ("taken back", 1, 9, "x-rollback", "rollback", day, at[6]),
            ("own", 4, 3, "x", "decision", day, at[5]),
            ("own", 6, 4, "x2", "decision", day, at[7]),
            ("too late", 2, 1, "z", "rollback", other, at[9]),
            ("too early", 2, 1, "z", "rollback", other, at[0] - timedelta(hours=1)),
        )
    )
    found = scoring.standing_of(small.workflow, book, day, at[8])  # type: ignore[arg-type]
    stood = {r["entity_id"]: (r["value"], r["batch_id"], r["verified_at"]) for r in found.to_pylist()}
    assert stood == {"late": (7, "y", at[1]), "taken back": (1, "x-rollback", at[6]), "own": (3, "x", at[5])}


def test_where_the_day_shows_no_budget_what_was_proven_since_it_last_did_stands(ads: Any) -> None:
    """A line without impressions has no row of the day that would show what was set for it meanwhile."""
    day = ads.last
    at = [ads.morning(day - timedelta(days=n), 5) for n in range(4)]  # deliveries of the batches of day - n
    batch = [day - timedelta(days=n) for n in range(4)]
    book = Said(
        proofs(
            ("three ago", 1, 9, "d3", "decision", batch[3], at[3]),
            ("two ago", 2, 9, "d2", "decision", batch[2], at[2]),
            ("three ago", 3, 1, "d2", "decision", batch[2], at[2]),
            ("of the day", 4, 9, "d2", "decision", batch[2], at[2]),
            ("one ago", 5, 9, "d2", "decision", batch[2], at[2]),
            ("three ago", 6, 3, "d0-rb", "rollback", batch[1], ads.morning(day, 1)),
        )
    )
    ages = {"three ago": 3, "two ago": 2, "of the day": 0, "one ago": 1, "never set": None}
    rows = pa.table({"entity_id": list(ages), "budget_age": pa.array(ages.values(), pa.int64())})
    until = ads.morning(day, 4)
    found = scoring.standing_of(ads.workflow, book, day, until, rows)  # type: ignore[arg-type]
    assert {r["entity_id"]: r["value"] for r in found.to_pylist()} == {"three ago": 6, "two ago": 2}
    book.table = book.table.slice(0, 5)
    found = scoring.standing_of(ads.workflow, book, day, until, rows)  # type: ignore[arg-type]
    assert {r["entity_id"]: r["value"] for r in found.to_pylist()} == {"three ago": 3, "two ago": 2}
    plain = scoring.standing_of(ads.workflow, book, day, until)  # type: ignore[arg-type]
    assert not plain.num_rows, "nothing was proven since the day ended"


def moved_since(bench: Any, registry: Registry) -> tuple[str, int, Said]:
    """An entity that the champion decides on, the value that a rollback put there at 02:00, and the ledger that says so."""
    batch = bench.decide(registry, bench.last)
    entity = next(r for r in batch.decisions.to_pylist() if r["changed"])
    value = entity["before"] * 2 if bench.workflow.name == "ad_budget" else 1 + entity["before"] % 5
    at = bench.morning(bench.last, 2)
    other = bench.last - timedelta(days=1)
    return entity["entity_id"], value, Said(proofs((entity["entity_id"], value, 1, "y-rb", "rollback", other, at)))


def test_a_day_starts_from_what_stands_and_is_replayed_from_it(bench: Any, registry: Registry) -> None:
    entity, value, book = moved_since(bench, registry)
    features = bench.lake.version(bench.workflow.table("features"))
    before = {r["entity_id"]: r["before"] for r in bench.decided(bench.last)}
    plain = batch_row(bench)
    scoring.write_scores(bench.workflow, bench.lake, bench.last, scored(bench, registry, ledger=book))
    batch = decide.decide_day(bench.workflow, bench.lake, bench.last)
    assert batch.record["standing_version"] is not None and batch.batch_id != plain["batch_id"]
    assert plain["standing_version"] is None and batch.record["features_version"] == features
    assert {r["entity_id"]: r["before"] for r in batch.decisions.to_pylist()} == before | {entity: value}
    if bench.workflow.name == "ad_budget":
        scores = bench.lake.read("ad_budget/scores", days=[bench.last]).to_pylist()
        (spends,) = [r["spends"] for r in scores if r["entity_id"] == entity]
        assert spends[len(spends) // 2] == value, "the curve lies around what stands"
    decide.write_batch(bench.workflow, bench.lake, bench.last, batch, decided_at=bench.morning(bench.last), run_id="r")
    rows = bench.decided(bench.last)
    live_on(bench, registry)
    for row in [r for r in rows if r["entity_id"] == entity] + rows[:3]:
        assert replaying.replay_row(row, bench.lake, registry).equal
    _cut(bench.lake, bench.workflow.table("standing"))
    with pytest.raises(ReplayImpossible, match="standing"):
        replaying.replay_row(rows[0], bench.lake, registry)


def test_deciding_again_from_the_same_standing_names_the_same_version(bench: Any, registry: Registry) -> None:
    _, _, book = moved_since(bench, registry)
    ids = []
    for _ in range(2):
        scoring.write_scores(bench.workflow, bench.lake, bench.last, scored(bench, registry, ledger=book))
        ids.append(decide.decide_day(bench.workflow, bench.lake, bench.last).batch_id)
    assert ids[0] == ids[1]


def test_a_backfill_sees_what_stood_when_its_day_would_have_been_decided(bench: Any, registry: Registry) -> None:
    entity, value, book = moved_since(bench, registry)
    later = bench.morning(bench.last + timedelta(days=3))
    extra = proofs((entity, value + 1, value, "z-rb", "rollback", bench.last, later - timedelta(hours=2)))
    book.table = pa.concat_tables([book.table, extra])
    made = scoring.score_day(bench.workflow, bench.lake, registry, bench.last, now=later, ledger=book)  # type: ignore[arg-type]
    assert made.standing["value"].to_pylist() == [value], "a value of days later was seen"


def test_only_the_moment_that_is_decided_on_takes_what_stands(queue: Any) -> None:
    features = queue.lake.read(queue.workflow.table("features"), days=[queue.last])
    chosen = decide.of_policy(queue.workflow, features).to_pylist()[0]
    stands = {"entity_id": [chosen["entity_id"]], "value": [77], "batch_id": ["b"], "verified_at": [None]}
    moved = scoring.with_standing(queue.workflow, features, pa.table(stands, schema=tables.STANDING))
    mine = [r for r in moved.to_pylist() if r["entity_id"] == chosen["entity_id"]]
    assert {r["moment"]: r["priority"] for r in mine}["open"] == 77
    was = {r["moment"]: r["priority"] for r in features.to_pylist() if r["entity_id"] == chosen["entity_id"]}
    assert all(r["priority"] == was[r["moment"]] for r in mine if r["moment"] != "open")
    others = [r for r in features.to_pylist() if r["entity_id"] != chosen["entity_id"]]
    assert [r for r in moved.to_pylist() if r["entity_id"] != chosen["entity_id"]] == others


# --- the ledger first, then the lake ----------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.db", key=b"k" * 32) as opened:
        yield opened


@pytest.mark.parametrize("killed_before", ["decisions", "batches"])
def test_a_kill_between_ledger_and_lake_is_made_good_from_the_ledger(
    bench: Any, registry: Registry, book: Ledger, killed_before: str
) -> None:
    w, lake, day, now = bench.workflow, bench.lake, bench.last, bench.morning(bench.last)
    bench.decide(empty_of(registry, bench), day)  # what stood in the lake before
    scoring.write_scores(w, lake, day, scored(bench, registry))
    batch = decide.decide_day(w, lake, day)
    assert decide.complete_lake(w, lake, book, day) is None, "the ledger knows nothing of the day"
    dispatch.record(w, book, day, batch, decided_at=now, run_id="r")
    with pytest.raises(Killed):
        decide.write_batch(w, Dying(lake.root, killed_before), day, batch, decided_at=now, run_id="r")
    assert batch_row(bench)["batch_id"] != batch.batch_id
    assert decide.complete_lake(w, lake, book, day) == batch.batch_id
    tables = {t: lake.read(w.table(t), days=[day]) for t in ("decisions", "batches")}
    assert decide.complete_lake(w, lake, book, day) is None
    decide.write_batch(w, lake, day, batch, decided_at=now, run_id="r")
    for name, table in tables.items():
        want = lake.read(w.table(name), days=[day])
        key = "decision_id" if name == "decisions" else "batch_id"
        for column in want.schema.names:
            found, wanted = (one.sort_by(key)[column].to_pylist() for one in (table, want))
            if column in ("certificates", "findings"):
                found, wanted = ([json.loads(text) for text in texts] for texts in (found, wanted))
            assert found == wanted, (name, column)
    assert all(replaying.replay_row(row, lake, registry).equal for row in bench.decided(day)[:5])


def empty_of(registry: Registry, bench: Any) -> Registry:
    """A registry that knows no model, for a batch by the rule."""
    return replace(registry, uri=f"sqlite:///{bench.root}/none.db")


def test_a_newer_generation_of_a_batch_names_its_decisions_as_the_ledger_does(bench: Any, registry: Registry) -> None:
    batch = bench.decide(registry, bench.last)
    first, second = (
        decide.with_record(bench.workflow, bench.last, replace(batch, batch_id=batch.batch_id + suffix))
        for suffix in ("", ".2")
    )
    ids = [one["decision_id"].to_pylist() for one in (first, second)]
    assert ids[1] == [f"{i}.2" for i in ids[0]] and second["batch_id"][0].as_py().endswith(".2")


# --- values that are missing for the first time -----------------------------------------------------------------------


def test_a_row_with_a_value_that_was_never_missing_keeps_what_stands_and_is_named(
    queue: Any, tmp_path: Path, registry: Registry
) -> None:
    """LightGBM would read it as 0; the rest of the day is decided as ever, and the row is replayed as it was."""
    bench = queue.copy(tmp_path / "queue")
    table, name = bench.workflow.table("features"), bench.workflow.name
    assert "updates" not in scoring.read_model(bench.workflow, registry, registry.by_number(name, 2)).encoding.nulls
    bench.decide(registry, bench.last)
    moved = [d["entity_id"] for d in bench.decided(bench.last) if d["changed"]]
    gone, rows = moved[:3], bench.lake.read(table, days=[bench.last])
    here = pc.and_(pc.is_in(rows["entity_id"], value_set=pa.array(gone)), pc.equal(rows["moment"], "open"))
    empty = pc.if_else(here, pa.scalar(None, rows["updates"].type), rows["updates"])
    place = rows.schema.get_field_index("updates")
    bench.lake.replace_days(table, rows.set_column(place, "updates", empty), [bench.last])
    scored = scoring.score_day(bench.workflow, bench.lake, registry, bench.last, now=bench.morning(bench.last))
    assert scored.step == "champion" and {c: sorted(n) for c, n in scored.unread.items()} == {"updates": sorted(gone)}
    said = "3 rows have no score: updates is missing there, and never was in the training of version 2"
    assert scored.reasons == (said,)
    batch = bench.decide(registry, bench.last)
    decided = {d["entity_id"]: d for d in bench.decided(bench.last)}
    assert batch.step == "champion" and batch.changed and batch.reasons == (said,)
    assert all(decided[e]["before"] == decided[e]["after"] and decided[e]["expected_gain"] is None for e in gone)
    for one in (gone[0], next(d["entity_id"] for d in decided.values() if d["changed"])):
        assert replay(name, bench.lake, registry, decided[one]["decision_id"]).equal


def without_value(bench: Any, column: str, gone: Sequence[str] | None) -> None:
    """The newest day's ``column`` is empty for these entities, or for all (None)."""
    table = bench.workflow.table("features")
    rows = bench.lake.read(table, days=[bench.last])
    here = pa.array([gone is None or e in gone for e in rows["entity_id"].to_pylist()])
    empty = pc.if_else(here, pa.scalar(None, rows[column].type), rows[column])
    bench.lake.replace_days(table, rows.set_column(rows.schema.get_field_index(column), column, empty), [bench.last])


def knowing(monkeypatch: pytest.MonkeyPatch, column: str, versions: set[int]) -> None:
    """These versions have met a missing value of ``column`` in training."""
    honest = scoring.read_model

    def read(workflow: Any, registry: Registry, version: Any) -> Any:
        model = honest(workflow, registry, version)
        if version.number not in versions:
            return model
        return replace(model, encoding=replace(model.encoding, nulls=(*model.encoding.nulls, column)))

    monkeypatch.setattr(scoring, "read_model", read)


def test_a_version_without_a_score_for_most_rows_leaves_the_day_to_the_next_step(
    queue: Any, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = queue.copy(tmp_path / "queue")
    rows = decide.of_policy(bench.workflow, bench.lake.read(bench.workflow.table("features"), days=[bench.last]))
    names = sorted(rows["entity_id"].to_pylist())
    most = names[: len(names) // 2 + 1]
    without_value(bench, "updates", most)
    made = scored(bench, registry)
    assert made.step == "rule" and made.model is None and not made.unread
    share = len(most) / len(names)
    assert made.reasons[0] == (
        f"champion (version 2) cannot score the day's features: {len(most)} of {len(names)} rows that are decided on have no "
        f"score ({share:.0%}, more than 50%): updates is missing there, and never was in its training"
    )
    assert "previous_champion (version 1) cannot score" in made.reasons[1]
    batch = bench.decide(registry, bench.last)
    assert batch.step == "rule" and batch.changed, "the rule has a score for them, too"
    knowing(monkeypatch, "updates", {1})
    made = scored(bench, registry)
    assert made.step == "previous_champion" and made.model is not None and made.model.number == 1


def test_half_of_the_rows_without_a_score_stop_no_version(queue: Any, tmp_path: Path, registry: Registry) -> None:
    """And rows that nobody decides on do not count."""
    bench = queue.copy(tmp_path / "queue")
    whole = bench.lake.read(bench.workflow.table("features"), days=[bench.last])
    names = sorted(decide.of_policy(bench.workflow, whole)["entity_id"].to_pylist())
    others = sorted(set(whole["entity_id"].to_pylist()) - set(names))
    without_value(bench, "updates", [*names[: len(names) // 2], *others])
    made = scored(bench, registry)
    assert made.step == "champion" and set(made.unread) == {"updates"}


def test_a_challenger_without_a_score_for_most_rows_has_not_scored_the_day(
    queue: Any, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arm would keep what stands, and be judged as what it decided."""
    bench = queue.copy(tmp_path / "queue")
    name, digests = bench.workflow.name, {n: registry.by_number(bench.workflow.name, n).digest for n in (1, 2)}
    without_value(bench, "updates", None)
    knowing(monkeypatch, "updates", {2})
    now = bench.morning(bench.last)
    with Ledger.open(f"sqlite:///{tmp_path / 'l.db'}", key=b"k" * 16, clock=lambda: now) as ledger:
        ledger.promotion(name, 2, "promoted", "run", {"digest": digests[2]})
        ledger.promotion(name, 1, "canary", "run", {"digest": digests[1]})
        made = scoring.score_day(bench.workflow, bench.lake, registry, bench.last, now=now, ledger=ledger)
    assert made.step == "champion" and made.beside is not None
    assert made.beside.table is None and "updates is missing there" in made.beside.reason
