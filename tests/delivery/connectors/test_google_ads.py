"""The Google Ads connector: over real HTTP against the sandbox, and against servers that lie, drip, redirect or hang."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from delivery.connectors import google_ads, google_ads_settings
from delivery.connectors.base import Connector, Misconfigured, Reading, Unavailable, Write, Written
from delivery.connectors.google_ads import GoogleAds, GoogleAdsSettings, connect
from delivery.sandbox.advertising_api import AdvertisingSandbox, Refusal, Trouble
from delivery.sandbox.advertising_server import Server, serve
from delivery.sandbox.worlds import advertising
from tests.support.properties import examples

TOKEN = "ya29.marked-secret-token"
WORLD = advertising.World(3, "easy", 40)
LINES: list[str] = WORLD.line_id.tolist()
OWN = "signalbox@example.com"


def now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def opened(url: str, *, environ: dict[str, str] | None = None, **more: Any) -> GoogleAds:
    given_settings = {"customer_id": "123-456-7890", "endpoint": url, "token_env": "ADS_TOKEN", "timeout_s": 5} | more
    env = {"ADS_TOKEN": TOKEN} if environ is None else environ
    return connect(GoogleAdsSettings(**given_settings), environ=env, folder=Path(), clock=now)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[AdvertisingSandbox]:
    made = AdvertisingSandbox(tmp_path, WORLD, next_day=date(2026, 3, 2), token=TOKEN, user_email=OWN)
    yield made
    made.close()


@pytest.fixture
def server(sandbox: AdvertisingSandbox) -> Iterator[Server]:
    with serve(sandbox) as running:
        yield running


@pytest.fixture
def ads(server: Server) -> Iterator[GoogleAds]:
    made = opened(server.url, user_email=OWN)
    yield made
    made.close()


def write(reading: Reading, value: int, key: str | None = None) -> Write:
    return Write(
        key or reading.key, reading.target, value, reading.value, None, "key", f"d-{reading.key}", "batch-1", "run-1"
    )


def outcomes(written: list[Written]) -> list[str]:
    return [w.outcome for w in written]


# --- against the sandbox


def test_it_keeps_the_protocol_and_says_what_it_can_promise(ads: GoogleAds) -> None:
    connector: Connector = ads
    can = connector.capabilities
    assert not can.conditional_write and not can.idempotency_key and can.validate_only and can.change_history
    assert "only absolute values are written" in can.guarantee
    assert connector.system == "google_ads:1234567890"
    # As the document says: no field of a mutate carries a key, a condition or a version
    fields = {
        name
        for schema in ads._document.json_schema(ads._mutate_schema)["$defs"].values()
        for name in schema.get("properties", {})
    }
    assert not {
        f for f in fields if any(w in f.lower() for w in ("requestid", "idempot", "etag", "version", "condition"))
    }


def test_budgets_are_read_written_and_read_back(ads: GoogleAds, sandbox: AdvertisingSandbox) -> None:
    keys = [LINES[0], LINES[1], "nobody", LINES[0]]
    found = ads.read(keys)
    assert list(found) == [LINES[0], LINES[1], "nobody"]
    assert found["nobody"].state == "missing" and found["nobody"].value is None
    amounts = sandbox.amounts()
    assert [found[line].value for line in LINES[:2]] == [amounts[line] for line in LINES[:2]]
    assert found[LINES[0]].target == "customers/1234567890/campaignBudgets/7000001"
    assert outcomes(ads.apply([write(found[LINES[1]], 20_000), write(found[LINES[0]], 10_000)])) == ["accepted"] * 2
    after = ads.read(LINES[:2])
    assert [after[line].value for line in LINES[:2]] == [10_000, 20_000]


def test_entities_may_be_ids_or_campaigns(server: Server, sandbox: AdvertisingSandbox) -> None:
    by_id = opened(server.url, match="id")
    assert by_id.read(["7000003"])["7000003"].value == sandbox.amounts()[LINES[2]]
    assert by_id.read(["7"])["7"].state == "missing" and "no id" in by_id.read(["7 OR 1=1"])["7 OR 1=1"].says
    campaigns = opened(server.url, entity="campaign")
    assert campaigns.read([LINES[2]])[LINES[2]].target.endswith("campaignBudgets/7000003")
    campaign_ids = opened(server.url, entity="campaign", match="id")
    assert campaign_ids.read(["5000003"])["5000003"].value == sandbox.amounts()[LINES[2]]
    for one in (by_id, campaigns, campaign_ids):
        one.close()


def test_a_budget_shared_by_campaigns_is_one_target_and_is_written_once(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    sandbox.share(LINES[0], [LINES[1], LINES[2]])
    ads = opened(server.url, entity="campaign")
    found = ads.read(LINES[:4])
    assert len({found[line].target for line in LINES[:3]}) == 1 and "3 campaigns share" in found[LINES[1]].says
    same = [write(found[line], 90_000) for line in LINES[:3]] + [write(found[LINES[3]], 80_000)]
    assert outcomes(ads.apply(same)) == ["accepted"] * 4
    assert sandbox.state()["budgets"][0]["applications"] == 1
    torn = [write(found[LINES[0]], 10_000), write(found[LINES[3]], 70_000), write(found[LINES[1]], 20_000)]
    answered = ads.apply(torn)
    assert outcomes(answered) == ["refused", "accepted", "refused"]
    assert LINES[0] in answered[2].says and LINES[1] in answered[0].says
    assert sandbox.state()["budgets"][0]["amount"] == 90_000
    ads.close()


def test_removed_budgets_and_ended_campaigns_are_closed(server: Server, sandbox: AdvertisingSandbox) -> None:
    sandbox.remove(LINES[0])
    for entity in ("budget", "campaign"):
        ads = opened(server.url, entity=entity)
        found = ads.read(LINES[:2])
        assert (found[LINES[0]].state, found[LINES[1]].state) == ("closed", "open") and found[LINES[0]].says
        answered = ads.apply([write(found[LINES[0]], 10_000), write(found[LINES[1]], 10_000)])
        assert outcomes(answered) == ["refused", "accepted"]
        assert "CAMPAIGN_BUDGET_REMOVED: The requested campaign budget no longer exists." in answered[0].says
        ads.close()


def test_of_several_budgets_of_a_name_the_standing_one_counts_and_two_standing_ones_are_told(
    ads: GoogleAds, sandbox: AdvertisingSandbox
) -> None:
    with sandbox._lock, sandbox._transaction():
        sandbox._set(sandbox.budgets[7000002], {"name": LINES[0]}, "p@example.com", "GOOGLE_ADS_WEB_CLIENT")
    found = ads.read([LINES[0]])[LINES[0]]
    assert found.value is None and "2 budgets have this name" in found.says
    sandbox.remove(LINES[0])
    assert ads.read([LINES[0]])[LINES[0]].target.endswith("7000002")


@given(st.text(max_size=40))
@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_key_can_leave_its_place_in_the_query(ads: GoogleAds, sandbox: AdvertisingSandbox, key: str) -> None:
    found = ads.read([key, LINES[0]])
    assert found[LINES[0]].value == sandbox.amounts()[LINES[0]]
    assert found[key].state == ("open" if key == LINES[0] else "missing")


@pytest.mark.parametrize("key", ["a'b", 'a"b', "a\\", "a\nb", "", " ", "x" * 256, "') OR ('1'='1", "a\u2028b"])
def test_a_key_that_may_not_stand_in_a_query_is_never_sent(
    ads: GoogleAds, sandbox: AdvertisingSandbox, key: str
) -> None:
    found = ads.read([key])[key]
    assert found.state == "missing" and found.says
    assert sandbox.calls["search"] == 0


def test_bulk_calls_are_cut_to_size_and_pages_are_read_to_the_end(server: Server, sandbox: AdvertisingSandbox) -> None:
    ads = opened(server.url, bulk_read=15, bulk_write=12, page_size=4)
    found = ads.read(LINES)
    assert sandbox.calls["search"] == 4 + 4 + 3 and all(r.state == "open" for r in found.values())
    assert outcomes(ads.apply([write(found[line], 30_000) for line in LINES])) == ["accepted"] * 40
    assert sandbox.calls["mutate"] == 4 and set(sandbox.amounts().values()) == {30_000}
    ads.close()


def test_validate_only_says_what_would_be_refused_and_writes_nothing(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    ads = opened(server.url, unit_micros=1)
    found, before = ads.read(LINES[:3]), sandbox.amounts()
    writes = [write(found[LINES[0]], 10_000), write(found[LINES[1]], 10_001), write(found[LINES[2]], 20_000)]
    assert outcomes(ads.apply(writes, validate_only=True)) == ["accepted", "refused", "accepted"]
    assert sandbox.amounts() == before
    ads.close()


def test_an_amount_that_is_no_whole_cent_is_refused_in_the_apis_words_or_before_it_is_sent(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    asking, knowing = opened(server.url, unit_micros=1), opened(server.url)
    found = asking.read(LINES[:2])
    writes = [write(found[LINES[0]], 1_234_567), write(found[LINES[1]], 50_000)]
    answered = asking.apply(writes)
    assert outcomes(answered) == ["refused", "accepted"]
    assert answered[0].says == (
        "campaignBudgetError NON_MULTIPLE_OF_MINIMUM_CURRENCY_UNIT: A money amount was not a multiple of a minimum unit."
    )
    calls = sandbox.calls["mutate"]
    refused = knowing.apply(writes[:1])[0]
    assert refused.outcome == "refused" and "no multiple of 10000" in refused.says and sandbox.calls["mutate"] == calls
    for value in (-10_000, 2**63):
        assert outcomes(knowing.apply([write(found[LINES[0]], value)])) == ["refused"]
    elsewhere = Write("x", "customers/9/campaignBudgets/1", 10_000, None, None, "k", "d", "b", "r")
    assert outcomes(knowing.apply([elsewhere])) == ["refused"] and sandbox.calls["mutate"] == calls
    asking.close(), knowing.close()


@pytest.mark.parametrize(
    ("kind", "reason", "outcome"),
    [
        ("campaignBudgetError", "MONEY_AMOUNT_TOO_LARGE", "refused"),
        ("authorizationError", "SEARCH_ADS360_OTHER_ENGINE_MUTATE_DENIED", "refused"),
        ("quotaError", "RESOURCE_EXHAUSTED", "not_applied"),
        ("quotaError", "RESOURCE_TEMPORARILY_EXHAUSTED", "not_applied"),
        ("quotaError", "ACCESS_PROHIBITED", "refused"),
        ("internalError", "INTERNAL_ERROR", "unknown"),
        ("internalError", "DEADLINE_EXCEEDED", "unknown"),
        ("databaseError", "CONCURRENT_MODIFICATION", "conflict"),
    ],
)
def test_a_partial_failure_is_that_rows_alone(
    ads: GoogleAds, sandbox: AdvertisingSandbox, kind: str, reason: str, outcome: str
) -> None:
    sandbox.refuse(Refusal(LINES[1], kind, reason))
    found = ads.read(LINES[:3])
    answered = ads.apply([write(found[line], 10_000) for line in LINES[:3]])
    assert outcomes(answered) == ["accepted", outcome, "accepted"] and reason in answered[1].says


@pytest.mark.parametrize(
    ("status", "outcome", "wait"),
    [(429, "not_applied", 7.5), (409, "conflict", None), (500, "unknown", None), (503, "unknown", None), (504, "unknown", None)],
)  # fmt: skip
@pytest.mark.parametrize("applied", [False, True])
def test_a_call_that_fails_as_a_whole_is_told_for_each_row(
    ads: GoogleAds, sandbox: AdvertisingSandbox, status: int, outcome: str, wait: float | None, applied: bool
) -> None:
    found = ads.read(LINES[:2])
    sandbox.trouble(Trouble(on="mutate", status=status, retry_after_s=wait, applied=applied))
    answered = ads.apply([write(found[line], 10_000) for line in LINES[:2]])
    assert outcomes(answered) == [outcome] * 2 and [w.retry_after for w in answered] == [wait] * 2
    assert sandbox.calls["mutate"] == 1, "a call is never repeated by the client"
    assert (ads.read(LINES[:1])[LINES[0]].value == 10_000) is applied


def test_a_read_that_fails_can_be_asked_again(ads: GoogleAds, sandbox: AdvertisingSandbox) -> None:
    for status, wait in ((429, 3.0), (500, None), (503, None), (504, None)):
        sandbox.trouble(Trouble(on="search", status=status, retry_after_s=wait))
        with pytest.raises(Unavailable) as caught:
            ads.read(LINES[:1])
        assert caught.value.retry_after == wait and str(status) in str(caught.value)
    assert ads.read(LINES[:1])[LINES[0]].state == "open"


@pytest.mark.parametrize("trouble", [Trouble(close=True, applied=True), Trouble(delay_s=1.7, applied=True)])
def test_a_write_without_an_answer_in_time_is_unknown(
    server: Server, sandbox: AdvertisingSandbox, trouble: Trouble
) -> None:
    ads = opened(server.url, timeout_s=0.4)
    found = ads.read(LINES[:1])[LINES[0]]
    sandbox.trouble(trouble)
    began = time.monotonic()
    assert outcomes(ads.apply([write(found, 10_000)])) == ["unknown"]
    assert time.monotonic() - began < 1.6
    sandbox.trouble(Trouble(close=True))
    with pytest.raises(Unavailable):
        ads.read(LINES[:1])
    deadline = time.monotonic() + 5
    while ads.read(LINES[:1])[LINES[0]].value != 10_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ads.read(LINES[:1])[LINES[0]].value == 10_000, "it had been applied all the same"
    ads.close()


def test_a_server_that_is_not_there_has_certainly_not_applied_anything(
    sandbox: AdvertisingSandbox, server: Server
) -> None:
    ads = opened(server.url)
    found = ads.read(LINES[:1])[LINES[0]]
    server.close()
    assert outcomes(ads.apply([write(found, 10_000)])) == ["not_applied"]
    with pytest.raises(Unavailable):
        ads.read(LINES[:1])
    ads.close()


def test_batch_run_and_decisions_go_with_every_write(ads: GoogleAds, sandbox: AdvertisingSandbox) -> None:
    found = ads.read(LINES[:2])
    odd = Write(LINES[1], found[LINES[1]].target, 20_000, None, None, "k", "d é\n,1", "batch-1", "run-1")
    ads.apply([write(found[LINES[0]], 10_000), odd])
    change = sandbox.changes()[0]
    assert (change["batch"], change["run"]) == ("batch-1", "run-1")
    assert change["decisions"] == f"d-{LINES[0]},d %C3%A9%0A%2C1"
    many = [write(found[LINES[0]], 10_000)] * 5_000
    heads = google_ads._marks(
        [Write("k", "t", 1, None, None, "k", f"decision-{n}", "b", "r") for n, _ in enumerate(many)]
    )
    assert len(heads["x-signalbox-decisions"]) < 4_100 and "+" in heads["x-signalbox-decisions"].rsplit(",", 1)[1]


def test_eight_threads_share_a_connector(ads: GoogleAds, sandbox: AdvertisingSandbox) -> None:
    def work(n: int) -> list[str]:
        done = []
        for k in range(6):
            mine = LINES[n::8]
            found = ads.read(mine)
            assert list(found) == mine
            done += outcomes(ads.apply([write(found[line], 10_000 * (k + 1)) for line in mine]))
        return done

    with ThreadPoolExecutor(8) as pool:
        assert {o for done in pool.map(work, range(8)) for o in done} == {"accepted"}
    assert set(sandbox.amounts().values()) == {60_000}
    assert {b["applications"] for b in sandbox.state()["budgets"]} == {6}


# --- the change history


@pytest.mark.parametrize("zone", ["UTC", "America/Los_Angeles", "Pacific/Kiritimati"])
def test_the_history_tells_own_changes_from_peoples(tmp_path: Path, zone: str) -> None:
    box = AdvertisingSandbox(tmp_path, WORLD, next_day=date(2026, 3, 2), token=TOKEN, user_email=OWN, time_zone=zone)
    with serve(box) as server:
        ads = opened(server.url, user_email=OWN.upper())
        found = ads.read(LINES[:3])
        box.by_hand(LINES[0], 40_000)
        time.sleep(0.002)
        since = now()
        ads.apply([write(found[line], 10_000) for line in LINES[:3]])
        box.by_hand(LINES[0], 50_000, actor="anna@example.com")
        with box._lock, box._transaction():
            box._set(box.budgets[7000002], {"amount": 60_000}, OWN, "GOOGLE_ADS_WEB_CLIENT")
            box._set(box.budgets[7000003], {"name": "renamed"}, "anna@example.com", "GOOGLE_ADS_WEB_CLIENT")
        box.remove(LINES[2], actor="ben@example.com")
        changes = ads.history([*LINES[:3], "nobody", LINES[4]], since)
        told = [(c.key, c.value, c.actor, c.ours) for c in changes]
        assert told[:3] == [(line, 10_000, OWN, True) for line in LINES[:3]]
        assert told[3:] == [
            (LINES[0], 50_000, "anna@example.com", False),
            (LINES[1], 60_000, OWN, False),
            (LINES[2], None, "ben@example.com", False),
        ]
        assert [c.at for c in changes] == sorted(c.at for c in changes) and changes[0].at >= since
        assert abs((changes[-1].at - now()).total_seconds()) < 10
        assert ads.history(LINES[:3], now() + timedelta(seconds=1)) == []
        with pytest.raises(Misconfigured, match="reaches back 28 days"):
            ads.history(LINES[:1], now() - timedelta(days=40))
        assert len(ads.history(LINES[:1], now() - timedelta(days=27))) == 3
        ads.close()
    box.close()


def test_a_long_history_is_read_to_its_end(
    ads: GoogleAds, sandbox: AdvertisingSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = now()
    for n in range(23):
        sandbox.by_hand(LINES[n % 3], 10_000 * (n + 1))
    monkeypatch.setattr(google_ads, "HISTORY_ROWS", 5)
    changes = ads.history(LINES[:3], since)
    assert [c.value for c in changes] == [10_000 * (n + 1) for n in range(23)]


def test_without_its_own_address_there_is_no_history(server: Server, sandbox: AdvertisingSandbox) -> None:
    ads = opened(server.url)
    sandbox.by_hand(LINES[0], 40_000)
    assert not ads.capabilities.change_history and ads.history(LINES[:1], now() - timedelta(hours=1)) == []
    ads.close()


# --- secrets, tokens, settings


def test_a_missing_or_impossible_secret_is_told_by_the_name_of_its_variable() -> None:
    for environ in ({}, {"ADS_TOKEN": " "}, {"ADS_TOKEN": "two words"}):
        with pytest.raises(Misconfigured, match="ADS_TOKEN"):
            opened("http://127.0.0.1:9/", environ=environ)
    with pytest.raises(Misconfigured, match="ADS_DEVELOPER"):
        opened("http://127.0.0.1:9/", developer_token_env="ADS_DEVELOPER")


def test_a_refused_token_or_account_ends_everything_and_names_the_way_out(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    wrong = opened(server.url, environ={"ADS_TOKEN": "another-marked-token"})
    target = "customers/1234567890/campaignBudgets/7000001"
    a_write = Write(LINES[0], target, 10_000, None, None, "k", "d", "b", "r")
    for act in (lambda: wrong.read(LINES[:1]), lambda: wrong.apply([a_write])):
        with pytest.raises(Misconfigured, match=r"OAUTH_TOKEN_INVALID.*ADS_TOKEN") as caught:
            act()
        assert "another-marked-token" not in str(caught.value)
    foreign = opened(server.url, customer_id="999")
    with pytest.raises(Misconfigured, match=r"USER_PERMISSION_DENIED.*login_customer_id"):
        foreign.read(LINES[:1])
    assert TOKEN not in repr(wrong) + repr(vars(wrong)["settings"])
    wrong.close(), foreign.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"customer_id": "abc"},
        {"customer_id": "1'2"},
        {"user_email": "nobody"},
        {"bulk_write": 5_001},
        {"token": "in-the-file"},
        {"entity": "ad"},
        {"timeout_s": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GoogleAdsSettings(**({"customer_id": "1234567890"} | wrong))


def test_a_token_goes_over_plain_http_to_this_machine_only() -> None:
    with pytest.raises(Misconfigured, match="https"):
        opened("http://ads.example.com/")


# --- against servers that lie

Answerer = Callable[[str, dict[str, str], Any], tuple[int, dict[str, str], bytes] | None]


class Liar:
    """A server that answers what a test says; ``seen`` holds path, headers and body of every request."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler, Any], None]) -> None:
        seen: list[tuple[str, dict[str, str], Any]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                body = json.loads(raw) if raw[:1] == b"{" else raw
                seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.close_connection = True
                answer(self, body)

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.seen = seen
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def lying(answer: Callable[[BaseHTTPRequestHandler, Any], None]) -> Iterator[Liar]:
    liar = Liar(answer)
    try:
        yield liar
    finally:
        liar.close()


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in ({"content-length": str(len(content)), "connection": "close"} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def budget(n: int, **more: Any) -> dict[str, Any]:
    return {
        "campaignBudget": {
            "resourceName": f"customers/1234567890/campaignBudgets/{n}",
            "id": str(n),
            "name": f"line-{n}",
            "amountMicros": "50000",
            "status": "ENABLED",
            "period": "DAILY",
        }
        | more
    }


def a_write(n: int, value: int = 10_000) -> Write:
    target = f"customers/1234567890/campaignBudgets/{n}"
    return Write(f"line-{n}", target, value, 50_000, None, "k", f"d{n}", "b", "r")


def name(n: int) -> dict[str, str]:
    return {"resourceName": f"customers/1234567890/campaignBudgets/{n}"}


def failure(*errors: tuple[int | None, str, str]) -> dict[str, Any]:
    listed = []
    for index, kind, reason in errors:
        place = {"fieldName": "operations"} | ({} if index is None else {"index": index})
        location = {"fieldPathElements": [place, {"fieldName": "update"}]}
        listed.append({"errorCode": {kind: reason}, "message": f"words {reason}", "location": location})
    return {"code": 3, "message": "Multiple errors", "details": [{"@type": "x", "errors": listed}]}


REFUSED = ("campaignBudgetError", "MONEY_AMOUNT_TOO_LARGE")
GENERAL = {"code": 13, "message": "it went wrong"}
MUTATE_ANSWERS: list[tuple[str, Any, list[str]]] = [
    ("as it should be", {"results": [name(1), name(2)]}, ["accepted", "accepted"]),
    ("one failed", {"results": [{}, name(2)], "partialFailureError": failure((0, *REFUSED))}, ["refused", "accepted"]),
    ("nothing", {}, ["unknown", "unknown"]),
    ("no object", [], ["unknown", "unknown"]),
    ("a number", 7, ["unknown", "unknown"]),
    ("no JSON", b"<html>", ["unknown", "unknown"]),
    ("half of JSON", b'{"results": [', ["unknown", "unknown"]),
    ("a key twice", b'{"results": [], "results": [{"resourceName": "x"}]}', ["unknown", "unknown"]),
    ("an error in a success", {"error": {"code": 500, "message": "boom"}}, ["unknown", "unknown"]),
    ("an error beside results", {"results": [name(1), name(2)], "error": {"code": 500}}, ["unknown", "unknown"]),
    ("too few results", {"results": [name(1)]}, ["accepted", "unknown"]),
    ("the wrong order", {"results": [name(2), name(1)]}, ["unknown", "unknown"]),
    ("success and failure", {"results": [name(1), name(2)], "partialFailureError": failure((0, *REFUSED))}, ["unknown", "accepted"]),
    ("an index outside", {"results": [name(1), {}], "partialFailureError": failure((9, *REFUSED))}, ["accepted", "unknown"]),
    ("an error without index", {"results": [name(1), {}], "partialFailureError": failure((None, *REFUSED))}, ["accepted", "refused"]),
    ("an error without details", {"results": [name(1), {}], "partialFailureError": GENERAL}, ["accepted", "refused"]),
    ("quota for a row", {"results": [name(1), {}], "partialFailureError": failure((1, "quotaError", "RESOURCE_EXHAUSTED"))}, ["accepted", "not_applied"]),
    ("results of another kind", {"results": {"0": name(1)}}, ["unknown", "unknown"]),
    ("a failure of another kind", {"results": [name(1), {}], "partialFailureError": "sorry"}, ["accepted", "refused"]),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), [a[1:] for a in MUTATE_ANSWERS], ids=[a[0] for a in MUTATE_ANSWERS])
def test_an_answer_is_believed_only_as_far_as_it_fits(answer: Any, expected: list[str]) -> None:
    with lying(lambda handler, body: send(handler, 200, answer)) as liar:
        ads = opened(liar.url)
        assert outcomes(ads.apply([a_write(1), a_write(2)])) == expected
        ads.close()


WHOLE: list[tuple[int, Any, list[str]]] = [
    (400, {"error": failure((1, *REFUSED)) | {"status": "INVALID_ARGUMENT"}}, ["not_applied", "refused"]),
    (400, {"error": failure((None, *REFUSED))}, ["refused", "refused"]),
    (400, {"error": {"message": 5}}, ["refused", "refused"]),
    (400, b"bad request", ["refused", "refused"]),
    (404, {"error": {"code": 404, "message": "Requested entity was not found."}}, ["refused", "refused"]),
    (408, b"", ["unknown", "unknown"]),
    (413, b"too large", ["refused", "refused"]),
    (429, b"slow down", ["not_applied", "not_applied"]),
    (500, {"error": failure((0, *REFUSED))}, ["unknown", "unknown"]),
    (502, b"<html>bad gateway</html>", ["unknown", "unknown"]),
    (204, b"", ["unknown", "unknown"]),
]


@pytest.mark.parametrize(("status", "body", "expected"), WHOLE)
def test_a_status_is_read_with_care(status: int, body: Any, expected: list[str]) -> None:
    with lying(lambda handler, _: send(handler, status, body, {"retry-after": "12"})) as liar:
        ads = opened(liar.url)
        answered = ads.apply([a_write(1), a_write(2)])
        assert outcomes(answered) == expected
        assert len(liar.seen) == 1
        if status == 429:
            assert answered[0].retry_after == 12
        ads.close()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_the_token_goes_nowhere_else(status: int) -> None:
    with lying(lambda handler, _: send(handler, 200, {"results": []})) as other:  # noqa: SIM117
        with lying(lambda handler, _: send(handler, status, b"", {"location": f"{other.url}v23/x"})) as liar:
            ads = opened(liar.url)
            for act in (lambda: ads.read(["line-1"]), lambda: ads.apply([a_write(1)])):
                with pytest.raises(Misconfigured, match="not followed"):
                    act()
            assert not other.seen and len(liar.seen) == 2
            ads.close()


def test_the_token_is_sent_and_never_shown() -> None:
    def echo(handler: BaseHTTPRequestHandler, body: Any) -> None:
        said = f"you sent {handler.headers['authorization']}"
        errors = [{"errorCode": {"quotaError": "RESOURCE_EXHAUSTED"}, "message": said}]
        send(handler, 429, {"error": {"code": 429, "message": said, "details": [{"errors": errors}]}})

    with lying(echo) as liar:
        ads = opened(liar.url, login_customer_id="111-222-3333")
        answered = ads.apply([a_write(1)])[0]
        with pytest.raises(Unavailable) as caught:
            ads.read(["line-1"])
        headers = liar.seen[0][1]
        assert headers["authorization"] == f"Bearer {TOKEN}" and headers["login-customer-id"] == "1112223333"
        for text in (answered.says, str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)):
            assert TOKEN not in text
        assert "you sent Bearer …" in answered.says
        ads.close()


