"""The life of a version: shadow, canary, champion and back, on a real registry and a real ledger, killed and raced at will."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow.store.db.utils
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common import errors
from delivery.ledger import Ledger
from models.evaluation.gate import Verdict
from models.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelBlocked, ModelMissing, Registry, Version
from pipeline import dispatch, point_in_time
from pipeline.decisions import decide as deciding
from pipeline.decisions import in_effect, replay, scoring, tables
from pipeline.explain import trace
from pipeline.lake import content_digest
from pipeline.lifecycle import candidate_evaluation, hold
from pipeline.lifecycle import promotion as promoting
from pipeline.lifecycle import shadow as shadowing
from pipeline.lifecycle.promotion import NotBlocked, admit, advance, lift, reconcile, step_back
from pipeline.lifecycle.state import aliases, lineup, live
from pipeline.monitoring import loop_health, verdicts
from pipeline.workflow import FOLDER, Promotion, Workflow, WorkflowInvalid, load
from tests.conftest import WorkflowHarness, moved
from tests.support.properties import examples

NAME = "ad_budget"
SHADOW, CANARY, BOTH = Promotion(shadow_days=1), Promotion(canary_days=1), Promotion(shadow_days=1, canary_days=1)
SHARES = {"holdout": 0.2, "champion": 0.4, "challenger": 0.4}


class Killed(BaseException):
    """The process ends here."""


def copied(registry: Registry, name: str, of: int, model: str = NAME, **changed: str | None) -> int:
    """Another version with the files and tags of version ``of`` of ``model``; a tag changed to None is left out."""
    found = registry.client.get_model_version(model, str(of))
    tags = {k: v for k, v in {**found.tags, **changed}.items() if v is not None}
    made = registry.client.create_model_version(name, source=found.source, run_id=found.run_id, tags=tags)
    return int(made.version)


@pytest.fixture(scope="session")
def _four_versions(
    tmp_path_factory: pytest.TempPathFactory, _two_versions: Path, ads: WorkflowHarness, queue: WorkflowHarness
) -> Path:
    """1 and 2 as in ``registry``; 3 trained on the last day; 4: its files again; 5: refused at its training."""
    folder = tmp_path_factory.mktemp("four") / "registry"
    registry = moved(_two_versions, folder)
    for one in (ads, queue):
        one.register(registry, one.last)
        name = one.workflow.name
        assert copied(registry, name, 3, name) == 4
        assert copied(registry, name, 3, name, **{"signalbox.gate": "refused"}) == 5
    return folder


@dataclass
class Firm:
    """A workflow with its lake, registry, ledger and a clock that stands still."""

    bench: WorkflowHarness
    registry: Registry
    ledger: Ledger
    moment: list[datetime]

    @property
    def workflow(self) -> Workflow:
        return self.bench.workflow

    @property
    def day(self) -> date:
        return self.bench.last

    def says(self, promotion: Promotion, shares: Mapping[str, float] | None = None) -> None:
        """What workflow.yaml says of promotion."""
        arms = self.workflow.arms.model_copy(update={"shares": shares} if shares else {})
        changed = self.workflow.model_copy(update={"promotion": promotion, "arms": arms})
        self.bench = replace(self.bench, workflow=changed)

    def version(self, number: int) -> Version:
        return self.registry.by_number(self.workflow.name, number)

    def admit(self, number: int, held: bool = False) -> str:
        version = self.version(number)
        evidence = {"auc": 0.7}
        return admit(self.workflow, self.registry, self.ledger, version, evidence=evidence, actor="run x", held=held)

    def advance(self, day: date | None = None, **more: Any) -> str:
        day = day or self.day + timedelta(days=1)
        now = self.bench.morning(day)
        return advance(self.workflow, self.registry, self.ledger, self.bench.lake, day, now, **more)

    def reconcile(self, judge: Any = None, ledger: Ledger | None = None) -> list[promoting.Answer]:
        return reconcile(
            self.workflow, self.registry, ledger or self.ledger, self.bench.lake, self.moment[0],
            judge=judge or never, actor_of=lambda *_: None,
        )  # fmt: skip

    def person(self, alias: str, number: int | None) -> None:
        """Somebody moves an alias in MLflow."""
        self.registry.follow(self.workflow.name, {alias: number})

    def live(self) -> tuple[Any, Any, Any]:
        state = live(self.ledger, self.workflow)
        return state["champion"], state["previous"], state["challenger"]

    def actions(self) -> list[tuple[int | None, str]]:
        return [(p.version, p.action) for p in self.ledger.promotions(self.workflow.name)]

    def requests(self) -> list[dict[str, Any]]:
        return [dict(e.body) for e in self.ledger.events(promoting.REQUEST, self.workflow.name)]

    def tag(self, number: int, tag: str) -> str | None:
        found = self.registry.client.get_model_version(self.workflow.name, str(number))
        said: str | None = found.tags.get(f"signalbox.{tag}")
        return said

    def in_line(self) -> bool:
        """Whether the registry's aliases stand where the ledger says."""
        wanted = {k: v for k, v in aliases(live(self.ledger, self.workflow)).items() if v is not None}
        return self.registry.standing(self.workflow.name).aliases == wanted

    def score(self, day: date | None = None, now: datetime | None = None) -> scoring.Scored:
        day = day or self.day
        now = now or self.bench.morning(day)
        return scoring.score_day(self.workflow, self.bench.lake, self.registry, day, now=now, ledger=self.ledger)

    def decide(self, day: date | None = None, now: datetime | None = None) -> deciding.Batch:
        """Score, decide and measure a day as the stages do."""
        day = day or self.day
        now = now or self.bench.morning(day)
        scoring.write_scores(self.workflow, self.bench.lake, day, self.score(day, now))
        batch = deciding.decide_day(self.workflow, self.bench.lake, day)
        deciding.write_batch(self.workflow, self.bench.lake, day, batch, decided_at=now, run_id="test")
        dispatch.record(self.workflow, self.ledger, day, batch, decided_at=now, run_id="test")
        shadowing.report(self.workflow, self.bench.lake, day, self.page)
        return batch

    def page(self, text: str) -> str:
        (self.bench.root / "shadow.html").write_text(text)
        return "http://pages/shadow.html"

    def shadow(self, day: date | None = None) -> dict[str, Any]:
        (row,) = self.bench.lake.read(self.workflow.table("shadow"), days=[day or self.day]).to_pylist()
        return dict(row)


def passes(version: Version, against: Version | None) -> Verdict:
    return Verdict(True, ("not worse",), {"harm": {"point": -0.1}})


def refuses(version: Version, against: Version | None) -> Verdict:
    return Verdict(
        False, (f"worse than version {against.number if against else 'none'} by 12%",), {"harm": {"point": 0.12}}
    )


def never(version: Version, against: Version | None) -> Verdict:
    raise AssertionError(f"nobody asked for version {version.number}")


def opened(root: Path, moment: list[datetime]) -> Ledger:
    return Ledger.open(f"sqlite:///{root / 'ledger.db'}", key=b"0123456789abcdef", clock=lambda: moment[0])


def made(bench: WorkflowHarness, registry: Registry) -> Firm:
    moment = [bench.morning(bench.last, 9)]
    return Firm(bench, registry, opened(bench.root, moment), moment)


@pytest.fixture
def firm(ads: WorkflowHarness, tmp_path: Path, _four_versions: Path) -> Iterator[Firm]:
    """``ad_budget``; versions as in ``_four_versions``: 2 is champion, 1 was it, and the ledger knows."""
    found = made(ads.copy(tmp_path / "bench"), moved(_four_versions, tmp_path / "registry"))
    found.says(Promotion())
    for number in (1, 2):
        found.ledger.promotion(NAME, number, "promoted", "run", {"digest": found.version(number).digest})
    found.reconcile()
    assert found.in_line() and found.live() == (2, 1, None)
    yield found
    found.ledger.close()


