"""Mapping again: a corrected mapping or contract takes effect on what has landed, as if it had been so from the start."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.ingest import RemapResult, remap
from pipeline.workflow import FOLDER, Contract, Source, Workflow, load
from tests.pipeline.ingest.test_landing import CONTRACT, FIELDS, LATER, NOW, SQL, LandingHarness, _dying, line
from tests.pipeline.ingest.test_landing_moves import names, seen

HALVED = SQL.replace("amount,", "CAST(CAST(amount AS DOUBLE) / 2 AS VARCHAR) AS amount,")
HOUR = timedelta(hours=1)


def contract(**events: Any) -> dict[str, Any]:
    changed = copy.deepcopy(CONTRACT)
    changed["events"] |= events
    return changed


def again(
    desk: LandingHarness, said: dict[str, Any] = CONTRACT, since: date | None = None, now: Any = LATER, **fields: Any
) -> RemapResult:
    workflow = Workflow.model_construct(
        name="shop",
        sources={"first": Source.model_validate({**FIELDS, **fields})},
        contract=Contract.model_validate(said),
        folder=desk.root,
    )
    return remap(workflow, desk.lake, desk.root / "landing", now=now, since=since)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[LandingHarness]:
    yield LandingHarness(tmp_path)


def correct(desk: LandingHarness, sql: str = HALVED) -> None:
    (desk.root / "mapping.sql").write_text(sql)


def test_a_corrected_mapping_is_applied_as_if_it_had_been_so_from_the_start(
    desk: LandingHarness, tmp_path: Path
) -> None:
    fresh = LandingHarness(tmp_path / "fresh")
    correct(fresh)
    for one in (desk, fresh):
        one.put("a.csv", line("a", amount=8), line("K", amount=1500, side="right"))
        one.put("b.csv", line("K", amount=6), line("bad", amount=-2))
        one.land()
        one.put("c.csv", line("c", amount=4))
        one.land(LATER)
    assert desk.live() == {"a": 8.0, "K": 6.0, "c": 4.0}
    correct(desk)
    done = again(desk)
    assert [(old.accepted, new.accepted) for old, new in done.mapped] == [(1, 2), (1, 0), (1, 1)]
    assert (done.gone, dict(done.refused), done.days) == ((), {}, (date(2024, 5, 1), date(2024, 5, 1)))
    assert desk.digests() == fresh.digests()
    assert again(desk).mapped == (), "what stands by the present mapping is left alone"


def test_until_then_ingest_says_which_files_are_outdated(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    assert desk.land().outdated == ()
    correct(desk)
    found = desk.land(LATER)
    assert (found.outdated, found.new, found.landed) == (("a.csv",), (), ())
    again(desk)
    assert desk.land(LATER).outdated == ()
    assert desk.land(LATER, contract=contract(rows=[])).outdated == ("a.csv",)
    assert desk.land(LATER, contract=contract(max_quarantined_share=0.5)).outdated == ()
    assert desk.land(LATER, null=["-"]).outdated == ("a.csv",)


def test_rows_are_known_from_when_they_were(desk: LandingHarness) -> None:
    correct(desk, SQL.replace("known AS known_at,", ""))
    desk.put("a.csv", line("a", amount=8))
    desk.land(known_at="landing")
    desk.put("b.csv", line("b", amount=8))
    desk.land(LATER, known_at="landing")
    desk.put("b.csv", line("b", amount=6))
    desk.land(LATER + HOUR, known_at="landing")
    before = {at: names(desk, at) for at in (NOW - HOUR, NOW, LATER, LATER + HOUR)}
    correct(desk, HALVED.replace("known AS known_at,", ""))
    done = again(desk, now=LATER + 5 * HOUR, known_at="landing")
    assert len(done.mapped) == 2
    assert {at: names(desk, at) for at in before} == before
    assert seen(desk, NOW) == [("a", 4.0)]
    assert seen(desk, LATER) == [("a", 4.0), ("b", 8.0)], "a content that was superseded keeps its rows"
    assert seen(desk, LATER + HOUR) == [("a", 4.0), ("b", 3.0)]


def test_a_row_that_came_in_late_is_known_no_earlier_after_remap(desk: LandingHarness) -> None:
    correct(desk, SQL.replace("known AS known_at,", ""))
    desk.put("a.csv", line("K"), line("a"))
    desk.put("b.csv", line("K", amount=2))
    desk.land(known_at="landing")
    desk.put("a.csv", line("a"))
    desk.land(LATER, known_at="landing")
    correct(desk, HALVED.replace("known AS known_at,", ""))
    again(desk, known_at="landing")
    assert [names(desk, at).count("K") for at in (NOW, LATER - HOUR, LATER)] == [1, 1, 1]
    assert ("K", 1.0) in seen(desk, NOW) and ("K", 1.0) in seen(desk, LATER)


def test_files_that_are_gone_or_refused_keep_their_rows_and_are_named(desk: LandingHarness) -> None:
    for name in "abc":
        desk.put(f"{name}.csv", line(name, amount=8))
    desk.land()
    (desk.zone / "a.csv").unlink()
    desk.put("b.csv", line("other"))
    correct(desk, HALVED.replace("FROM raw", ", CASE WHEN id = 'c' THEN error('no such id') END AS nothing FROM raw"))
    done = again(desk)
    assert done.gone == ("a.csv", "b.csv") and list(done.refused) == ["c.csv"] and done.mapped == ()
    assert desk.live() == {"a": 8.0, "b": 8.0, "c": 8.0}


def test_a_content_is_found_under_the_name_of_its_copy(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", amount=8))
    desk.put("b.csv", line("a", amount=8))
    desk.land()
    (desk.zone / "a.csv").unlink()
    correct(desk)
    assert len(again(desk).mapped) == 1 and desk.live() == {"a": 4.0}


def test_days_choose_the_files_whose_rows_reach_them(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", at="2024-04-01", amount=8), line("b", at="2024-05-01", amount=8))
    desk.put("c.csv", line("c", at="2024-04-01", amount=8))
    desk.land()
    correct(desk)
    assert [new.path for _, new in again(desk, since=date(2024, 5, 1)).mapped] == ["a.csv"]
    assert desk.live() == {"a": 4.0, "b": 4.0, "c": 8.0}


def test_a_changed_contract_judges_again_what_it_had_quarantined(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", amount=200), line("b", amount=1))
    desk.land()
    assert desk.live() == {"b": 1.0}
    again(desk, contract(rows=[]))
    assert desk.live() == {"a": 200.0, "b": 1.0} and desk.rows("quarantine") == []


@pytest.mark.parametrize("after", [False, True], ids=["before_the_write", "after_the_write"])
@pytest.mark.parametrize("at", range(1, 5))
def test_a_crash_in_remap_ends_in_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    found = []
    for name in ("undisturbed", "crashing"):
        desk = LandingHarness(tmp_path / name)
        desk.put("a.csv", line("a", amount=8), line("K", amount=1500, side="right"))
        desk.put("b.csv", line("K", amount=6), line("bad", amount=-2))
        desk.land()
        correct(desk)
        if name == "crashing":
            with _dying(monkeypatch, at, after), pytest.raises(KeyboardInterrupt):
                again(desk)
            assert desk.land(LATER).new == (), "an ingest in between lands nothing anew"
        again(desk)
        found.append(desk.digests())
    assert found[0] == found[1]


def test_the_command_says_what_it_did_and_what_to_run_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestration.cli import command
    from pipeline.ingest import ingest
    from pipeline.lake import Lake
    from tests.assets.test_ingest import FIRST, Office

    office = Office(tmp_path)
    office.export(FIRST, broken=2)
    for variable, value in {"HOME": tmp_path, "LAKE": tmp_path / "lake", "LANDING": tmp_path / "landing"}.items():
        monkeypatch.setenv(f"SIGNALBOX_{variable}", str(value))
    office.land(FIRST)
    before = load(FOLDER / "ad_budget")
    events = before.contract.events.model_copy(update={"rows": ()})
    changed = before.model_copy(update={"contract": before.contract.model_copy(update={"events": events})})
    ingest(changed, Lake(str(tmp_path / "lake")), tmp_path / "landing", now=LATER)
    monkeypatch.setattr("orchestration.cli.operations.workflow_named", lambda name: changed)
    said = CliRunner().invoke(command.app, ["remap", "ad_budget", "--since", str(FIRST)])
    assert said.exit_code == 0, said.output
    assert "1 files mapped again, 0 gone, 0 refused" in said.output
    assert f"signalbox run ad_budget prepare --since {FIRST}" in " ".join(said.output.split())