def drip(handler: BaseHTTPRequestHandler, body: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    for _ in range(200):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.05)


def half(handler: BaseHTTPRequestHandler, body: Any) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n{"results": [')


def huge(handler: BaseHTTPRequestHandler, body: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n")
    try:
        for _ in range(1024):
            handler.wfile.write(b" " * (1 << 20))
    except OSError:
        return


def garbage(handler: BaseHTTPRequestHandler, body: Any) -> None:
    handler.wfile.write(b"\x00\xff no http at all\r\n\r\n")


@pytest.mark.parametrize("answer", [drip, half, huge, garbage])
def test_a_server_that_drips_breaks_off_floods_or_babbles_ends_in_time(
    answer: Callable[[BaseHTTPRequestHandler, Any], None],
) -> None:
    with lying(answer) as liar:
        ads = opened(liar.url, timeout_s=0.3)
        began = time.monotonic()
        assert outcomes(ads.apply([a_write(1)])) == ["unknown"]
        with pytest.raises(Unavailable):
            ads.read(["line-1"])
        assert time.monotonic() - began < 3
        ads.close()


def rows(*found: Any, **more: Any) -> dict[str, Any]:
    return {"results": list(found), "fieldMask": "campaignBudget.name"} | more


READ_ANSWERS: list[tuple[str, Any, type[Exception]]] = [
    ("nothing", {}, Unavailable),
    ("no object", [], Unavailable),
    ("no JSON", b"<html>", Unavailable),
    ("an error in a success", {"error": {"code": 500, "message": "boom"}}, Unavailable),
    ("results of another kind", {"results": 5, "fieldMask": "x"}, Unavailable),
    ("rows of another kind", rows("row"), Unavailable),
    ("a budget without its name", rows({"campaignBudget": {"name": "line-1"}}), Misconfigured),
    ("a budget of another account", rows(budget(1, resourceName="customers/9/campaignBudgets/1")), Misconfigured),
    ("pages without end", rows(budget(1), nextPageToken="again"), Unavailable),
]


@pytest.mark.parametrize(("answer", "error"), [a[1:] for a in READ_ANSWERS], ids=[a[0] for a in READ_ANSWERS])
def test_a_read_that_makes_no_sense_is_none(answer: Any, error: type[Exception]) -> None:
    with lying(lambda handler, body: send(handler, 200, answer)) as liar:
        ads = opened(liar.url)
        with pytest.raises(error):
            ads.read(["line-1"])
        assert len(liar.seen) <= 2, "pages that repeat are not followed"
        ads.close()


@pytest.mark.parametrize(
    ("row", "state", "value"),
    [
        (budget(1), "open", 50_000),
        (budget(1, amountMicros=50_000), "open", None),
        (budget(1, amountMicros="50000.0"), "open", None),
        (budget(1, amountMicros=None), "open", None),
        (budget(1, period="CUSTOM_PERIOD"), "open", None),
        (budget(1, status="UNKNOWN"), "open", None),
        (budget(1, status="REMOVED"), "closed", 50_000),
        (budget(1, name="LINE-1"), "missing", None),
        (budget(2), "missing", None),
    ],
)
def test_a_row_is_taken_for_the_entity_only_if_it_is_its_and_holds_a_daily_amount(
    row: dict[str, Any], state: str, value: int | None
) -> None:
    with lying(lambda handler, body: send(handler, 200, rows(row, budget(99), row))) as liar:
        ads = opened(liar.url)
        found = ads.read(["line-1"])["line-1"]
        assert (found.state, found.value) == (state, value)
        assert value is not None or found.says
        ads.close()


def test_what_an_earlier_call_did_is_told_when_a_later_one_cannot_succeed() -> None:
    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        first = body["operations"][0]["update"]["resourceName"].endswith("/1")
        send(handler, *((200, {"results": [name(1)]}) if first else (401, {"error": {"code": 401, "message": "out"}})))

    with lying(answer) as liar:
        ads = opened(liar.url, bulk_write=1)
        assert outcomes(ads.apply([a_write(1), a_write(2)])) == ["accepted", "not_applied"]
        with pytest.raises(Misconfigured):
            ads.apply([a_write(2)])
        ads.close()


def test_a_refresh_token_is_exchanged_when_it_is_needed_and_a_dead_one_is_told() -> None:
    answers: list[tuple[int, Any]] = [
        (200, {"access_token": "fresh-secret", "expires_in": 3600, "token_type": "Bearer"})
    ]

    def token(handler: BaseHTTPRequestHandler, body: Any) -> None:
        send(handler, *answers[0])

    environ = {"R": "refresh-secret", "I": "client", "S": "client-secret"}
    more = {"refresh_token_env": "R", "client_id_env": "I", "client_secret_env": "S"}
    with lying(token) as oauth, lying(lambda handler, _: send(handler, 200, rows(budget(1)))) as api:
        ads = opened(api.url, environ=environ, token_uri=f"{oauth.url}token", **more)
        assert not oauth.seen, "nothing is sent before it is needed"
        ads.read(["line-1"])
        ads.read(["line-1"])
        assert [h["authorization"] for _, h, _ in api.seen] == ["Bearer fresh-secret"] * 2
        assert len(oauth.seen) == 1
        sent = parse_qs(oauth.seen[0][2].decode())
        assert sent["refresh_token"] == ["refresh-secret"] and sent["grant_type"] == ["refresh_token"]
        ads.close()
        answers[0] = (400, {"error": "invalid_grant", "error_description": "refresh-secret was revoked"})
        dead = opened(api.url, environ=environ, token_uri=f"{oauth.url}token", **more)
        with pytest.raises(Misconfigured, match="invalid_grant") as caught:
            dead.read(["line-1"])
        assert "refresh-secret" not in str(caught.value)
        dead.close()
    with pytest.raises(Misconfigured, match=r"variable S "):
        opened(api.url, environ={"R": "r", "I": "i"}, **more)


def test_the_calls_are_those_of_the_whole_official_document() -> None:
    from googleapiclient.discovery import build

    whole = build("searchads360", "v23", developerKey="unused", static_discovery=True).customers()
    ads = opened(google_ads_settings.OFFICIAL)
    for theirs, ours, method in (
        (whole.campaignBudgets(), ads._budgets, "mutate"),
        (whole.searchAds360(), ads._searches, "search"),
    ):
        a, b = (getattr(one, method)(customerId="1234567890", body={"x": "é'"}) for one in (theirs, ours))
        assert a.uri.replace("key=unused&", "") == b.uri and b.uri.startswith(google_ads_settings.OFFICIAL)
        assert (a.method, a.body) == (b.method, b.body)
    ads.close()


def test_a_body_outside_the_schema_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with lying(lambda handler, _: send(handler, 200, rows(budget(1)))) as liar:
        ads = opened(liar.url)
        monkeypatch.setattr(google_ads, "str", lambda value: value, raising=False)  # an amount as a number
        with pytest.raises(
            Misconfigured, match=r"operations\[0\].update.amountMicros.*nothing was sent|nothing was sent"
        ):
            ads.apply([a_write(1)])
        assert not liar.seen
        ads.close()