# --- what is live -----------------------------------------------------------------------------------------------------


def test_what_is_live_follows_from_the_ledger_alone(tmp_path: Path) -> None:
    moment = [datetime(2026, 4, 1)]
    said: list[Any] = []
    with opened(tmp_path, moment) as book:
        for version, action in [
            (1, "promoted"), (2, "refused"), (3, "shadow"), (3, "canary"), (3, "promoted"), (4, "shadow"), (5, "put back"),
            (4, "dropped"), (6, "canary"), (3, "rolled back"), (6, "rolled back"), (3, "lifted"), (1, "rolled back"),
        ]:  # fmt: skip
            moment[0] += timedelta(hours=1)
            book.promotion("w", version, action, "ann", {"digest": f"d{version}"})
            book.promotion("another", 9, "promoted", "ann")
            state = live(book, "w")
            said.append((state["champion"], state["previous"], state["challenger"], state["blocked"]))
    assert said == [
        (1, None, None, []),
        (1, None, None, []),
        (1, None, (3, "shadow"), []),
        (1, None, (3, "canary"), []),
        (3, 1, None, []),
        (3, 1, (4, "shadow"), []),
        (3, 1, (4, "shadow"), []),
        (3, 1, None, []),
        (3, 1, (6, "canary"), []),
        (1, None, (6, "canary"), [3]),
        (1, None, None, [3, 6]),
        (1, None, None, [6]),  # lifted, and champion only when promoted again
        (None, None, None, [1, 6]),
    ]
    assert state["since"] == {"champion": moment[0]} and state["digests"][3] == "d3"


def test_an_unknown_workflow_has_nothing_live(tmp_path: Path) -> None:
    with opened(tmp_path, [datetime(2026, 4, 1)]) as book:
        assert live(book, "w")["champion"] is None and aliases(live(book, "w")) == {
            CHAMPION: None, PREVIOUS: None, CHALLENGER: None,
        }  # fmt: skip


def test_what_was_live_at_a_time_is_told_without_what_came_after(tmp_path: Path) -> None:
    moment = [datetime(2026, 4, 1)]
    with opened(tmp_path, moment) as book:
        for version, action in ((1, "promoted"), (2, "canary"), (2, "promoted"), (2, "rolled back"), (2, "lifted")):
            book.promotion("w", version, action, "ann", {"digest": f"d{version}"})
            moment[0] += timedelta(hours=1)
        then = [live(book, "w", until=datetime(2026, 4, 1, hour, 30)) for hour in range(5)]
        assert then[-1] == live(book, "w") and live(book, "w", until=datetime(2026, 3, 31))["champion"] is None
    assert [(s["champion"], s["challenger"], s["blocked"], s["lifted"]) for s in then] == [
        (1, None, [], []), (1, (2, "canary"), [], []), (2, None, [], []), (1, None, [2], []), (1, None, [], [2]),
    ]  # fmt: skip


# --- a first place ----------------------------------------------------------------------------------------------------


def test_a_version_that_passed_goes_into_the_shadow_and_the_one_before_it_leaves(firm: Firm) -> None:
    firm.says(SHADOW)
    assert firm.admit(3) == "shadow" and firm.live() == (2, 1, (3, "shadow")) and firm.in_line()
    assert firm.admit(3) == "shadow", "rerunnable"
    assert firm.admit(4) == "shadow" and firm.live() == (2, 1, (4, "shadow")) and firm.in_line()
    assert firm.actions()[2:] == [(3, "shadow"), (3, "dropped"), (4, "shadow")]
    told = firm.ledger.promotions(NAME)[2]
    assert told.evidence == {"auc": 0.7, "digest": firm.version(3).digest} and told.actor == "run x"


@pytest.mark.parametrize(
    ("promotion", "place"), [(Promotion(), "champion"), (SHADOW, "shadow"), (CANARY, "canary"), (BOTH, "shadow")]
)
def test_the_first_place_is_what_the_workflow_says(firm: Firm, promotion: Promotion, place: str) -> None:
    firm.says(promotion, SHARES)
    assert firm.admit(3) == place and firm.in_line()
    assert firm.live() == ((3, 2, None) if place == "champion" else (2, 1, (3, place)))


def test_the_first_version_ever_is_champion_at_once(firm: Firm, tmp_path: Path) -> None:
    firm.says(SHADOW)
    for alias in (CHAMPION, PREVIOUS):
        firm.person(alias, None)
    firm.registry.client.delete_registered_model_tag(NAME, "signalbox.followed")
    with opened(tmp_path, firm.moment) as fresh:
        firm.ledger.close()
        firm.ledger = fresh
        assert firm.admit(3) == "champion" and firm.live() == (3, None, None) and firm.in_line()


def test_a_ledger_that_knows_nothing_takes_over_who_holds_the_alias(firm: Firm, tmp_path: Path) -> None:
    """Registries are older than the ledger's knowledge of them."""
    firm.says(SHADOW)
    with opened(tmp_path, firm.moment) as fresh:
        firm.ledger.close()
        firm.ledger = fresh
        assert firm.admit(3) == "shadow" and firm.live() == (2, 1, (3, "shadow")) and firm.in_line()


def test_a_refused_version_is_recorded_once_with_its_figures(firm: Firm) -> None:
    assert firm.admit(5) == firm.admit(5) == "refused"
    assert firm.actions()[2:] == [(5, "refused")] and firm.in_line()
    assert firm.ledger.promotions(NAME)[-1].evidence["auc"] == 0.7


def test_a_backfilled_version_takes_no_alias(firm: Firm) -> None:
    trained = (firm.day - timedelta(days=3)).isoformat()
    number = copied(firm.registry, NAME, 1, **{"signalbox.trained_day": trained})
    assert firm.admit(number) == "none" and firm.live() == (2, 1, None) and firm.in_line()


def test_a_blocked_version_is_not_admitted_until_a_person_lifts_it(firm: Firm) -> None:
    step_back(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="harm", trigger="person")
    with pytest.raises(ModelBlocked, match="harm"):
        firm.admit(2)
    firm.registry.lift(NAME, 2)
    with pytest.raises(ModelBlocked, match="see the ledger"):
        firm.admit(2)  # whoever takes the tag away has lifted nothing
    firm.reconcile()
    for _ in range(2):
        assert lift(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="the data") == ""
    assert firm.actions()[-1] == (2, "lifted") and firm.actions().count((2, "lifted")) == 1, "recorded once"
    assert firm.live() == (1, None, None) and firm.in_line(), "it may be promoted, and is not by this alone"
    assert firm.admit(2) == "champion" and firm.live() == (2, 1, None) and firm.in_line()


def test_what_is_not_blocked_is_not_lifted(firm: Firm) -> None:
    known = firm.actions()
    with pytest.raises(promoting.NotBlocked, match="version 2 is not blocked"):
        lift(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="x")
    with pytest.raises(ModelMissing, match="no version 99"):
        lift(NAME, firm.registry, firm.ledger, 99, actor="ann", reason="x")
    assert firm.actions() == known
    # a block that somebody set by hand, of which the ledger knows nothing
    firm.registry.block(NAME, 4, "by hand")
    lift(NAME, firm.registry, firm.ledger, 4, actor="ann", reason="x")
    assert not firm.version(4).blocked and firm.actions()[-1] == (4, "lifted")


def test_a_version_on_hold_is_let_go_on_by_a_lift_and_stays_where_it_is(firm: Firm) -> None:
    verdict = {"workflow": NAME, "comparison": "champion vs holdout", "version": 2, "day": str(firm.day), "verdict": "HOLD", "reasons": ["late"]}  # fmt: skip
    firm.ledger.note("verdict", verdict)
    live = firm.live()
    lift(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="we look on")
    assert firm.actions()[-1] == (2, "lifted") and firm.live() == live and firm.in_line()
    assert hold.standing(firm.ledger, NAME) == {}


