"""The advertising sandbox over real HTTP, with the official client: what it takes, refuses, counts, and how days happen."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delivery.connectors.discovery import Document
from delivery.sandbox import private
from delivery.sandbox.advertising_account import budgets_of
from delivery.sandbox.advertising_api import AdvertisingSandbox, Refusal, Trouble
from delivery.sandbox.advertising_server import Server, serve
from delivery.sandbox.worlds import advertising
from pipeline.workflow import FOLDER, load

DAY = date(2026, 3, 2)
TOKEN = "sandbox-token"
WORLD = advertising.World(3, "easy", 24)
DOCUMENT = Document.shipped("searchads360", "v23")
MUTATE = "v23/customers/1234567890/campaignBudgets:mutate"
SEARCH = "v23/customers/1234567890/searchAds360:search"


def open_sandbox(folder: Path, **more: Any) -> AdvertisingSandbox:
    return AdvertisingSandbox(folder, WORLD, next_day=DAY, token=TOKEN, **more)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[AdvertisingSandbox]:
    made = open_sandbox(tmp_path / "sandbox")
    yield made
    made.close()


@pytest.fixture
def server(sandbox: AdvertisingSandbox) -> Iterator[Server]:
    with serve(sandbox) as running:
        yield running


def call(
    server: Server, path: str, body: Any = None, *, method: str = "POST", token: str = TOKEN, raw: bytes | None = None
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    content = raw if raw is not None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {token}", "x-signalbox-batch": "b-1", "x-signalbox-decisions": "d-1"}
    connection.request(method, f"/{path}", content, headers)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    if answer.status == 200 and path in (MUTATE, SEARCH):
        method_path = ("campaignBudgets", "mutate") if path == MUTATE else ("searchAds360", "search")
        assert not DOCUMENT.problems(DOCUMENT.answer_of("customers", *method_path), found)
    return answer.status, found


def name(sandbox: AdvertisingSandbox, n: int) -> str:
    line = WORLD.line_id[n]
    budget = next(b for b in sandbox.budgets.values() if b.line == line)
    return f"customers/1234567890/campaignBudgets/{budget.id}"


def update(resource: str, amount: int | str, mask: str = "amountMicros") -> dict[str, Any]:
    return {"update": {"resourceName": resource, "amountMicros": str(amount)}, "updateMask": mask}


def amount(sandbox: AdvertisingSandbox, n: int) -> int:
    return next(b.amount for b in sandbox.budgets.values() if b.line == WORLD.line_id[n])


def reasons(body: dict[str, Any]) -> list[tuple[int | None, str, str]]:
    status = body.get("error") or body.get("partialFailureError")
    found = []
    for error in status["details"][0]["errors"]:  # type: ignore[index]
        place = error.get("location", {}).get("fieldPathElements", [{}])
        ((kind, reason),) = error["errorCode"].items()
        assert error["message"]
        found.append((place[0].get("index"), kind, reason))
    return found


def test_the_official_client_reads_and_writes_budgets(server: Server, sandbox: AdvertisingSandbox) -> None:
    import httplib2
    from google.oauth2.credentials import Credentials
    from google_auth_httplib2 import AuthorizedHttp
    from googleapiclient.discovery import build

    http_ = AuthorizedHttp(Credentials(token=TOKEN), http=httplib2.Http(timeout=10))
    client = build(
        "searchads360", "v23", http=http_, static_discovery=True, client_options={"api_endpoint": server.url}
    )
    assert client.customers().listAccessibleCustomers().execute() == {"resourceNames": ["customers/1234567890"]}
    body = {"operations": [update(name(sandbox, 0), 4_560_000)], "partialFailure": True}
    written = client.customers().campaignBudgets().mutate(customerId="1234567890", body=body).execute()
    assert written == {"results": [{"resourceName": name(sandbox, 0)}]}
    query = (
        f"SELECT campaign_budget.amount_micros FROM campaign_budget WHERE campaign_budget.name = '{WORLD.line_id[0]}'"
    )
    found = client.customers().searchAds360().search(customerId="1234567890", body={"query": query}).execute()
    row = {"resourceName": name(sandbox, 0), "amountMicros": "4560000"}
    assert found == {"results": [{"campaignBudget": row}], "fieldMask": "campaignBudget.amountMicros"}


MALFORMED: list[Any] = [
    [],
    None,
    "text",
    {"operations": {}},
    {"operations": [{"update": {"resourceName": "x", "amountMicros": 4_560_000}, "updateMask": "amountMicros"}]},
    {"operations": [{"update": {"resourceName": "x", "amountMicros": "4.5"}, "updateMask": "amountMicros"}]},
    {"operations": [{"update": {"resourceName": "x", "amountMicros": str(2**63)}, "updateMask": "amountMicros"}]},
    {"operations": [{"update": {"resourceName": "x", "amountMicros": "10000\n"}, "updateMask": "amountMicros"}]},
    {"operations": [{"update": {"resourceName": "x", "amount": "1"}, "updateMask": "amountMicros"}]},
    {"operations": [{"update": {"resourceName": "x"}, "updateMask": "a b"}]},
    {"operations": [{"update": {"resourceName": "x"}, "remove": "x"}]},
    {"operations": [None]},
    {"operations": [], "partialFailure": "yes"},
    {"operations": [], "dryRun": True},
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda b: json.dumps(b)[:60])
def test_a_body_outside_the_official_schema_is_refused_as_google_does_and_changes_nothing(
    server: Server, sandbox: AdvertisingSandbox, body: Any
) -> None:
    before = sandbox.amounts()
    status, found = call(server, MUTATE, body)
    assert status == 400 and found["error"]["status"] == "INVALID_ARGUMENT" and found["error"]["code"] == 400
    assert found["error"]["details"][0]["fieldViolations"][0]["description"]
    assert sandbox.amounts() == before and not sandbox.changes()


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"", b"[" * 100_000])
def test_what_is_no_json_is_refused(server: Server, raw: bytes) -> None:
    status, found = call(server, MUTATE, raw=raw)
    assert status == 400 and "Invalid JSON" in found["error"]["message"]


@pytest.mark.parametrize(
    ("operation", "kind", "reason"),
    [
        ({}, "requestError", "OPERATION_REQUIRED"),
        ({"create": {"name": "new"}}, "operationAccessDeniedError", "CREATE_OPERATION_NOT_PERMITTED"),
        (update("", 10_000), "requestError", "RESOURCE_NAME_MISSING"),
        (update("campaignBudgets/1", 10_000), "requestError", "RESOURCE_NAME_MALFORMED"),
        (update("customers/1234567890/campaignBudgets/1", 10_000), "mutateError", "RESOURCE_NOT_FOUND"),
        (update("customers/9/campaignBudgets/7000002", 10_000), "mutateError", "RESOURCE_NOT_FOUND"),
        (update("B", 1_234_567), "campaignBudgetError", "NON_MULTIPLE_OF_MINIMUM_CURRENCY_UNIT"),
        (update("B", 1), "campaignBudgetError", "NON_MULTIPLE_OF_MINIMUM_CURRENCY_UNIT"),
        (update("B", 0), "campaignBudgetError", "BUDGET_BELOW_PER_DAY_MINIMUM"),
        (update("B", -10_000), "campaignBudgetError", "NEGATIVE_MONEY_AMOUNT"),
        (update("B", 10**18), "campaignBudgetError", "MONEY_AMOUNT_TOO_LARGE"),
        (update("B", 10_000, ""), "fieldMaskError", "FIELD_MASK_MISSING"),
        (update("B", 10_000, "amount"), "fieldMaskError", "FIELD_NOT_FOUND"),
        (update("B", 10_000, "status"), "fieldError", "IMMUTABLE_FIELD"),
        (update("B", 10_000, "name"), "fieldError", "FIELD_CANNOT_BE_CLEARED"),
        ({"remove": "B"}, "campaignBudgetError", "CAMPAIGN_BUDGET_IN_USE"),
    ],
)
def test_one_operation_in_the_wrong_fails_alone_with_its_index_or_all_fail_without_partial_failure(
    server: Server, sandbox: AdvertisingSandbox, operation: dict[str, Any], kind: str, reason: str
) -> None:
    text = json.dumps(operation).replace('"B"', f'"{name(sandbox, 1)}"')
    good = [update(name(sandbox, 0), 770_000), update(name(sandbox, 2), 880_000)]
    operations = [good[0], json.loads(text), good[1]]
    before = sandbox.amounts()
    status, found = call(server, MUTATE, {"operations": operations})
    assert status == 400 and (1, kind, reason) in reasons(found)
    assert sandbox.amounts() == before
    status, found = call(server, MUTATE, {"operations": operations, "partialFailure": True})
    assert status == 200 and reasons(found) == [(1, kind, reason)]
    assert found["results"] == [{"resourceName": name(sandbox, 0)}, {}, {"resourceName": name(sandbox, 2)}]
    assert (amount(sandbox, 0), amount(sandbox, 2)) == (770_000, 880_000)
    assert amount(sandbox, 1) == before[WORLD.line_id[1]]


def test_what_the_mask_does_not_name_stays_and_snake_case_names_the_same(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    operation = update(name(sandbox, 0), 50_000, "amount_micros")
    operation["update"]["name"] = "renamed"
    assert call(server, MUTATE, {"operations": [operation]})[0] == 200
    stands = sandbox.state()["budgets"][0]
    assert (stands["amount"], stands["name"]) == (50_000, WORLD.line_id[0])


def test_the_same_budget_twice_in_a_call_is_refused_the_second_time(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    twice = [update(name(sandbox, 0), 50_000), update(name(sandbox, 0), 60_000)]
    _, found = call(server, MUTATE, {"operations": twice, "partialFailure": True})
    assert reasons(found) == [(1, "mutateError", "ID_EXISTS_IN_MULTIPLE_MUTATES")] and amount(sandbox, 0) == 50_000


def test_validate_only_finds_the_errors_and_writes_nothing(server: Server, sandbox: AdvertisingSandbox) -> None:
    before = sandbox.state()
    operations = [update(name(sandbox, 0), 50_000), update(name(sandbox, 1), 50_001)]
    status, found = call(server, MUTATE, {"operations": operations, "partialFailure": True, "validateOnly": True})
    assert status == 200 and "results" not in found and [index for index, *_ in reasons(found)] == [1]
    assert call(server, MUTATE, {"operations": operations[:1], "validateOnly": True}) == (200, {})
    after = sandbox.state()
    assert after["budgets"] == before["budgets"] and after["samples"] == before["samples"]


def test_the_token_the_account_and_the_path_are_checked(server: Server, sandbox: AdvertisingSandbox) -> None:
    body = {"operations": [update(name(sandbox, 0), 50_000)]}
    status, found = call(server, MUTATE, body, token="another")
    assert (status, found["error"]["status"]) == (401, "UNAUTHENTICATED") and TOKEN not in json.dumps(found)
    assert call(server, "sandbox/state", method="GET", token="another")[0] == 401
    status, found = call(server, MUTATE.replace("1234567890", "99"), body)
    assert (status, reasons(found)[0][2]) == (403, "USER_PERMISSION_DENIED")
    assert call(server, "v23/customers/1234567890/adGroups:mutate", body)[0] == 404
    assert call(server, MUTATE, method="GET")[0] == 404
    assert call(server, f"{MUTATE}?partial_failure=true", body)[0] == 400
    assert call(server, f"{MUTATE}?alt=json", body)[0] == 200


def query(server: Server, text: str, **more: Any) -> dict[str, Any]:
    status, found = call(server, SEARCH, {"query": text, **more})
    assert status == 200, found
    return found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("campaign_budget.id FROM campaign_budget", "EXPECTED_SELECT"),
        ("SELECT campaign_budget.id", "EXPECTED_FROM"),
        ("SELECT FROM campaign_budget", "EXPECTED_FROM"),
        ("SELECT campaign_budget.id FROM ad_group", "BAD_RESOURCE_TYPE_IN_FROM_CLAUSE"),
        ("SELECT campaign_budget.cost FROM campaign_budget", "UNRECOGNIZED_FIELD"),
        ("SELECT campaign.id FROM campaign_budget", "PROHIBITED_FIELD_IN_SELECT_CLAUSE"),
        ("SELECT campaign_budget.id FROM campaign_budget WHERE campaign.id = 1", "PROHIBITED_FIELD_IN_WHERE_CLAUSE"),
        ("SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.id = x", "BAD_NUMBER"),
        ("SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.name = 'a", "STRING_NOT_TERMINATED"),
        (r"SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.name = 'a\'b'", "STRING_NOT_TERMINATED"),
        ("SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.name IN ()", "PROHIBITED_EMPTY_LIST_IN_CONDITION"),
        ("SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.name LIKE 'a%'", "BAD_OPERATOR"),
        ("SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.id = 1 OR campaign_budget.id = 2", "EXPECTED_AND"),
        ("SELECT campaign_budget.id FROM campaign_budget LIMIT 0", "BAD_LIMIT_VALUE"),
        ("SELECT campaign_budget.id FROM campaign_budget; DROP TABLE budgets", "BAD_SYMBOL"),
        ("SELECT campaign_budget.id FROM campaign_budget WHERE", "UNEXPECTED_END_OF_QUERY"),
    ],
)  # fmt: skip
def test_a_wrong_query_is_refused_with_its_reason(server: Server, text: str, reason: str) -> None:
    status, found = call(server, SEARCH, {"query": text})
    assert status == 400 and reasons(found) == [(None, "queryError", reason)]


def test_a_query_selects_filters_orders_and_limits(server: Server, sandbox: AdvertisingSandbox) -> None:
    amounts = sandbox.amounts()
    middle = sorted(amounts.values())[12]
    text = (
        "SELECT campaign_budget.name, campaign_budget.amount_micros, customer.currency_code FROM campaign_budget "
        f"WHERE campaign_budget.amount_micros >= {middle} AND campaign_budget.status = 'ENABLED' "
        "ORDER BY campaign_budget.amount_micros DESC LIMIT 5"
    )
    rows = query(server, text)["results"]
    wanted = sorted((line for line in amounts if amounts[line] >= middle), key=lambda line: -amounts[line])[:5]
    assert [row["campaignBudget"]["name"] for row in rows] == wanted
    assert rows[0]["customer"] == {"currencyCode": "EUR", "resourceName": "customers/1234567890"}
    assert set(rows[0]["campaignBudget"]) == {"resourceName", "name", "amountMicros"}
    line = WORLD.line_id[4]
    text = f'SELECT campaign.status, campaign_budget.id FROM campaign WHERE campaign.name NOT IN ("{line}", "other")'
    assert len(query(server, text)["results"]) == WORLD.lines - 1
    text = "SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.id BETWEEN 7000002 AND 7000004"
    assert len(query(server, text)["results"]) == 3
    nothing = query(server, "SELECT campaign_budget.id FROM campaign_budget WHERE campaign_budget.name = 'nobody'")
    assert nothing == {"fieldMask": "campaignBudget.id"}


def test_pages_show_each_row_once_as_of_one_moment(server: Server, sandbox: AdvertisingSandbox) -> None:
    text = "SELECT campaign_budget.id, campaign_budget.amount_micros FROM campaign_budget"
    before = sorted(sandbox.amounts().values())
    seen, token, pages = [], "", 0
    while True:
        found = query(server, text, pageSize=7, **({"pageToken": token} if token else {}))
        seen += [int(row["campaignBudget"]["amountMicros"]) for row in found["results"]]
        sandbox.by_hand(WORLD.line_id[-1 - pages], 10_000)  # not read yet
        pages, token = pages + 1, found.get("nextPageToken", "")
        if not token:
            break
    assert sorted(seen) == before and pages == 4
    for bad in ("nonsense", "999.7", ""):
        more = {"pageToken": bad} if bad else {"pageSize": 10_001}
        status, found = call(server, SEARCH, {"query": text, **more})
        assert status == 400 and reasons(found)[0][1] == "requestError"


EVENTS = "SELECT change_event.user_email, change_event.change_date_time, change_event.new_resource, change_event.client_type "
EVENTS += "FROM change_event"


def test_the_change_history_names_who_changed_what_on_the_accounts_clock(tmp_path: Path) -> None:
    moment = datetime(2026, 7, 1, 22, 30, 0, 123456)
    sandbox = open_sandbox(tmp_path, clock=lambda: moment, time_zone="Asia/Tokyo", history_delay_s=0)
    with serve(sandbox) as server:
        call(server, MUTATE, {"operations": [update(name(sandbox, 0), 50_000)]})
        sandbox.by_hand(WORLD.line_id[1], 60_000, actor="anna@example.com")
        time_range = (
            "change_event.change_date_time >= '2026-07-01' AND change_event.change_date_time <= '2026-07-02 23:59:59'"
        )
        found = query(server, f"{EVENTS} WHERE {time_range} ORDER BY change_event.change_date_time ASC LIMIT 10")
        events = [row["changeEvent"] for row in found["results"]]
        assert [e["userEmail"] for e in events] == ["signalbox@example.com", "anna@example.com"]
        assert [e["clientType"] for e in events] == ["GOOGLE_ADS_API", "GOOGLE_ADS_WEB_CLIENT"]
        assert events[0]["changeDateTime"] == "2026-07-02 07:30:00.123456"
        assert events[1]["newResource"]["campaignBudget"]["amountMicros"] == "60000"
        sandbox.history_delay_s = 180
        assert "results" not in query(server, f"{EVENTS} WHERE {time_range} LIMIT 10")
        for where, reason in (
            ("LIMIT 10", "CHANGE_DATE_RANGE_INFINITE"),
            (f"WHERE {time_range}", "LIMIT_NOT_SPECIFIED"),
            (f"WHERE {time_range} LIMIT 10001", "INVALID_LIMIT_CLAUSE"),
            (f"WHERE {time_range.replace('07-01', '05-01')} LIMIT 10", "START_DATE_TOO_OLD"),
        ):
            status, refused = call(server, SEARCH, {"query": f"{EVENTS} {where}"})
            assert status == 400 and reasons(refused) == [(None, "changeEventError", reason)]
    sandbox.close()


def test_every_application_is_counted_also_of_an_equal_value_and_knows_its_batch(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    for _ in range(3):
        call(server, MUTATE, {"operations": [update(name(sandbox, 0), 50_000)]})
    sandbox.by_hand(WORLD.line_id[0], 70_000)
    assert sandbox.state()["budgets"][0]["applications"] == 3
    changes = sandbox.changes()
    assert [(c["actor"], c["batch"], c["decisions"]) for c in changes] == [
        ("signalbox@example.com", "b-1", "d-1"),
        ("person@example.com", "", ""),
    ]


def test_the_live_total_is_sampled_between_the_operations_of_one_call(
    server: Server, sandbox: AdvertisingSandbox
) -> None:
    lines = WORLD.line_id.tolist()
    status, _ = call(server, "sandbox/samples", {"groups": {lines[0]: "a", lines[1]: "a", lines[2]: "b"}})
    assert status == 200
    total = sum(sandbox.amounts().values())
    first, second = amount(sandbox, 0), amount(sandbox, 1)
    up_first = [update(name(sandbox, 0), first + 1_000_000), update(name(sandbox, 1), second - 1_000_000)]
    call(server, MUTATE, {"operations": up_first})
    sampled = call(server, "sandbox/samples", method="GET")[1]
    assert sampled["total"] == {"now": total, "most": total + 1_000_000} and sampled["samples"] == 2
    assert sampled["groups"]["a"] == {"now": first + second, "most": first + second + 1_000_000}
    assert sampled["groups"]["b"]["most"] == amount(sandbox, 2)
    call(server, "sandbox/samples", {})
    down_first = [update(name(sandbox, 0), first), update(name(sandbox, 1), second)]
    call(server, MUTATE, {"operations": down_first})
    assert sandbox.sampled()["total"] == {"now": total, "most": total}


def test_a_removed_budget_is_closed_and_a_shared_one_is_split(server: Server, sandbox: AdvertisingSandbox) -> None:
    lines = WORLD.line_id.tolist()
    call(server, "sandbox/remove", {"line": lines[0], "actor": "anna@example.com"})
    call(server, "sandbox/share", {"line": lines[1], "with": [lines[2]]})
    call(server, "sandbox/set", {"line": lines[1], "amount": 30_010_000})
    _, found = call(server, MUTATE, {"operations": [update(name(sandbox, 0), 50_000)], "partialFailure": True})
    assert reasons(found) == [(0, "campaignBudgetError", "CAMPAIGN_BUDGET_REMOVED")]
    amounts = sandbox.amounts()
    assert (amounts[lines[0]], amounts[lines[1]], amounts[lines[2]]) == (0, 15_000_000, 15_000_000)
    text = "SELECT campaign_budget.reference_count, campaign_budget.explicitly_shared FROM campaign_budget"
    row = query(server, f"{text} WHERE campaign_budget.name = '{lines[1]}'")["results"][0]["campaignBudget"]
    assert (row["referenceCount"], row["explicitlyShared"]) == ("2", True)
    rows = sandbox.advance(None).to_pydict()
    assert rows["budget"][:3] == [0.0, 15.0, 15.0] and rows["cost"][0] == 0


def test_a_day_happens_under_the_budgets_that_stand_and_lands_where_the_product_looks(
    server: Server, sandbox: AdvertisingSandbox, tmp_path: Path
) -> None:
    lines = WORLD.line_id.tolist()
    call(server, MUTATE, {"operations": [update(name(sandbox, 0), 500_000_000)]})
    stands = np.array([sandbox.amounts()[line] for line in lines])
    ones, nothing = np.ones(len(lines)), np.full(len(lines), np.nan)
    ones[1], nothing[1] = 1.2, 0.25
    expected = WORLD.step(DAY, stands, multipliers=ones, probabilities=nothing)
    body = {"landing": str(tmp_path / "landing"), "multipliers": {lines[1]: [1.2, 0.25]}}
    status, found = call(server, "sandbox/advance", body)
    assert (status, found) == (200, {"day": "2026-03-02", "rows": len(lines), "next_day": "2026-03-03"})
    landed = tmp_path / "landing" / load(FOLDER / "ad_budget").sources["export"].files.format(day="2026-03-02")
    assert landed.read_bytes() == advertising.export_day(expected, tmp_path / "expected", DAY).read_bytes()
    assert [p.name for p in (tmp_path / "landing").iterdir()] == ["export"], "nothing half-written is left behind"
    assert gzip.decompress(landed.read_bytes()).startswith(b'"date"') or b"line_id" in gzip.decompress(
        landed.read_bytes()
    )
    assert sandbox.rows(DAY).equals(expected) and list(sandbox.days()) == [DAY]
    assert budgets_of(expected) == sandbox.amounts()
    sandbox.by_hand(lines[0], 10_000)
    assert sandbox.rows(DAY).equals(expected), "what happened stays what happened"


def test_a_restarted_server_goes_on_where_it_was(tmp_path: Path) -> None:
    first = open_sandbox(tmp_path / "s")
    with serve(first) as server:
        call(server, MUTATE, {"operations": [update(name(first, 0), 123_450_000)]})
        first.remove(WORLD.line_id[1])
        first.advance(None)
        before, changes = first.state(), first.changes()
    # Not closed: as after a crash
    second = open_sandbox(tmp_path / "s", budgets={WORLD.line_id[0]: 10_000})
    after = second.state()
    assert after["budgets"] == before["budgets"] and after["next_day"] == "2026-03-03" and second.changes() == changes
    assert second.rows(DAY).equals(first.rows(DAY))
    with pytest.raises(ValueError, match="another world"):
        AdvertisingSandbox(tmp_path / "s", advertising.World(4, "easy", 24), next_day=DAY, token=TOKEN)
    first.close()
    second.close()


def test_it_begins_with_the_budgets_that_the_history_ended_with(tmp_path: Path) -> None:
    past = advertising.history(WORLD, DAY - timedelta(days=2), 2)
    made = open_sandbox(tmp_path / "s", budgets=budgets_of(past))
    assert made.amounts() == budgets_of(past, DAY - timedelta(days=1))
    made.close()
    for wrong in ({"nobody": 10_000}, {WORLD.line_id[0]: 12_345}):
        with pytest.raises(ValueError, match=r"nobody|whole cents"):
            open_sandbox(tmp_path / "t", budgets=wrong)


@pytest.mark.parametrize("applied", [False, True])
def test_faults_meet_as_many_calls_as_asked(server: Server, sandbox: AdvertisingSandbox, applied: bool) -> None:
    body = {"operations": [update(name(sandbox, 0), 50_000)]}
    before = amount(sandbox, 0)
    call(server, "sandbox/trouble", {"on": "mutate", "status": 429, "retry_after_s": 2.5, "applied": applied})
    text = "SELECT campaign_budget.id FROM campaign_budget"
    assert query(server, text)
    status, found = call(server, MUTATE, body)
    assert status == 429 and found["error"]["status"] == "RESOURCE_EXHAUSTED"
    details = found["error"]["details"][0]["errors"][0]["details"]
    assert details["quotaErrorDetails"]["retryDelay"] == "2.5s"
    assert amount(sandbox, 0) == (50_000 if applied else before)
    assert call(server, MUTATE, body)[0] == 200
    sandbox.trouble(Trouble(on="mutate", close=True, applied=applied))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        call(server, MUTATE, {"operations": [update(name(sandbox, 0), 60_000)]})
    assert amount(sandbox, 0) == (60_000 if applied else 50_000)
    sandbox.trouble(Trouble(on="search", delay_s=0.3))
    began = time.monotonic()
    query(server, text)
    assert time.monotonic() - began >= 0.3


def test_a_refused_budget_says_why_in_the_documents_words(server: Server, sandbox: AdvertisingSandbox) -> None:
    sandbox.refuse(Refusal(WORLD.line_id[0], reason="CANNOT_USE_ACCELERATED_DELIVERY_MODE", times=1))
    body = {"operations": [update(name(sandbox, 0), 50_000)], "partialFailure": True}
    _, found = call(server, MUTATE, body)
    assert found["partialFailureError"]["message"].startswith("Cannot use accelerated delivery method on this budget.")
    assert "partialFailureError" not in call(server, MUTATE, body)[1]


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("set", {"line": "nobody", "amount": 10_000}),
        ("set", {"line": "line-0001", "amount": 1}),
        ("set", {"line": "line-0001"}),
        ("trouble", {"status": 299}),
        ("trouble", {"unknown": 1}),
        ("refuse", {"line": "line-0001", "reason": "NO_SUCH_REASON"}),
        ("advance", {"multipliers": {"nobody": [1.2, 0.5]}}),
    ],
)
def test_a_wrong_wish_is_refused_by_name(server: Server, sandbox: AdvertisingSandbox, what: str, body: Any) -> None:
    before = sandbox.state()
    status, found = call(server, f"sandbox/{what}", body)
    assert status == 400 and found["error"]["message"]
    assert sandbox.state() == before


def test_many_threads_writing_at_once_lose_nothing(server: Server, sandbox: AdvertisingSandbox) -> None:
    def work(n: int) -> None:
        for k in range(10):
            call(server, MUTATE, {"operations": [update(name(sandbox, n), 10_000 * (k + 1))]})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = sandbox.state()
    assert [b["applications"] for b in state["budgets"][:9]] == [10] * 8 + [0]
    assert state["samples"]["total"]["now"] == sum(b["amount"] for b in state["budgets"])
    assert [b["amount"] for b in state["budgets"][:8]] == [100_000] * 8


def test_the_clock_of_changes_never_stands_still(tmp_path: Path) -> None:
    now = datetime.now(UTC).replace(tzinfo=None)
    sandbox = open_sandbox(tmp_path, clock=lambda: now)
    for line in WORLD.line_id[:5]:
        sandbox.by_hand(line, 10_000)
    moments = [c["micros"] for c in sandbox.changes()]
    assert moments == sorted(set(moments)) and len(moments) == 5
    sandbox.close()


def test_what_holds_tokens_is_closed_from_its_first_byte_and_what_stood_open_is_closed(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = private.database(private.folder(tmp_path / "desk") / "desk.sqlite3")
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE tokens (token TEXT)")
            modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in file.parent.iterdir()}
            assert modes == dict.fromkeys(("desk.sqlite3", "desk.sqlite3-wal", "desk.sqlite3-shm"), 0o600)
            for one in (file.parent, *file.parent.iterdir()):
                one.chmod(0o777)
            private.database(private.folder(file.parent) / file.name)
            modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in (file.parent, *file.parent.iterdir())}
            assert modes.pop("desk") == 0o700 and set(modes.values()) == {0o600}
    finally:
        os.umask(before)
