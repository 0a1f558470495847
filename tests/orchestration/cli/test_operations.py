"""The operations owner's commands, on a real ledger and over HTTP to the advertising sandbox."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from assets.resources import resources
from delivery.approvals import NotAuthenticated
from delivery.connectors import google_ads
from delivery.connectors.base import Written
from delivery.ledger import BatchRow, Ledger, utc_now
from delivery.push import Stopped
from delivery.sandbox import advertising_account, advertising_api, advertising_server
from delivery.sandbox.worlds import advertising
from models.policies.allocation import money_text
from models.registry import Registry
from orchestration.cli import command, console
from pipeline import dispatch
from tests.conftest import WorkflowHarness

SECRET = "marked secret, nobody else's"
TOKEN = "marked-token-0123456789"


@dataclass
class Office:
    """A state folder with a decided day, and the account that its budgets stand in."""

    bench: WorkflowHarness
    registry: Registry
    account: advertising_api.AdvertisingSandbox
    home: Path

    def __call__(self, *words: str, typed: str = "") -> Result:
        return CliRunner().invoke(command.app, list(words), input=typed)

    def json(self, *words: str, typed: str = "") -> Any:
        result = self(*words, "--json", typed=typed)
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(result.stdout)

    def decide(self, **guardrails: Any) -> BatchRow:
        said = self.bench.workflow
        tight = said.model_copy(update={"guardrails": said.guardrails.model_copy(update=guardrails)})
        batch = replace(self.bench, workflow=tight).decide(self.registry, self.bench.last)
        with self.ledger() as book:
            return dispatch.record(
                tight, book, self.bench.last, batch, decided_at=self.bench.morning(self.bench.last), run_id="run-1"
            )

    def ledger(self) -> Ledger:
        book: Ledger = resources()["ledger"].open(utc_now)
        return book

    def decided(self, column: str) -> dict[str, int]:
        return {d["entity_id"]: d[column] for d in self.bench.decided(self.bench.last)}


@pytest.fixture
def office(
    ads: WorkflowHarness, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Office]:
    bench = ads.copy(tmp_path / "bench")
    world = advertising.World(7, "easy", 24, origin=bench.workflow.start)
    rows = advertising.history(world, bench.workflow.start, len(bench.days))
    account = advertising_api.AdvertisingSandbox(
        tmp_path / "account", world, next_day=bench.last + timedelta(days=1), token=TOKEN,
        budgets=advertising_account.budgets_of(rows), customer_id="1000000001", user_email="signalbox@example.org",
    )  # fmt: skip
    with advertising_server.serve(account) as server:
        for name, value in {
            "SIGNALBOX_HOME": str(tmp_path / "home"), "SIGNALBOX_LAKE": str(bench.root / "lake"),
            "SIGNALBOX_MLFLOW_URI": registry.uri, "SIGNALBOX_MLFLOW_ARTIFACTS": registry.artifacts,
            "SIGNALBOX_ADS_TOKEN": TOKEN, "SIGNALBOX_ADS_ENDPOINT": server.url.rstrip("/"),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        (tmp_path / "home").mkdir()
        yield Office(bench, registry, account, tmp_path / "home")
    account.close()


def test_a_batch_is_looked_at_tried_dry_delivered_and_explained(office: Office) -> None:
    row = office.decide()
    shown = office.json("show", row.batch_id)
    assert shown["status"] == "READY" and shown["delivery"] == "NONE" and shown["changed"] == row.changed
    assert sum(t["changed"] for t in shown["totals"].values()) == row.changed
    dry = office.json("deliver", "ad_budget", "--dry-run")
    before, after = office.decided("before"), office.decided("after")
    assert {r["entity"]: (r["now"], r["would"]) for r in dry["rows"] if r["action"] == "SEND"} == {
        e: (before[e], after[e]) for e in after if after[e] != before[e]
    }
    assert office.account.amounts() == before, "a dry run writes nothing"

    report = office.json("deliver", row.batch_id, "--late")

    assert report["complete"] and report["counts"] == {"ACKED": row.changed}
    assert office.account.amounts() == after
    changed = next(d for d in office.bench.decided(office.bench.last) if d["changed"] and d["arm"] == "champion")
    why = office.json("explain", changed["decision_id"], "--live")
    told = json.dumps(why)
    assert str(changed["after"]) in told and row.batch_id in told
    assert office(*["explain", changed["decision_id"]]).exit_code == 0
    verdict = office.json("verify", "--export", str(office.home / "head.json"))
    assert verdict["ok"] and office.json("verify", "--head", str(office.home / "head.json"))["ok"]
    again = office.json("deliver", row.batch_id, "--late")
    assert again["complete"] and again["sends"] == 0


def test_a_batch_is_shown_by_what_its_id_begins_with_or_by_workflow_and_day(office: Office) -> None:
    row = office.decide()
    for words in ((row.batch_id[:-6],), ("ad_budget",), ("ad_budget", row.day.isoformat())):
        assert office.json("show", *words)["batch"] == row.batch_id
    office.decide(max_total_change=0.0001)
    refused = office("show", f"ad_budget-{row.day}")
    assert refused.exit_code == 2 and "2 batches begin with" in " ".join(refused.output.split())
    assert office("show", "ad_budget", "yesterday").exit_code == 2


@pytest.mark.parametrize("columns", [80, 120])
def test_ids_stand_whole_and_money_in_units(office: Office, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(console.console, "_width", columns)
    row = office.decide()
    assert row.batch_id in office("batches", "ad_budget").output
    largest = office.json("decisions", "ad_budget", "--limit", "1")[0]
    said = office("decisions", "ad_budget", "--limit", "1").output
    assert largest["decision_id"] in said and money_text(largest["after"]) in said and str(largest["after"]) not in said


def test_show_prints_the_value_that_stands(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours where it has replaced somebody's, what the system made of ours, and what the pool had money for."""
    row = office.decide()
    office.json("deliver", row.batch_id, "--late")
    largest = [one for one in office.json("show", row.batch_id)["largest changes"] if one["before"] != one["after"]][:3]
    assert all(one["stands"] == one["after"] for one in largest)
    names = [one["entity_id"] for one in largest]
    became: dict[str, dict[str, Any]] = {
        names[0]: {"state": "OVERWRITTEN", "observed": 5_110_000, "says": "kim set 5110000"},
        names[1]: {"state": "REJECTED", "observed": 5_220_000, "says": "stored 5220000"},
        names[2]: {"sent": 5_330_000, "observed": 5_330_000},
    }
    real = Ledger.deliveries

    def other(self: Ledger, *asked: Any) -> list[Any]:
        return [replace(d, **became.get(d.entity or "", {})) for d in real(self, *asked)]

    monkeypatch.setattr(Ledger, "deliveries", other)
    shown = office.json("show", row.batch_id)
    assert [one["stands"] for one in shown["largest changes"][:3]] == [largest[0]["after"], 5_220_000, 5_330_000]
    assert {d["entity"]: d["stands"] for d in shown["not as intended"]} == {
        names[0]: largest[0]["after"],
        names[1]: 5_220_000,
    }
    said = " ".join(office("show", row.batch_id).output.split())
    assert f"there {largest[0]['after'] / 1e6:,.2f}. kim set 5110000" in said
    assert "there 5.22. stored 5220000" in said and "there 5.33" in said and "5.11" not in said


