"""The home page over HTTP, on a real ledger, lake and advertising sandbox: what it shows, and what its forms may do."""

from __future__ import annotations

import html
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest
import uvicorn
from itsdangerous import URLSafeTimedSerializer

from assets.resources import resources
from delivery import approvals
from delivery.ledger import BatchRow, Ledger
from orchestration.web import app
from orchestration.web.site import Site
from pipeline import dispatch
from pipeline.decisions import batch_review
from tests.orchestration.cli.test_operations import Office, office  # noqa: F401

SECRET = "marked secret, nobody else's"
NAME = "ad_budget"


class Morning(Office):
    """The office at six in the morning after its day."""

    def now(self) -> datetime:
        return self.bench.morning(self.bench.last, 6)

    def ledger(self) -> Ledger:
        book: Ledger = resources()["ledger"].open(self.now)
        return book

    def stands(self, batch_id: str) -> approvals.Standing:
        with self.ledger() as book:
            return approvals.standing(book, book.batch(batch_id), self.now(), four_eyes=False)

    def deliver(self, batch: BatchRow) -> None:
        connector = dispatch.connect(self.bench.workflow, self.now)
        try:
            with self.ledger() as book:
                done = dispatch.deliver(
                    self.bench.workflow, book, connector, batch, run_id="run-2", clock=self.now, sleep=time.sleep
                )
        finally:
            connector.close()
        assert done.report is not None and done.report.complete


@dataclass
class Browser:
    """A browser at the home page: it keeps cookies and fills in forms."""

    http: httpx.Client

    def get(self, path: str, status: int = 200) -> str:
        answer = self.http.get(path, follow_redirects=True)
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer.text

    def form(self, path: str, act: str) -> dict[str, str]:
        """The hidden fields of the form on a page that asks for ``act``."""
        text = self.get(path)
        (body,) = re.findall(rf'<form method="post" action="/act/{act}">(.*?)</form>', text, re.S)
        return dict(re.findall(r'type="hidden" name="([^"]*)" value="([^"]*)"', body))

    def post(self, act: str, form: dict[str, str], status: int = 200, **typed: str) -> str:
        asked = {"reason": "looked at it", "name": "ann", "secret": SECRET, **form, **typed}
        answer = self.http.post(f"/act/{act}", data=asked)
        assert answer.status_code == status, (act, answer.status_code, answer.text)
        assert SECRET not in answer.text
        return answer.text


@pytest.fixture
def morning(office: Office, monkeypatch: pytest.MonkeyPatch) -> Morning:  # noqa: F811
    at_six = Morning(office.bench, office.registry, office.account, office.home)
    monkeypatch.setattr(office.account, "_clock", at_six.now)  # its change history is asked for by our clock
    return at_six


@pytest.fixture
def guard() -> app.Guard:
    return app.Guard()