@pytest.mark.parametrize("how", ["killed", "down"])
def test_a_lift_that_the_registry_was_not_told_of_is_mended_by_reconcile(
    firm: Firm, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_back(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="harm", trigger="person")
    with monkeypatch.context() as patch:
        failing = Killed() if how == "killed" else OSError("nobody answers")
        patch.setattr(Registry, "lift", lambda *_: (_ for _ in ()).throw(failing))
        if how == "killed":
            with pytest.raises(Killed):
                lift(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="the data")
        else:
            assert lift(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="the data") == "nobody answers"
            (behind,) = firm.ledger.events(promoting.BEHIND, NAME)
            assert behind.body["version"] == 2
    assert firm.actions()[-1] == (2, "lifted") and firm.version(2).blocked, "the ledger was first"
    assert any("lifted" in one for one in promoting.pending(firm.registry, firm.ledger, NAME))
    assert firm.reconcile() == [] and not firm.version(2).blocked
    assert promoting.pending(firm.registry, firm.ledger, NAME) == [] and firm.actions()[-1] == (2, "lifted")


def test_a_champion_admitted_at_once_ends_the_challenger_before_it(firm: Firm) -> None:
    firm.says(SHADOW)
    firm.admit(3)
    firm.says(Promotion())
    assert firm.admit(4) == "champion" and firm.live() == (4, 2, None) and firm.in_line()


# --- killed between the two writes ------------------------------------------------------------------------------------


def _canary(firm: Firm) -> None:
    firm.says(CANARY, SHARES)
    firm.admit(3)
    firm.decide()


MOVES: dict[str, tuple[Callable[[Firm], Any], Callable[[Firm], Any], tuple[Any, Any, Any]]] = {
    "admit": (lambda f: f.says(SHADOW), lambda f: f.admit(3), (2, 1, (3, "shadow"))),
    "champion at once": (lambda f: None, lambda f: f.admit(3), (3, 2, None)),
    "promote": (_canary, lambda f: f.advance(verdict={"verdict": "PROMOTE"}), (3, 2, None)),
    "block": (_canary, lambda f: f.advance(verdict={"verdict": "ROLLBACK"}), (2, 1, None)),
    "step back": (
        lambda f: None,
        lambda f: step_back(NAME, f.registry, f.ledger, 2, actor="ann", reason="harm", trigger="person"),
        (1, None, None),
    ),
}


@pytest.mark.parametrize("instant", ["follow", "remember"])
@pytest.mark.parametrize("move", sorted(MOVES))
def test_a_move_that_was_killed_before_the_registry_knew_is_brought_to_its_end(
    firm: Firm, move: str, instant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, act, after = MOVES[move]
    before(firm)

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Registry, instant, kill)
        act(firm)
    assert firm.live() == after, "the ledger was first"
    recorded = firm.actions()
    assert firm.reconcile(never) == [], "what was left behind is nobody's request"
    assert firm.live() == after and firm.in_line() and firm.actions() == recorded
    assert bool(firm.version(3).blocked) is (move == "block") and bool(firm.version(2).blocked) is (move == "step back")
    if move in ("admit", "champion at once", "step back"):
        act(firm)
        assert firm.live() == after and firm.in_line(), "and again"


def test_the_next_morning_repairs_aliases_too(firm: Firm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sensor may be off."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Registry, "follow", lambda *_: (_ for _ in ()).throw(Killed()))
        firm.admit(3)
    assert not firm.in_line()
    assert firm.advance() == "none" and firm.in_line() and firm.live() == (3, 2, None)


@pytest.mark.parametrize("passed", [True, False])
def test_an_answer_that_was_killed_is_given_again(firm: Firm, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    firm.person(CHAMPION, 3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Registry, "passed" if passed else "put_back", lambda *_: (_ for _ in ()).throw(Killed()))
        firm.reconcile(passes if passed else refuses)
    firm.reconcile(never if passed else refuses)
    assert firm.live() == ((3, 2, None) if passed else (2, 1, None)) and firm.in_line()


# --- what people do in MLflow -----------------------------------------------------------------------------------------


def test_an_alias_moved_by_hand_to_a_version_that_passes_is_recorded_with_who_did_it(firm: Firm) -> None:
    firm.person(CHAMPION, 5)
    (answer,) = reconcile(
        firm.workflow, firm.registry, firm.ledger, firm.bench.lake, firm.moment[0], judge=passes,
        actor_of=lambda name, alias, number: f"mlflow:{name}/{alias}/{number}",
    )  # fmt: skip
    assert (answer.answer, answer.was, answer.to) == ("recorded", 2, 5)
    told = firm.ledger.promotions(NAME)[-1]
    assert (told.version, told.action, told.actor) == (5, "promoted", f"mlflow:{NAME}/champion/5")
    assert told.evidence["reason"] == "not worse" and firm.live() == (5, 2, None) and firm.in_line()
    (request,) = firm.requests()
    assert (request["from"], request["to"], request["answer"]) == (2, 5, "recorded")
    assert firm.version(5).passed, "its gate has spoken by now"
    assert firm.reconcile() == [] and len(firm.requests()) == 1


def test_a_held_version_takes_no_place_and_is_recorded_once(firm: Firm) -> None:
    assert firm.admit(5, held=True) == firm.admit(5, held=True) == "held"
    assert firm.actions()[2:] == [(5, "held")] and firm.in_line() and firm.live() == (2, 1, None)
    tags = firm.registry.client.get_model_version(firm.workflow.name, "5").tags
    assert tags["signalbox.gate"] == "held" and not firm.version(5).passed


@pytest.mark.parametrize(
    ("figures", "answer"),
    [
        ({"harm": {}, "has_seen_them": True}, "recorded"),
        ({"harm": {}, "has_seen_them": False}, "put back"),  # by now there are days that it has not seen
        ({"contract": ["column"], "has_seen_them": True}, "put back"),
        ({}, "put back"),
    ],
)
def test_a_held_version_is_promoted_by_whoever_asks_until_days_that_it_has_not_seen_refuse_it(
    firm: Firm, figures: dict[str, Any], answer: str
) -> None:
    firm.admit(5, held=True)
    firm.person(CHAMPION, 5)
    (found,) = firm.reconcile(judge=lambda version, against: Verdict(False, ("worse",), figures))
    assert found.answer == answer and "worse" in found.reason and firm.in_line()
    assert firm.live()[0] == (5 if answer == "recorded" else 2)
    assert found.reason.startswith(promoting.WAITED) is (answer == "recorded")


def test_what_the_gate_itself_holds_a_person_may_ask_for(firm: Firm) -> None:
    firm.person(CHAMPION, 3)
    (found,) = firm.reconcile(judge=lambda version, against: Verdict(False, ("spoilt?",), held=True))
    assert found.answer == "recorded" and firm.live()[0] == 3


def test_an_alias_moved_by_hand_to_a_version_that_fails_goes_back_with_the_reason(firm: Firm) -> None:
    firm.person(CHAMPION, 3)
    (answer,) = firm.reconcile(refuses)
    assert (answer.answer, answer.actor) == ("put back", "unknown")
    assert firm.live() == (2, 1, None) and firm.in_line()
    assert "worse than version 2 by 12%" in str(firm.tag(3, "put_back"))
    assert firm.requests()[0]["reason"] == answer.reason and firm.actions()[-1] == (3, "put back")
    firm.person(CHAMPION, 3)
    assert len(firm.reconcile(refuses)) == 1 and firm.in_line(), "asked again, answered again"


@pytest.mark.parametrize(
    ("alias", "to", "verdict", "answer", "why", "then"),
    [
        (CHALLENGER, 4, passes, "recorded", "not worse", (2, 1, (4, "shadow"))),
        (CHALLENGER, 4, refuses, "put back", "refused by its gate", (2, 1, (3, "shadow"))),
        (CHALLENGER, 2, never, "put back", "is the champion", (2, 1, (3, "shadow"))),
        (CHALLENGER, None, never, "recorded", "taken out", (2, 1, None)),
        (CHAMPION, 3, passes, "recorded", "not worse", (3, 2, None)),
        (CHAMPION, 1, passes, "recorded", "not worse", (1, 2, (3, "shadow"))),
        (CHAMPION, None, never, "put back", "signalbox rollback", (2, 1, (3, "shadow"))),
        (PREVIOUS, 4, never, "put back", "nobody chooses it", (2, 1, (3, "shadow"))),
        (PREVIOUS, None, never, "put back", "nobody chooses it", (2, 1, (3, "shadow"))),
    ],
)
def test_every_alias_that_is_moved_gets_an_answer(
    firm: Firm, alias: str, to: int | None, verdict: Any, answer: str, why: str, then: Any
) -> None:
    firm.says(SHADOW)
    firm.admit(3)
    firm.person(alias, to)
    (given_,) = firm.reconcile(verdict)
    assert (given_.answer, given_.alias, given_.to) == (answer, alias, to) and why in given_.reason
    told = [p.evidence["figures"] for p in firm.ledger.promotions(NAME) if p.evidence.get("request")]
    if verdict is not never:
        assert told == [verdict(firm.version(to), None).figures], "the ledger keeps what the gate measured"
    assert firm.live() == then and firm.in_line() and firm.reconcile() == []


def test_a_blocked_version_that_is_given_the_alias_is_put_back(firm: Firm) -> None:
    step_back(NAME, firm.registry, firm.ledger, 2, actor="ann", reason="harm", trigger="guard")
    firm.registry.lift(NAME, 2)  # the tag alone is no lift
    firm.person(CHAMPION, 2)
    (answer,) = firm.reconcile(never)
    assert answer.answer == "put back" and f"signalbox lift {NAME} 2" in answer.reason
    assert firm.live() == (1, None, None) and firm.in_line() and firm.version(2).blocked


@pytest.mark.parametrize("tag", ["signalbox.files", "signalbox.digest"])
def test_a_version_registered_by_hand_is_put_back_unread(firm: Firm, tag: str) -> None:
    number = copied(firm.registry, NAME, 3, NAME, **{tag: None})
    firm.person(CHAMPION, number)
    (answer,) = firm.reconcile(never)
    assert answer.answer == "put back" and "unreadable" in answer.reason and firm.in_line()


def test_an_alias_moved_twice_between_two_looks_is_one_request_and_moved_back_none(firm: Firm) -> None:
    firm.person(CHAMPION, 3)
    firm.person(CHAMPION, 4)
    (answer,) = firm.reconcile(refuses)
    assert (answer.was, answer.to) == (2, 4) and firm.in_line()
    firm.person(CHAMPION, 3)
    firm.person(CHAMPION, 2)
    assert firm.reconcile() == [] and firm.live() == (2, 1, None)


@pytest.mark.parametrize(
    ("gone", "then"), [((2,), (1, None, (3, "shadow"))), ((1,), (2, None, (3, "shadow"))), ((3,), (2, 1, None)), ((1, 2, 3), (None, None, None))]
)  # fmt: skip
def test_versions_that_are_deleted_leave_the_line(firm: Firm, gone: tuple[int, ...], then: Any) -> None:
    firm.says(SHADOW)
    firm.admit(3)
    for number in gone:
        firm.registry.client.delete_model_version(NAME, str(number))
    assert promoting.pending(firm.registry, firm.ledger, NAME)
    assert firm.reconcile() == [] and firm.live() == then and firm.in_line()
    assert promoting.pending(firm.registry, firm.ledger, NAME) == []
    dropped = [p for p in firm.ledger.promotions(NAME) if p.action == "dropped"]
    assert {p.version for p in dropped} == set(gone) and all("deleted" in p.evidence["reason"] for p in dropped)


def test_a_deleted_champion_and_another_given_the_alias_are_told_apart(firm: Firm) -> None:
    firm.registry.client.delete_model_version(NAME, "2")
    firm.person(CHAMPION, 3)
    (answer,) = firm.reconcile(refuses)
    assert (answer.was, answer.to, answer.answer) == (1, 3, "put back") and firm.live() == (1, None, None)
    assert firm.in_line()


def test_a_registry_without_the_model_is_another_registry(firm: Firm, empty_registry: Registry) -> None:
    known = firm.actions()
    firm.registry = empty_registry
    assert firm.reconcile() == [] and promoting.pending(firm.registry, firm.ledger, NAME) == []
    assert firm.advance() == "none"
    assert firm.actions() == known and firm.live() == (2, 1, None)


def test_with_mlflow_down_nothing_changes_and_the_day_goes_on(
    firm: Firm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mlflow.store.db.utils, "MAX_RETRY_COUNT", 1)
    firm.person(CHAMPION, 3)
    known, there = firm.actions(), firm.registry
    (tmp_path / "garbage.db").write_bytes(b"no database at all, but long enough to look like one" * 100)
    firm.registry = Registry(f"sqlite:///{tmp_path / 'garbage.db'}", (tmp_path / "a").as_uri())
    for act in (firm.reconcile, firm.advance):
        with pytest.raises(errors.unreachable()):
            act()
    scored = firm.score()
    assert scored.step == "rule" and "the registry cannot be read" in scored.reasons[0]
    assert firm.actions() == known
    heir = step_back(NAME, firm.registry, firm.ledger, 2, actor="guard", reason="harm", trigger="guard")
    assert heir == 1 == firm.live()[0], "a rollback does not wait for MLflow"
    (behind,) = firm.ledger.events(promoting.BEHIND, NAME)
    assert behind.body["version"] == 2
    firm.registry = there
    firm.reconcile(refuses)
    assert firm.in_line() and firm.version(2).blocked and firm.live() == (1, None, None)


def test_of_two_reconciles_at_once_one_answers(firm: Firm) -> None:
    firm.person(CHAMPION, 3)
    meet, answers = threading.Barrier(2), []

    def slowly(version: Version, against: Version | None) -> Verdict:
        meet.wait(30)  # both are judging before either answers
        return passes(version, against)

    def go() -> None:
        with opened(firm.bench.root, firm.moment) as mine:
            answers.extend(firm.reconcile(slowly, ledger=mine))

    threads = [threading.Thread(target=go) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert len(answers) == 1 and len(firm.requests()) == 1 and firm.in_line()
    assert firm.actions()[2:] == [(3, "promoted")]


def test_a_request_that_is_moved_on_while_it_is_judged_waits_for_the_next_look(firm: Firm) -> None:
    firm.person(CHAMPION, 3)

    def meanwhile(version: Version, against: Version | None) -> Verdict:
        firm.person(CHAMPION, 4)
        return passes(version, against)

    assert firm.reconcile(meanwhile) == [] and firm.live() == (2, 1, None)
    (answer,) = firm.reconcile(refuses)
    assert answer.to == 4 and firm.in_line()


def test_an_earlier_version_comes_back_by_request_only_through_its_gate(firm: Firm) -> None:
    firm.person(CHAMPION, 1)
    seen = []

    def judge(version: Version, against: Version | None) -> Verdict:
        seen.append((version.number, against.number if against else None))
        return passes(version, against)

    firm.reconcile(judge)
    assert seen == [(1, 2)] and firm.live() == (1, 2, None)


# --- who decides a day ------------------------------------------------------------------------------------------------


def test_an_alias_moved_by_hand_decides_nothing_before_it_is_answered(firm: Firm) -> None:
    firm.person(CHAMPION, 3)
    scored = firm.score()
    assert scored.model is not None and scored.model.number == 2 and scored.step == "champion" and scored.reasons == ()
    assert "champion stands at 3, the ledger says 2" in scored.moved
    firm.reconcile(passes)
    scored = firm.score()
    assert scored.model is not None and scored.model.number == 3 and scored.moved == ""


def test_without_a_word_in_the_ledger_the_registry_says(firm: Firm, tmp_path: Path) -> None:
    firm.person(CHAMPION, 3)
    with opened(tmp_path, firm.moment) as fresh:
        firm.ledger.close()
        firm.ledger = fresh
        scored = firm.score()
    assert scored.model is not None and scored.model.number == 3


@pytest.mark.parametrize("how", ["rolled back in the ledger", "deleted", "replaced"])
def test_a_champion_that_may_not_decide_leaves_it_to_the_one_before(firm: Firm, how: str) -> None:
    if how == "rolled back in the ledger":
        firm.ledger.promotion(NAME, 2, "rolled back", "ann")
        step = "champion"  # it is the champion by then
    elif how == "deleted":
        firm.registry.client.delete_model_version(NAME, "2")
        step = "previous_champion"
    else:
        firm.registry.client.set_model_version_tag(NAME, "2", "signalbox.digest", firm.version(3).digest)
        step = "previous_champion"
    scored = firm.score()
    assert scored.model is not None and scored.model.number == 1 and scored.step == step
    assert [r.partition(":")[0] for r in scored.reasons] == ["champion"] * (step != "champion")


def test_with_nobody_live_the_rule_decides_whatever_the_alias_says(firm: Firm) -> None:
    for number in (2, 1):
        firm.ledger.promotion(NAME, number, "rolled back", "ann")
    scored = firm.score()
    assert scored.step == "rule" and "no version is live" in scored.reasons[0]


def test_a_backfill_takes_the_version_of_its_time(firm: Firm) -> None:
    firm.ledger.promotion(NAME, 4, "rolled back", "ann")
    firm.admit(3)
    later = firm.bench.morning(firm.day)
    for days_ago, number in ((0, 3), (1, 2), (2, 1), (5, None)):
        scored = firm.score(firm.day - timedelta(days=days_ago), later)
        assert (scored.model.number if scored.model else None) == number, days_ago
    firm.ledger.promotion(NAME, 2, "rolled back", "ann")  # and its tag is not set yet
    blocked = firm.score(firm.day - timedelta(days=1), later)
    assert blocked.model is not None and blocked.model.number == 1


# --- shadow -----------------------------------------------------------------------------------------------------------


def test_in_the_shadow_a_challenger_scores_and_nobody_acts_on_it(firm: Firm) -> None:
    firm.says(SHADOW)
    alone = firm.decide()
    assert not firm.bench.lake.exists(firm.workflow.table("shadow"))
    firm.admit(3)
    batch = firm.decide()
    assert content_digest(batch.decisions) == content_digest(alone.decisions)
    assert batch.record["challenger_version"] is None and batch.record["model_version"] == 2
    scores = firm.bench.lake.read(firm.workflow.table("shadow_scores"), days=[firm.day])
    theirs = scoring.read_model(firm.workflow, firm.registry, firm.version(3))
    features = firm.bench.lake.read(firm.workflow.table("features"), days=[firm.day])
    again = theirs.score(point_in_time.ordered(features))
    assert set(scores["version"].to_pylist()) == {3}
    assert scores.select(again.schema.names).sort_by("entity_id").equals(again.sort_by("entity_id"))
    row = firm.shadow()
    assert (row["version"], row["stage"], row["beside"], row["scored"]) == (3, "shadow", 2, True)
    page = (firm.bench.root / "shadow.html").read_text()
    assert "Version 3 (shadow) beside version 2" in page and row["text"] in page


def test_the_disagreement_counts_what_would_have_been_decided_otherwise(firm: Firm) -> None:
    firm.says(SHADOW)
    firm.admit(3)
    ours = firm.decide().decisions
    firm.ledger.promotion(NAME, 3, "promoted", "ann")
    theirs = firm.decide().decisions
    row, acts = firm.shadow(), pa.array(["champion"])
    mine = pc.is_in(ours["arm"], value_set=acts)
    before, after = ours.filter(mine), theirs.filter(mine)
    differ = [a != b for a, b in zip(before["after"].to_pylist(), after["after"].to_pylist(), strict=True)]
    assert row["entities"] == len(differ) and row["different"] == sum(differ) > 0
    assert row["share_different"] == sum(differ) / len(differ)
    assert json.loads(row["by_arm"]) == {"champion": {"entities": len(differ), "different": sum(differ)}}
    assert json.loads(row["scores"])["values"] > 0
    lake, day = firm.bench.lake, firm.day
    found = shadowing.of_day(firm.workflow, lake, day)
    assert found is None, "the day has no challenger any more"


def test_a_challenger_that_agrees_with_itself_differs_in_nothing(queue: WorkflowHarness, registry: Registry) -> None:
    """Priorities: the same scores twice, and scores turned around."""
    scored = scoring.score_day(queue.workflow, queue.lake, registry, queue.last, now=queue.morning(queue.last))
    features = queue.lake.read(queue.workflow.table("features"), days=[queue.last])
    units = sorted(set(deciding.of_policy(queue.workflow, features)["unit"].to_pylist()))
    drawn = deciding.draw_arms(queue.workflow, queue.last, units, None)

    def compare(other: pa.Table) -> shadowing.Disagreement:
        return shadowing.disagreement(queue.workflow, queue.last, features, scored.table, other, drawn)

    same = compare(scored.table)
    assert same.different == 0 and same.share == 0 and same.largest == () and same.by_level == {}
    assert set(same.scores.values()) == {0.0} and same.entities > 0
    at = scored.table.schema.get_field_index("p_miss_later")
    turned = compare(scored.table.set_column(at, "p_miss_later", pc.subtract(1.0, scored.table["p_miss_later"])))
    assert 0 < turned.different <= turned.entities and sum(turned.by_level.values()) == turned.different
    assert turned.scores["p_miss_later"] > 0 and turned.scores["effort_hours"] == 0
    assert sum(n["different"] for n in turned.by_arm.values()) == turned.different
    sizes = [abs(one["challenger"] - one["champion"]) for one in turned.largest]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == min(10, turned.different)


@pytest.mark.parametrize("stage", [SHADOW, CANARY])
def test_a_challenger_that_fails_harms_no_day(firm: Firm, stage: Promotion, monkeypatch: pytest.MonkeyPatch) -> None:
    firm.says(stage, SHARES)
    alone = firm.decide()
    firm.admit(3)
    real = scoring.read_model

    def read(workflow: Workflow, registry: Registry, version: Version) -> Any:
        if version.number == 3:
            raise ZeroDivisionError("a bug of its own")
        return real(workflow, registry, version)

    monkeypatch.setattr(scoring, "read_model", read)
    batch = firm.decide()
    assert content_digest(batch.decisions) == content_digest(alone.decisions) and batch.step == "champion"
    assert batch.record["challenger_version"] is None
    row = firm.shadow()
    assert row["scored"] is False and "ZeroDivisionError: a bug of its own" in row["reason"]
    assert (stage is SHADOW) == (batch.reasons == ())
    assert firm.advance() == "waits", "a day that it did not score does not count"


def test_a_challenger_with_other_scores_leaves_its_arm_to_the_champion(
    firm: Firm, monkeypatch: pytest.MonkeyPatch
) -> None:
    firm.says(CANARY, SHARES)
    alone = firm.decide()
    firm.admit(3)
    real = scoring._beside

    def beside(*given_: Any) -> scoring.Beside:
        found = real(*given_)
        assert found.table is not None
        return replace(found, table=found.table.drop_columns(["values"]))

    monkeypatch.setattr(scoring, "_beside", beside)
    batch = firm.decide()
    assert content_digest(batch.decisions) == content_digest(alone.decisions)
    assert batch.record["challenger_version"] is None and "decided by the champion" in batch.reasons[0]
    assert firm.shadow()["scored"] is False


def test_a_backfill_is_scored_by_no_challenger_and_forgets_no_day_of_it(firm: Firm) -> None:
    firm.says(SHADOW)
    firm.admit(3)
    firm.decide()
    firm.decide(now=firm.bench.morning(firm.day + timedelta(days=9)))
    assert firm.shadow()["scored"] is True, "what was measured then stays measured"
    assert firm.advance() == "champion"


# --- canary -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ads", "queue"])
def canary(request: pytest.FixtureRequest, tmp_path: Path, _four_versions: Path) -> Iterator[Firm]:
    """Each workflow with version 3 in canary on its last day, decided."""
    shared: WorkflowHarness = request.getfixturevalue(request.param)
    found = made(shared.copy(tmp_path / "bench"), moved(_four_versions, tmp_path / "registry"))
    found.says(CANARY, {"holdout": 0.01, "champion": 0.5, "challenger": 0.5})
    assert found.admit(3) == "canary" and found.live() == (2, 1, (3, "canary"))
    found.decide()
    yield found
    found.ledger.close()


def _days_later(firm: Firm) -> None:
    """The challenger becomes champion, another comes, files land late, days are decided again."""
    assert firm.advance(verdict={"verdict": "PROMOTE"}) == "champion" and firm.admit(4) == "canary"
    later = firm.day + timedelta(days=1)
    firm.bench.land([later])
    events = firm.bench.lake.read(firm.workflow.table("events"), days=[firm.day])
    fewer = events.slice(0, events.num_rows - events.num_rows // 3)
    firm.bench.lake.replace_days(firm.workflow.table("events"), fewer, [firm.day])
    firm.bench.build([firm.day, later])
    firm.says(CANARY, {"holdout": 0.3, "champion": 0.7, "challenger": 0.3})
    for day in (firm.day, later):
        firm.decide(day, firm.bench.morning(later))


def test_a_canary_decides_its_arm_and_nothing_else_and_every_decision_replays(canary: Firm) -> None:
    lake, workflow, day = canary.bench.lake, canary.workflow, canary.day
    rows = canary.bench.decided(day)
    by_arm = {arm: [r for r in rows if r["arm"] == arm] for arm in {r["arm"] for r in rows}}
    assert by_arm["challenger"] and by_arm["champion"]
    assert {(r["model_version"], r["challenger_version"]) for r in rows} == {(2, 3)}
    assert {r["challenger_digest"] for r in rows} == {canary.version(3).digest}
    features = lake.read(workflow.table("features"), days=[day])
    units = sorted({r["unit"] for r in rows})
    drawn = deciding.draw_arms(workflow, day, units, lake.read(workflow.table("arms")))
    alone = {}
    for number in (2, 3):
        scores = scoring.read_model(workflow, canary.registry, canary.version(number)).score(
            point_in_time.ordered(features)
        )
        made_, _ = deciding.decide(workflow, day, features, scores, drawn, "champion")
        alone[number] = {r["entity_id"]: r for r in made_.to_pylist()}
    for arm, mine in by_arm.items():
        by = 3 if arm == "challenger" else 2
        assert all({c: r[c] for c in tables.DECISIONS.names} == alone[by][r["entity_id"]] for r in mine), arm
    assert any(alone[2][r["entity_id"]]["reasons"] != r["reasons"] for r in by_arm["challenger"]), "the models differ"
    (batch,) = canary.ledger.batches(workflow.name, model_version=3)
    assert batch.record["challenger_version"] == 3, "a rollback of the challenger finds it"

    theirs, ours = by_arm["challenger"][0], by_arm["champion"][0]
    found = replay.made_from(theirs, lake, canary.registry)
    assert found.learner is scoring.read_model(workflow, canary.registry, canary.version(3))
    champions = replay.made_from(ours, lake, canary.registry)
    assert champions.learner is scoring.read_model(workflow, canary.registry, canary.version(2))
    assert champions.scores_in is not None and found.scores_in is not None
    elsewhere = pc.if_else(pc.equal(drawn["unit"], ours["unit"]), "challenger", drawn["arm"])
    there = champions.scores_in(drawn.set_column(drawn.schema.get_field_index("arm"), "arm", elsewhere))
    mine = pc.equal(there["entity_id"], ours["entity_id"])
    row = point_in_time.ordered(features)
    row = row.filter(pc.equal(row["entity_id"], ours["entity_id"]))
    assert there.filter(mine).to_pylist() == found.learner.score(row).to_pylist(), (
        "had its unit been drawn into the other arm"
    )

    _days_later(canary)
    for one in [*by_arm["challenger"][:3], *by_arm["champion"][:2], rows[0], rows[-1]]:
        again = replay.replay_row(one, lake, canary.registry)
        assert again.equal and again.same_code, again.as_dict()
    altered = {**theirs, "challenger_digest": "0" * 64}
    with pytest.raises(replay.ReplayImpossible, match="version 3 is not the one that decided"):
        replay.replay_row(altered, lake, canary.registry)


def test_a_decision_of_the_arm_challenger_is_explained_by_the_challenger(firm: Firm) -> None:
    firm.says(CANARY, SHARES)
    firm.admit(3)
    firm.decide()
    rows = firm.bench.decided(firm.day)
    mine = next(r for r in rows if r["arm"] == "challenger")
    told = trace.explain(firm.ledger, firm.bench.lake, firm.registry, mine["decision_id"])
    assert told.links["model"]["version"] == 3 and told.links["model"]["same_digest"]
    assert told.links["replay"]["equal"] is True and "gone" not in told.links["would_change"]
    features = firm.bench.lake.read(firm.workflow.table("features"), days=[firm.day])
    row = features.filter(pc.equal(features["entity_id"], mine["entity_id"]))
    (score,) = scoring.read_model(firm.workflow, firm.registry, firm.version(3)).score(row).to_pylist()
    said = told.links["score"]["score"]
    assert said == {k: v for k, v in score.items() if k not in ("entity_id", "moment")}
    (ours,) = scoring.read_model(firm.workflow, firm.registry, firm.version(2)).score(row).to_pylist()
    assert said["values"] != ours["values"]
    assert "arm challenger was decided by the challenger" in "\n".join(told.lines())


def test_on_a_bad_day_the_canary_decides_nothing(firm: Firm) -> None:
    firm.says(CANARY, SHARES)
    firm.admit(3)
    late = firm.bench.workflow.deadline_of(firm.day) + timedelta(minutes=1)
    batch = firm.decide(now=late)
    assert batch.step == "rule" and batch.record["challenger_version"] is None
    assert not firm.bench.lake.exists(firm.workflow.table("shadow"))


def test_state_folders_from_before_there_were_challengers_go_on(firm: Firm) -> None:
    """Tables without the new columns: their rows are read and replayed, and new ones are written beside them."""
    earlier = firm.day - timedelta(days=1)
    lake, w = firm.bench.lake, firm.workflow
    firm.decide(earlier)
    for table in ("decisions", "batches", "scoring"):
        whole = lake.read(w.table(table))
        old = whole.drop_columns([c for c in whole.schema.names if c.startswith("challenger")])
        shutil.rmtree(lake.uri(w.table(table)))
        lake.replace_days(w.table(table), old, [earlier])
    assert deciding.decide_day(w, lake, earlier).record["challenger_version"] is None
    assert shadowing.report(w, lake, earlier, firm.page) is None
    row = firm.bench.decided(earlier)[0]
    assert "challenger_version" not in row and replay.replay_row(row, lake, firm.registry).equal
    firm.says(CANARY, SHARES)
    firm.admit(3)
    firm.decide()
    row = firm.bench.decided(earlier)[0]
    assert row["challenger_version"] is None and replay.replay_row(row, lake, firm.registry).equal
    assert {r["challenger_version"] for r in firm.bench.decided(firm.day)} == {3}
    assert lake.read(w.table("batches")).num_rows == 2


# --- from stage to stage ----------------------------------------------------------------------------------------------


def test_a_challenger_moves_on_when_its_days_have_passed_and_it_scored_each(firm: Firm) -> None:
    firm.says(Promotion(shadow_days=2))
    firm.admit(3)
    yesterday = firm.day - timedelta(days=1)
    assert firm.advance(firm.day) == "waits"
    assert promoting.due(firm.workflow, firm.ledger, firm.bench.lake, firm.day)[1].endswith("0 days scored of 2")
    # version 3 was trained on the last day: on the day before, it may not score
    firm.decide(yesterday)
    assert firm.advance(firm.day) == "waits"
    later = firm.day + timedelta(days=1)
    firm.bench.land([later])
    firm.bench.build([later])
    firm.decide()
    assert firm.advance(firm.day) == "waits", "the day itself does not count for its own morning"
    firm.decide(later)
    assert firm.advance(later) == "waits"
    assert firm.advance(later + timedelta(days=1)) == "champion"
    assert firm.live() == (3, 2, None) and firm.in_line()
    told = firm.ledger.promotions(NAME)[-1]
    assert told.evidence["days"] == [str(firm.day), str(later)] and told.evidence["from"] == "shadow"
    assert firm.advance(later + timedelta(days=1)) == "none", "once"


@pytest.mark.parametrize(
    ("verdict", "move", "then"),
    [
        (None, "waits", (2, 1, (3, "canary"))),
        ("CONTINUE", "waits", (2, 1, (3, "canary"))),
        ("NO_DATA", "waits", (2, 1, (3, "canary"))),
        ("INCONCLUSIVE", "waits", (2, 1, (3, "canary"))),
        ("PROMOTE", "champion", (3, 2, None)),
        ("ROLLBACK", "blocked", (2, 1, None)),
    ],
)
def test_a_canary_waits_for_the_guards_word(firm: Firm, verdict: str | None, move: str, then: Any) -> None:
    firm.says(BOTH, SHARES)
    firm.admit(3)
    firm.decide()
    said = {"workflow": NAME, "version": 3, "day": str(firm.day), "figures": {}}
    # of another comparison, of another version, of the shadow: none is the canary's
    firm.ledger.note("verdict", {**said, "comparison": "champion vs holdout", "verdict": "PROMOTE"})
    firm.ledger.note("verdict", {**said, "comparison": "challenger vs champion", "version": 4, "verdict": "PROMOTE"})
    firm.ledger.note("verdict", {**said, "comparison": "challenger vs champion", "verdict": "PROMOTE"})
    firm.moment[0] += timedelta(hours=1)
    assert firm.advance() == "canary" and firm.live() == (2, 1, (3, "canary")) and firm.in_line()
    assert firm.advance() == "waits", "no day of it yet"
    firm.decide()
    if verdict is not None:
        firm.ledger.note("verdict", {**said, "comparison": "challenger vs champion", "verdict": verdict})
    assert firm.advance() == move and firm.live() == then and firm.in_line()
    if move == "blocked":
        assert firm.actions()[-1] == (3, "rolled back") and firm.version(3).blocked
        with pytest.raises(ModelBlocked):
            firm.admit(3)
    elif move == "champion":
        assert firm.ledger.promotions(NAME)[-1].evidence["verdict"]["verdict"] == "PROMOTE"


def test_a_promotion_waits_for_the_least_days_and_a_rollback_for_none(firm: Firm) -> None:
    firm.says(Promotion(canary_days=2, inconclusive="promote"), SHARES)
    firm.admit(3)
    firm.decide()
    assert firm.advance(verdict={"verdict": "PROMOTE"}) == "waits"
    firm.says(Promotion(canary_days=1, inconclusive="promote"), SHARES)
    assert promoting.due(
        firm.workflow, firm.ledger, firm.bench.lake, firm.day + timedelta(days=1), verdict={"verdict": "INCONCLUSIVE"}
    )[0] == "champion"  # fmt: skip
    firm.says(Promotion(canary_days=30), SHARES)
    assert firm.advance(verdict={"verdict": "ROLLBACK"}) == "blocked"


def test_a_canary_that_the_guard_blocks_and_its_batches_are_one_automatic_rollback(firm: Firm) -> None:
    _canary(firm)
    body = {
        "workflow": NAME, "comparison": "challenger vs champion", "version": 3, "since": str(firm.day), "day": str(firm.day),
        "verdict": "ROLLBACK", "reasons": ["value: harm of 2", "and of 3"], "figures": {}, "design": "cohort",
    }  # fmt: skip
    firm.moment[0] += timedelta(hours=1)
    firm.ledger.note("verdict", body)
    (asked,) = verdicts.condemned(firm.ledger, firm.workflow)
    firm.moment[0] += timedelta(hours=1)
    assert firm.advance() == "blocked"
    told = firm.ledger.promotions(NAME)[-1].evidence
    assert (told["trigger"], told["reason"]) == ("guard", asked.reason)
    (left,) = verdicts.condemned(firm.ledger, firm.workflow)
    assert left.reason == asked.reason and left.batches
    firm.moment[0] += timedelta(hours=1)
    for batch in left.batches:
        firm.ledger.rollback_complete(batch, actor="guard", reason=left.reason, trigger="guard")
    (one,) = loop_health.examine(firm.ledger, firm.workflow, until=firm.moment[0]).rollbacks
    assert one.automatic and set(one.versions) == {3} and set(one.batches) == set(left.batches)
    assert one.restored == firm.moment[0] and one.noticed == firm.moment[0] - timedelta(hours=2)


def test_too_much_disagreement_waits_for_a_person(firm: Firm) -> None:
    firm.says(Promotion(shadow_days=1, max_disagreement=0.0))
    firm.admit(3)
    firm.decide()
    assert firm.shadow()["share_different"] > 0
    move, why, _ = promoting.due(firm.workflow, firm.ledger, firm.bench.lake, firm.day + timedelta(days=1))
    assert move == "waits" and "a person must look" in why and firm.advance() == "waits"
    firm.person(CHAMPION, 3)
    firm.reconcile(passes)
    assert firm.live() == (3, 2, None), "who looks, and asks for it"


def test_backfills_and_stopped_workflows_move_nothing(firm: Firm) -> None:
    firm.says(SHADOW)
    firm.admit(3)
    firm.decide()
    later = firm.day + timedelta(days=1)
    over = in_effect.over(later)
    assert advance(firm.workflow, firm.registry, firm.ledger, firm.bench.lake, later, over) == "waits"
    firm.ledger.switch(NAME, True, "ann", "look first")
    assert firm.advance() == "waits"
    firm.ledger.switch(NAME, False, "ann", "looked")
    assert firm.advance() == "champion"


# --- back -------------------------------------------------------------------------------------------------------------


def test_a_rolled_back_champion_leaves_the_one_before_it_live_and_says_so(firm: Firm) -> None:
    firm.admit(3)
    assert step_back(NAME, firm.registry, firm.ledger, 3, actor="ann", reason="harm", trigger="person") == 2
    assert firm.live() == (2, 1, None) and firm.in_line() and firm.version(3).blocked == "harm"
    assert firm.actions()[-2:] == [(3, "rolled back"), (2, "promoted")]
    assert firm.ledger.promotions(NAME)[-1].evidence["heir of"] == 3
    known = firm.actions()
    assert step_back(NAME, firm.registry, firm.ledger, 3, actor="ann", reason="harm", trigger="person") == 2
    assert firm.actions()[: len(known)] == known and firm.live() == (2, 1, None)
    assert step_back(NAME, firm.registry, firm.ledger, 1, actor="ann", reason="it too", trigger="person") == 2
    assert firm.live() == (2, None, None) and firm.in_line(), "one that was not champion leaves the line alone"


def test_the_last_of_the_line_leaves_the_rule(firm: Firm) -> None:
    for number in (4, 3):
        firm.ledger.promotion(NAME, number, "rolled back", "ann")
    for number in (2, 1):
        step_back(NAME, firm.registry, firm.ledger, number, actor="ann", reason="harm", trigger="person")
    assert firm.live() == (None, None, None) and firm.in_line() and firm.score().step == "rule"


def test_a_rollback_of_a_version_that_nobody_knows_is_refused(firm: Firm) -> None:
    with pytest.raises(ModelMissing, match="no version 99"):
        step_back(NAME, firm.registry, firm.ledger, 99, actor="ann", reason="harm", trigger="person")
    assert firm.live() == (2, 1, None)


# --- whatever happens -------------------------------------------------------------------------------------------------

STEP = st.one_of(
    st.tuples(
        st.just("person"), st.sampled_from([CHAMPION, PREVIOUS, CHALLENGER]), st.sampled_from([None, 1, 2, 3, 4])
    ),
    st.tuples(st.just("admit"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("verdict"), st.sampled_from(["PROMOTE", "ROLLBACK", "CONTINUE"]), st.booleans()),
    st.tuples(st.just("roll back"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("lift"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("delete"), st.integers(1, 4), st.none()),
    st.tuples(st.just("reconcile"), st.booleans(), st.booleans()),
)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, ads: WorkflowHarness, _four_versions: Path) -> Iterator[Firm]:
    """One registry and ledger for all examples, each with a workflow of its own name."""
    root = tmp_path_factory.mktemp("story")
    found = made(ads.copy(root / "bench"), moved(_four_versions, root / "registry"))
    found.says(CANARY, SHARES)
    yield found
    found.ledger.close()


_names = iter(range(10**6))


@settings(
    max_examples=examples(25), phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(steps=st.lists(STEP, min_size=3, max_size=9))
def test_whatever_people_guards_and_crashes_do_the_aliases_end_where_the_ledger_says(
    story: Firm, steps: list[Any]
) -> None:
    name = f"w{next(_names)}"
    story.registry.client.create_registered_model(name)
    for _ in range(4):
        copied(story.registry, name, 3)
    firm = replace(story, bench=replace(story.bench, workflow=story.workflow.model_copy(update={"name": name})))
    real = Registry.follow

    def act(what: str, first: Any, second: Any) -> None:
        stands = firm.registry.standing(name)
        if what == "person" and (first in stands.aliases if second is None else second in stands.versions):
            real(firm.registry, name, {first: second})
        elif what == "admit" and first in stands.versions:
            firm.admit(first)
        elif what == "verdict":
            firm.advance(verdict={"verdict": first})
        elif what == "roll back":
            step_back(name, firm.registry, firm.ledger, first, actor="ann", reason="harm", trigger="person")
        elif what == "lift":
            lift(name, firm.registry, firm.ledger, first, actor="ann", reason="no harm")
        elif what == "delete" and first in stands.versions:
            firm.registry.client.delete_model_version(name, str(first))
        elif what == "reconcile":
            firm.reconcile(passes if first else refuses)

    for what, first, second in steps:
        crashes = what in ("admit", "verdict", "roll back", "lift", "reconcile") and second
        with pytest.MonkeyPatch.context() as patch:
            if crashes:
                for instant in ("follow", "lift"):
                    patch.setattr(Registry, instant, lambda *_: (_ for _ in ()).throw(Killed()))
            try:
                act(what, first, second)
            except (Killed, ModelBlocked, ModelMissing, NotBlocked):
                continue
    firm.reconcile(refuses)
    state, stands = live(firm.ledger, name), firm.registry.standing(name)
    if not stands.versions:
        return  # taken for a registry that is lost: nothing is concluded from it
    wanted = {k: v for k, v in aliases(state).items() if v is not None}
    assert stands.aliases == wanted, (stands.aliases, wanted)
    assert not set(wanted.values()) & set(state["blocked"]) and set(wanted.values()) <= set(stands.versions)
    assert all(stands.versions[n].blocked for n in state["blocked"] if n in stands.versions)
    assert not any(stands.versions[n].blocked for n in state["lifted"] if n in stands.versions)
    assert firm.reconcile(never) == [] and promoting.pending(firm.registry, firm.ledger, name) == []


def test_a_registry_that_the_ledger_never_knew_is_stepped_back_too(
    registry: Registry, ads: WorkflowHarness, tmp_path: Path
) -> None:
    """Aliases set before the ledger spoke are nobody's request."""
    with opened(tmp_path, [ads.morning(ads.last, 9)]) as book:
        assert step_back(NAME, registry, book, 2, actor="ann", reason="harm", trigger="person") == 1
        assert registry.standing(NAME).aliases == {CHAMPION: 1}
        told = [(p.version, p.action) for p in book.promotions(NAME)]
    assert told == [(1, "promoted"), (2, "promoted"), (2, "rolled back"), (1, "promoted")]


def test_a_canary_needs_units_in_its_arm(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / NAME, tmp_path / NAME))
    text = (folder / "workflow.yaml").read_text()
    (folder / "workflow.yaml").write_text(text.replace("  shadow_days: 1\n", "  shadow_days: 1\n  canary_days: 7\n"))
    with pytest.raises(WorkflowInvalid, match=r"promotion: canary_days: 7 days need units .* arms\.shares"):
        load(folder)
    more = (folder / "workflow.yaml").read_text().replace("explore: 0.4}", "explore: 0.2, challenger: 0.2}")
    (folder / "workflow.yaml").write_text(more)
    assert load(folder).promotion == Promotion(shadow_days=1, canary_days=7)
    # nobody would ever give the verdict that it waits for
    for section, wanted in (("regression", r"promotion: canary_days: 7 days .* write a section regression"),
                            ("delivery", r"delivery: promotion\.canary_days: 7 days .* write a section delivery")):  # fmt: skip
        (folder / "workflow.yaml").write_text(re.sub(rf"^{section}:\n(?:(?:[ #].*)?\n)*", "", more, flags=re.M))
        with pytest.raises(WorkflowInvalid, match=wanted):
            load(folder)


def test_a_specification_of_an_earlier_release_is_still_read(firm: Firm) -> None:
    """Fields that have left the format since decide nothing any more; what cannot be understood says so."""
    lake, table = firm.bench.lake, firm.workflow.table("specs")
    said = json.loads(firm.workflow.model_dump_json(exclude={"folder"}))
    older = {**said, "drift": {**said["drift"], "cooldown_days": 7}, "model": {**said["model"], "no_more": {"a": 1}}}
    broken = {**older, "cutoff": "noon"}
    for digest, one in (("older", older), ("broken", broken)):
        row = pa.table({"digest": [digest], "said": [json.dumps(one)], "kept": ["spec"]})
        lake.replace(table, row, predicate=f"digest = '{digest}'", partition_by=["kept"])
    read = replay.spec_of(NAME, lake, "older")
    assert read.model_dump_json(exclude={"folder"}) == firm.workflow.model_dump_json(exclude={"folder"})
    with pytest.raises(replay.ReplayImpossible, match="not understood any more"):
        replay.spec_of(NAME, lake, "broken")


def test_an_operation_reads_the_ledgers_promotions_once(firm: Firm, monkeypatch: pytest.MonkeyPatch) -> None:
    firm.admit(3)
    reads: list[str] = []
    real = Ledger.promotions
    monkeypatch.setattr(Ledger, "promotions", lambda self, name: [reads.append(name), real(self, name)][1])
    name, day = firm.workflow.name, firm.day

    def counted(ask: Callable[[], Any]) -> int:
        reads.clear()
        ask()
        return len(reads)

    assert counted(lambda: lineup(firm.registry, firm.ledger, name, day)) == 1
    assert counted(lambda: candidate_evaluation.champion_of(firm.workflow, firm.registry, firm.ledger, day)) == 1
    assert counted(lambda: loop_health.examine(firm.ledger, firm.workflow, until=firm.moment[0])) == 1
    assert counted(lambda: verdicts.comparisons(firm.workflow, firm.ledger, day)) == 1