def test_a_batch_whose_day_is_over_is_not_sent_unasked(office: Office) -> None:
    row = office.decide()
    result = office("deliver", row.batch_id)
    assert isinstance(result.exception, dispatch.TooLate) and "--late" in str(result.exception)
    assert office.account.amounts() == office.decided("before")


def test_a_held_batch_waits_for_somebody_who_proves_who_they_are(office: Office) -> None:
    row = office.decide(max_changed=1)
    shown = office.json("show", row.batch_id)
    assert shown["status"] == "HELD" and "waits for 1 more person" in shown["approval"]
    assert shown["findings"][0]["name"] == "changed"
    assert office("deliver", row.batch_id, "--late").exit_code == 1
    assert office.account.amounts() == office.decided("before")
    assert office("approvers", "add", "robin", typed=f"{SECRET}\n").exit_code == 0
    wrong = office("approve", row.batch_id, "--as", "robin", "--reason", "as planned", typed="something else!\n")
    assert isinstance(wrong.exception, NotAuthenticated)
    assert office("deliver", row.batch_id, "--late").exit_code == 1

    given = office.json("approve", row.batch_id, "--as", "robin", "--reason", "as planned", typed=f"{SECRET}\n")

    assert given["may_go"] and given["approved_by"] == ["robin"]
    assert office.json("deliver", row.batch_id, "--late")["complete"]
    assert office.account.amounts() == office.decided("after")
    assert [a["name"] for a in office.json("approvers", "list")["approvers"]] == ["robin"]
    assert office("approvers", "revoke", "robin").exit_code == 0
    for file in office.home.rglob("*"):
        if file.is_file():
            found = file.read_bytes()
            assert SECRET.encode() not in found and TOKEN.encode() not in found, file