@pytest.fixture
def address(morning: Morning, guard: app.Guard) -> Iterator[str]:
    server = uvicorn.Server(
        uvicorn.Config(app.build(Site.of_settings(morning.now), guard), port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    assert server.started
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def browser(address: str) -> Iterator[Browser]:
    with httpx.Client(base_url=address, timeout=60) as http:
        yield Browser(http)


@pytest.fixture
def held(morning: Morning) -> BatchRow:
    row = morning.decide(max_total_change=0.0001)
    assert row.status == "HELD"
    with morning.ledger() as book:
        approvals.enrol(book, "ann", SECRET)
    return row


def test_today_says_what_waits_for_whom_and_leads_to_it(morning: Morning, browser: Browser, held: BatchRow) -> None:
    text = browser.get("/")
    assert f'href="/batch/{held.batch_id}"' in text and f"1 approval(s) for {held.day}" in text
    batch = browser.get(f"/batch/{held.batch_id}")
    with morning.ledger() as book:
        seen = batch_review.review(book, morning.bench.workflow, held.batch_id, morning.now())
    assert held.digest in batch and seen.objections and all(html.escape(o) in batch for o in seen.objections)
    assert batch.count("/decision/") > 0


def test_a_held_batch_is_approved_by_a_proven_person_for_what_the_page_showed(
    morning: Morning, browser: Browser, held: BatchRow
) -> None:
    form = browser.form(f"/batch/{held.batch_id}", "approve")
    assert "the secret is wrong" in browser.post("approve", form, 400, secret="not the secret at all")
    assert "lacks reason" in browser.post("approve", form, 400, reason=" ")
    assert "not what the page showed" in browser.post("approve", form, 400, digest="0" * 64)
    assert not morning.stands(held.batch_id).ok
    assert "approved by ann" in browser.post("approve", form)
    assert morning.stands(held.batch_id).who == ("ann",)
    assert "/act/approve" not in browser.get(f"/batch/{held.batch_id}")


def test_a_form_counts_in_the_browser_for_which_it_was_made_and_not_for_ever(
    morning: Morning, browser: Browser, held: BatchRow, address: str, guard: app.Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = browser.form(f"/batch/{held.batch_id}", "approve")
    assert "not made by this server" in browser.post("approve", {**form, "token": ""}, 403)
    assert "not made by this server" in browser.post("approve", {**form, "token": form["token"][:-2] + "xx"}, 403)
    with httpx.Client(base_url=address, timeout=60) as http:
        other = Browser(http)
        assert "another browser" in other.post("approve", form, 403)  # no cookie: a form on a stranger's page
        other.get("/")
        assert "another browser" in other.post("approve", form, 403)
    monkeypatch.setattr(
        URLSafeTimedSerializer, "loads",
        lambda self, token, max_age, real=URLSafeTimedSerializer.loads: real(self, token, max_age=-1),
    )  # fmt: skip
    assert "older than 30 minutes" in browser.post("approve", form, 403)
    assert not morning.stands(held.batch_id).ok


def test_another_host_name_and_a_form_that_never_ends_get_nothing(
    browser: Browser, held: BatchRow, morning: Morning
) -> None:
    assert browser.http.get("/", headers={"Host": "rebound.example"}).status_code == 400
    assert browser.http.post("/act/stop", content=b"a" * (app.LARGEST_FORM + 1)).status_code == 413
    assert browser.http.get("/act/stop").status_code in (404, 405)


def test_a_workflow_is_stopped_and_let_go_on(morning: Morning, browser: Browser, held: BatchRow) -> None:
    form = browser.form(f"/{NAME}/", "stop")
    assert "the secret is wrong" in browser.post("stop", form, 400, name="bob")
    with morning.ledger() as book:
        assert book.stopped(NAME) is None
    assert "stopped (ann: looked at it)" in browser.post("stop", form)
    with morning.ledger() as book:
        stop = book.stopped(NAME)
    assert stop is not None and (stop.actor, stop.reason) == ("ann", "looked at it")
    assert "stopped by ann" in browser.get("/")
    browser.post("resume", browser.form(f"/{NAME}/", "resume"))
    with morning.ledger() as book:
        assert book.stopped(NAME) is None


def test_a_blocked_version_is_let_go_on(morning: Morning, browser: Browser, held: BatchRow) -> None:
    with morning.ledger() as book:
        book.promotion(NAME, 1, "rolled back", "guard", {"reason": "it did harm", "trigger": "guard"})
    form = browser.form(f"/{NAME}/", "lift")
    assert form["version"] == "1"
    assert "no version of a model" in browser.post("lift", {**form, "version": "1; 2"}, 400)
    assert "the secret is wrong" in browser.post("lift", form, 400, secret="not the secret at all")
    assert "version 1 may go on (ann: looked at it)" in browser.post("lift", form)
    with morning.ledger() as book:
        assert [(p.action, p.actor) for p in book.promotions(NAME)][-1] == ("lifted", "ann")
    assert "/act/lift" not in browser.get(f"/{NAME}/")


def test_a_batch_is_taken_back_after_its_difference_was_seen_and_a_persons_value_stays(
    morning: Morning, browser: Browser
) -> None:
    with morning.ledger() as book:
        approvals.enrol(book, "ann", SECRET)
    row = morning.decide()
    before = morning.account.amounts()
    morning.deliver(row)
    changed = sorted(e for e, value in morning.decided("after").items() if value != before[e])
    morning.account.by_hand(changed[0], 7_770_000)

    page = f"/batch/{row.batch_id}/rollback"
    text = browser.get(page)
    assert f"{len(changed) - 1} of" in text and morning.account.amounts()[changed[1]] != before[changed[1]]
    said = browser.post("rollback", browser.form(page, "rollback"))
    assert "Taken back" in said and changed[0] in said
    assert morning.account.amounts() == {**before, changed[0]: 7_770_000}
    assert "taken back" in browser.get(f"/{NAME}/{row.day}/")
    assert "/act/rollback" not in browser.get(f"/batch/{row.batch_id}")


def test_a_decision_is_found_by_how_it_begins_and_tells_its_chain(morning: Morning, browser: Browser) -> None:
    morning.decide()
    one = next(d for d in morning.bench.decided(morning.bench.last) if d["changed"] and d["arm"] == "champion")
    listed = browser.get(f"/find?q={one['entity_id'][:4]}")
    assert f"/decision/{one['decision_id']}" in listed
    chain = browser.get(f"/find?q={one['decision_id']}")  # the one is shown at once
    assert one["entity_id"] in chain and one["reasons"][0] in chain.replace("&#39;", "'")
    assert "the same decision to the bit" in chain and "What would have changed it" not in chain
    searched = browser.get(f"/decision/{one['decision_id']}?search=yes")
    assert "What would have changed it" in searched and "re-decisions" in searched
    assert "&lt;script&gt;" in (odd := browser.get("/find?q=<script>")) and "<script" not in odd


def test_a_day_shows_what_arrived_and_leads_to_its_pages_and_batches(morning: Morning, browser: Browser) -> None:
    row = morning.decide()
    report = Path(resources()["reports"].root, NAME, row.day.isoformat(), "drift.html")
    report.parent.mkdir(parents=True)
    report.write_text("a page of a stage")
    text = browser.get(f"/{NAME}/{row.day}/")
    assert "landed" in text and f'href="/batch/{row.batch_id}"' in text
    assert f'href="/{NAME}/{row.day - timedelta(days=1)}/"' in text
    (link,) = re.findall(r'href="(/[^"]*drift.html)"', text)
    assert browser.get(link) == "a page of a stage"
    assert f'href="/{NAME}/{row.day}/"' in browser.get(f"/{NAME}/")


@pytest.mark.parametrize(
    "path",
    [
        "/nobody/",
        f"/{NAME}/2026-13-01/",
        "/ad_budget/2026-04-01/none.html",
        "/..%2f..%2fledger.key",
        "/%2e%2e/ledger.key",
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(browser: Browser, path: str) -> None:
    assert "There is no page" in browser.get(path, 404)


def test_an_unknown_batch_or_decision_says_the_way_out(browser: Browser, morning: Morning) -> None:
    assert "signalbox batches" in browser.get("/batch/none", 400)
    assert "none" in browser.get("/decision/none", 400)