def test_a_stopped_workflow_sends_nothing_until_somebody_lets_it(office: Office) -> None:
    row = office.decide()
    assert office.json("stop", "ad_budget", "--reason", "odd figures", "--as", "kim")["stopped"]
    result = office("deliver", row.batch_id, "--late")
    assert isinstance(result.exception, Stopped) and "odd figures" in str(result.exception)
    assert "odd figures" in office("show", row.batch_id).output
    assert office.account.amounts() == office.decided("before")
    assert not office.json("resume", "ad_budget", "--reason", "explained", "--as", "kim")["stopped"]
    assert office.json("deliver", row.batch_id, "--late")["complete"]


def test_a_rollback_restores_what_stood_and_leaves_a_human_change_alone(office: Office) -> None:
    row = office.decide()
    office.json("deliver", row.batch_id, "--late")
    before, after = office.decided("before"), office.decided("after")
    lowered = next(e for e in sorted(after) if after[e] < before[e])
    office.account.by_hand(lowered, after[lowered] - 10_000)

    result = office("rollback", row.batch_id, "--reason", "it does harm", "--as", "kim", "--json")

    report = json.loads(result.stdout)
    (one,) = report["batches"]
    assert [left["entity"] for left in one["conflicts"]] == [lowered]
    amounts = office.account.amounts()
    assert amounts[lowered] == after[lowered] - 10_000
    assert sum(amounts.values()) <= sum(before.values())
    restored = {e for e in before if e != lowered and after[e] != before[e] and amounts[e] == before[e]}
    assert one["restored"] == len(restored) and office.json("verify")["ok"]
    again = json.loads(office("rollback", row.batch_id, "--reason", "once more", "--json").stdout)
    assert again["batches"][0]["already"] == one["complete"] and office.account.amounts() == amounts


def test_a_rollback_is_tried_first_with_the_totals_and_the_largest_changes(office: Office) -> None:
    row = office.decide()
    office.json("deliver", row.batch_id, "--late")
    before, after = office.decided("before"), office.decided("after")
    dry = office.json("rollback", row.batch_id, "--dry-run")
    (diff,) = dry["batches"]
    assert {r["entity"]: (r["now"], r["would"]) for r in diff["rows"] if r["action"] == "SEND"} == {
        e: (after[e], before[e]) for e in after if after[e] != before[e]
    }
    with office.ledger() as book:
        head, arms = (
            book.head(),
            dict(zip(*(book.decisions(row.batch_id)[c].to_pylist() for c in ("entity_id", "arm")), strict=True)),
        )
    lines = office("rollback", row.batch_id, "--dry-run").output.splitlines()
    for arm in {arms[e] for e in after if after[e] != before[e]}:
        steps = [before[e] - after[e] for e in after if arms[e] == arm and after[e] != before[e]]
        up, down = (sum(s for s in steps if s > 0) / 1e6, -sum(s for s in steps if s < 0) / 1e6)
        assert f"  arm {arm}: {len(steps)} change, up {up:,.2f}, down {down:,.2f}" in lines
    shown = [line.split()[1].rstrip(":") for line in lines if line.startswith("  SEND")]
    sizes = [abs(after[e] - before[e]) for e in shown]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == max(abs(after[e] - before[e]) for e in after)
    assert office.account.amounts() == after, "nothing was written"
    with office.ledger() as book:
        assert book.head() == head and not book.rollbacks()
    assert office("rollback", row.batch_id, "--dry-run", "--close").exit_code == 2
    assert office("rollback", row.batch_id).exit_code == 2, "a reason is asked for"


def test_a_rollback_that_finds_nothing_is_not_complete_and_a_named_person_closes_it(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = office.decide()
    office.json("deliver", row.batch_id, "--late")
    gone = next(e for e, value in office.decided("after").items() if value != office.decided("before")[e])
    read = google_ads.GoogleAds.read

    def without(self: Any, keys: Any) -> Any:
        found = read(self, keys)
        return {k: replace(r, state="missing", value=None) if k == gone else r for k, r in found.items()}

    monkeypatch.setattr(google_ads.GoogleAds, "read", without)
    result = office("rollback", row.batch_id, "--reason", "harm", "--as", "kim", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["complete"]
    assert gone in [left["entity"] for left in report["batches"][0]["open"]]
    plain = office("rollback", row.batch_id, "--reason", "harm", "--as", "kim")
    assert plain.exit_code == 1 and "NOT complete" in plain.output and "is not there downstream" in plain.output

    ended = office.json("rollback", row.batch_id, "--close", "--as", "robin", "--reason", "the line was deleted")

    (one,) = ended["batches"]
    assert ended["complete"] and one["closed"] and gone in [left["entity"] for left in one["not_reversible"]]
    with office.ledger() as book:
        assert [(r.action, r.actor) for r in book.rollbacks(row.batch_id)][-1] == ("closed", "robin")
    assert "closed by a person" in office("rollback", row.batch_id, "--reason", "again").output
    assert office.json("verify")["ok"]


def test_a_rollback_names_what_the_retention_removed(office: Office) -> None:
    row = office.decide()
    office.json("deliver", row.batch_id, "--late")
    with office.ledger() as book:
        book.clock = lambda: utc_now() + timedelta(days=400 * 365)
        assert book.retention(1) == [row.batch_id]
    version = str(row.record["model_version"])
    result = office("rollback", "--workflow", "ad_budget", "--model", version, "--reason", "harm", "--as", "kim")
    assert result.exit_code == 0 and f"{row.batch_id}: older than the retention" in " ".join(result.output.split())
    tried = office("rollback", "--workflow", "ad_budget", "--model", version, "--dry-run")
    assert tried.exit_code == 0 and "the retention policy removed" in " ".join(tried.output.split())


def test_a_push_of_which_everything_was_refused_ends_non_zero(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    row = office.decide()
    monkeypatch.setattr(
        google_ads.GoogleAds,
        "apply",
        lambda self, writes, validate_only=False: [Written(w.key, "refused", "no") for w in writes],
    )
    result = office("deliver", row.batch_id, "--late", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["complete"] and report["failed"].startswith("none of")
    assert "FAILED: none of" in office("deliver", row.batch_id, "--late").output


def test_what_a_write_changed_besides_is_printed_and_counted(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    row = office.decide()
    read, writes = google_ads.GoogleAds.read, set()
    apply = google_ads.GoogleAds.apply

    def seen(self: Any, keys: Any) -> Any:
        found = read(self, keys)
        return {k: replace(r, watched={"team": "" if k in writes else "sales"}) for k, r in found.items()}

    def applied(self: Any, asked: Any, *, validate_only: bool = False) -> Any:
        if not validate_only:
            writes.update(w.key for w in asked)
        return apply(self, asked, validate_only=validate_only)

    monkeypatch.setattr(google_ads.GoogleAds, "read", seen)
    monkeypatch.setattr(google_ads.GoogleAds, "apply", applied)
    result = office("deliver", row.batch_id, "--late")
    assert f"other watched fields of {row.changed} changed" in " ".join(result.output.split()), result.output
    shown = office.json("show", row.batch_id)
    assert len(shown["changed besides"]) == row.changed and "team" in shown["changed besides"][0]["says"]
    assert f"watched fields of {row.changed} changed with the value" in " ".join(
        office("show", row.batch_id).output.split()
    )
    back = office.json("rollback", row.batch_id, "--reason", "harm", "--as", "kim")
    assert len(back["batches"][0]["beside"]) >= row.changed


def test_a_rollback_of_a_model_takes_its_batches_back_and_the_version_out(office: Office) -> None:
    row = office.decide()
    office.json("deliver", row.batch_id, "--late")
    version = row.record["model_version"]

    report = office.json(
        "rollback", "--workflow", "ad_budget", "--model", str(version), "--reason", "harm", "--as", "kim"
    )

    assert [b["batch_id"] for b in report["batches"]] == [row.batch_id] and report["complete"]
    assert office.account.amounts() == office.decided("before")
    held = office.registry.by_alias("ad_budget", "champion")
    assert held is not None and held.number != version
    assert "harm" in office.registry.by_number("ad_budget", version).blocked
    with office.ledger() as book:
        told = [(p.version, p.action) for p in book.promotions("ad_budget")]
        assert told[-2:] == [(version, "rolled back"), (held.number, "promoted")], (
            "who stands in is live by the ledger too"
        )
    assert office.json("lift", "ad_budget", str(version), "--reason", "was the data", "--as", "kim")["lifted"]
    assert not office.registry.by_number("ad_budget", version).blocked


def test_a_lift_with_mlflow_down_stands_in_the_ledger_and_says_so(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    with office.ledger() as book:
        book.promotion("ad_budget", 1, "rolled back", "kim", {"reason": "harm"})
    monkeypatch.setattr(Registry, "standing", lambda *_: (_ for _ in ()).throw(OSError("nobody answers")))
    result = office("lift", "ad_budget", "1", "--reason", "was the data", "--as", "kim")
    assert result.exit_code == 0, (result.output, result.exception)
    said = " ".join(result.output.split())
    assert "MLflow still says that it is blocked, it could not be told (nobody answers)" in said and "reconcile" in said
    with office.ledger() as book:
        assert [p.action for p in book.promotions("ad_budget")][-1] == "lifted"


def test_everything_since_a_day_is_taken_back_whoever_decided_it(office: Office) -> None:
    row = office.decide()
    office.json("deliver", row.batch_id, "--late")
    report = office.json("rollback", "--since", str(row.day), "--reason", "a bad feed since then", "--as", "kim")
    assert [b["batch_id"] for b in report["batches"]] == [row.batch_id] and report["complete"]
    assert office.account.amounts() == office.decided("before")


def test_a_ledger_that_was_edited_does_not_verify(office: Office) -> None:
    row = office.decide()
    assert office("verify").exit_code == 0
    with sqlite3.connect(office.home / "ledger.db") as database:
        database.execute("UPDATE decisions SET after = after + 10000 WHERE n = 3")
    database.close()
    result = office("verify", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert not said["ok"] and row.batch_id in " ".join(said["problems"])


def test_a_forgotten_name_is_gone_and_the_chain_stands(office: Office) -> None:
    row = office.decide()
    office.json("forget", "line-0001")
    assert "line-0001" not in office("show", row.batch_id, "--json").stdout
    assert office.json("verify")["ok"]


def test_rows_are_removed_by_a_stated_policy_only_and_the_chain_stands(office: Office) -> None:
    row = office.decide()
    assert office.json("retain", "--days", "1")["batches"] == [], "it was never delivered: it is not finished"
    office.json("deliver", row.batch_id, "--late")
    assert office("retain", "--days", "0").exit_code != 0
    assert office.json("retain", "--days", "1")["batches"] == [row.batch_id]
    assert office.json("verify")["ok"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "no-such-batch"), "no-such-batch"),
        (("rollback", "no-such-batch", "--reason", "r"), "no-such-batch"),
        (("explain", "no-such-decision"), "no-such-decision"),
        (("stop", "no_such_workflow", "--reason", "r"), "no_such_workflow"),
    ],
)
def test_what_does_not_exist_is_named(office: Office, words: tuple[str, ...], says: str) -> None:
    result = office(*words)
    assert result.exit_code != 0 and says in result.output + str(result.exception)


def test_a_secret_is_rotated_by_who_knows_it(office: Office) -> None:
    row = office.decide(max_changed=1)
    office("approvers", "add", "robin", typed=f"{SECRET}\n")
    assert office("approvers", "rotate", "robin", typed=f"wrong\n{SECRET} 2\n").exit_code != 0
    assert office("approvers", "rotate", "robin", typed=f"{SECRET}\n{SECRET} 2\n").exit_code == 0
    words = ("approve", row.batch_id, "--as", "robin", "--reason", "as planned")
    assert isinstance(office(*words, typed=f"{SECRET}\n").exception, NotAuthenticated)
    assert office.json(*words, typed=f"{SECRET} 2\n")["may_go"]


def test_a_dry_run_of_a_stopped_workflow_still_shows_what_would_be_sent(office: Office) -> None:
    row = office.decide()
    office("stop", "ad_budget", "--reason", "odd figures")
    dry = office.json("deliver", row.batch_id, "--dry-run")
    assert sum(r["action"] == "SEND" for r in dry["rows"]) == row.changed
    assert any("odd figures" in note for note in dry["notes"]) and any("day is over" in note for note in dry["notes"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("rollback", "--reason", "r"), "name one of"),
        (("rollback", "--since", "heute", "--workflow", "ad_budget", "--reason", "r"), "'heute' is not a day"),
        (("deliver", "ad_budget", "--day", "heute"), "'heute' is not a day"),
        (("deliver", "ad_budget", "--day", "2026-03-03"), "materialise [ad_budget, decisions]"),
        (("forget", "nobody"), "knows no 'nobody'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(office: Office, words: tuple[str, ...], says: str) -> None:
    import subprocess
    import sys

    office.decide()
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.cli.command", *words], capture_output=True, text=True, check=False
    )
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode != 0 and says in said and "Traceback" not in said, said


def test_again_is_refused_where_nothing_is_decided() -> None:
    result = CliRunner().invoke(command.app, ["run", "ad_budget", "deliver", "--again"])
    assert result.exit_code == 2 and "--again" in result.output
