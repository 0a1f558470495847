"""Systems that nobody here wrote, connected by YAML alone: what they say is not what they do, and the read-back finds it.

``json-server`` shows an ETag and never looks at ``If-Match``. The AdCP SDK's mock of an ad server (``sales-non-guaranteed``) answers
200 to budgets of 0, −5 and "70" and leaves the budget as it was, and remembers no key of a change.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from delivery.connectors import rest
from delivery.ledger import Delivery, Ledger, utc_now
from delivery.push import PushSettings, Report, push
from tests.delivery.connectors.test_rest import a_write
from tests.support import peers
from tests.support.ledgers import KEY, new_batch, some_decisions

JSON_SERVER = "json-server@0.17.4"
ADCP = "@adcp/sdk@6.11.0"
ADCP_KEY, NETWORK = "peer-key-1", {"X-Network-Code": "net_remnant_us"}
FAST = PushSettings(late_s=0.05, backoff_s=(0.01, 0.05), attempts=3)

ISSUES = """
system: json-server
base_url: https://replaced.example
auth: {kind: none}
read:
  one: {path: "/issues/{entity}"}
  key: /id
  value: /priority
  token: {header: ETag}
  closed: [{at: /state, one_of: [closed]}]
values: {kind: names, names: {low: 100, high: 120}}
write:
  one: {method: PATCH, path: "/issues/{entity}", headers: {If-Match: "{token}"}, body: {priority: "{value}"}}
"""

ORDERS = """
system: adcp
base_url: https://replaced.example/v1
auth: {kind: bearer, token_env: ADCP_KEY}
headers: {X-Network-Code: net_remnant_us}
read:
  one: {path: "/orders/{entity}"}
  many: {path: /orders, query: {ids: "{entities}"}, at_most: 50, items: /orders}  # the filter is ignored: all are listed
  key: /order_id
  value: /budget
  closed: [{at: /status, one_of: [canceled, completed, rejected]}]
  watch: [/name, /pacing]
values: {kind: decimal, decimals: 2}  # the decision is in cents, the budget in units
write:
  one: {method: PATCH, path: "/orders/{entity}", body: {budget: "{value}", client_request_id: "{idempotency_key}"}}
"""


@pytest.fixture(scope="module")
def json_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peers.installed(tmp_path_factory.mktemp("json-server"), JSON_SERVER)


@pytest.fixture(scope="module")
def adcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peers.installed(tmp_path_factory.mktemp("adcp"), ADCP)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.db", key=KEY) as made:
        yield made


def connector(folder: Path, said: str, url: str) -> rest.RestConnector:
    (folder / "peer.yaml").write_text(said)
    which = rest.RestSettings(kind="rest", file="peer.yaml", base_url=url)
    return rest.connect(which, environ={"ADCP_KEY": ADCP_KEY}, folder=folder, clock=utc_now)


def pushed(
    ledger: Ledger, made: rest.RestConnector, wanted: Mapping[str, int], before: int
) -> tuple[Report, dict[str, Delivery]]:
    decisions = some_decisions("b1", list(wanted), before=[before] * len(wanted), after=list(wanted.values()))
    ledger.record_batch(new_batch("b1", pools=None), decisions)
    report = push(ledger, made, "b1", settings=FAST, rng=random.Random(1))
    assert ledger.verify().ok
    return report, {d.entity or "": d for d in ledger.deliveries("b1")}


def test_json_servers_etag_does_not_count_as_a_condition(json_server: Path, tmp_path: Path, ledger: Ledger) -> None:
    issues = [{"id": i, "priority": "low", "state": "open"} for i in ("a", "b", "person", "closed")]
    issues[-1]["state"] = "closed"
    (tmp_path / "db.json").write_text(json.dumps({"issues": issues}))
    command = [str(json_server / "lib/cli/bin.js"), "--port", "{port}", "--host", "127.0.0.1", "--quiet", "db.json"]
    with peers.serving(command, "/issues", tmp_path) as url:
        made = connector(tmp_path, ISSUES, url)
        assert made.capabilities.conditional_write, "its YAML says so, and an ETag is shown"
        reading = made.read(["a"])["a"]
        assert reading.token and reading.value == 100
        peers.call("PATCH", f"{url}/issues/person", {"priority": "high!"})
        report, told = pushed(ledger, made, dict.fromkeys(["a", "b", "person", "closed", "gone"], 120), 100)
        stands = {i["id"]: i["priority"] for i in peers.call("GET", f"{url}/issues")}
        # what a condition would have kept: an old version is no hindrance to it
        [late] = made.apply([a_write("b", 100, token=reading.token)])
        made.close()
    assert late.outcome == "accepted"
    assert not made.capabilities.conditional_write
    assert "exactly once" not in report.guarantee and "condition of a write counts for nothing" in report.guarantee
    assert {n: d.state for n, d in told.items()} == {
        "a": "ACKED", "b": "ACKED", "person": "CONFLICT", "closed": "SKIPPED", "gone": "REJECTED",
    }  # fmt: skip
    assert stands == {"a": "high", "b": "high", "person": "high!", "closed": "low"} and report.complete
    assert len(ledger.events("condition ignored")) == 1


@pytest.fixture(scope="module")
def ad_server(adcp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [
        str(adcp / "bin/adcp.js"), "mock-server", "sales-non-guaranteed", "--port", "{port}", "--api-key", ADCP_KEY,
    ]  # fmt: skip
    with peers.serving(command, "/v1/orders", tmp_path_factory.mktemp("serving")) as url:
        yield f"{url}/v1"


@pytest.fixture
def orders(ad_server: str) -> tuple[str, dict[str, str]]:
    """The mock's address, and orders of 100.00 by what becomes of them."""
    made = {
        n: call("POST", f"{ad_server}/orders", {"name": n, "advertiser_id": "adv", "budget": 100})["order_id"]
        for n in ("takes", "zero", "negative", "person", "canceled")
    }
    call("PATCH", f"{ad_server}/orders/{made['canceled']}", {"status": "canceled"})
    return ad_server, made


def call(method: str, url: str, body: Any = None) -> Any:
    return peers.call(method, url, body, {"Authorization": f"Bearer {ADCP_KEY}", **NETWORK})


def test_budgets_that_the_ad_server_says_yes_to_and_ignores_are_found(
    orders: tuple[str, dict[str, str]], tmp_path: Path, ledger: Ledger
) -> None:
    url, ids = orders
    made = connector(tmp_path, ORDERS, url)
    call("PATCH", f"{url}/orders/{ids['person']}", {"budget": 77})
    cents = {"takes": 70_50, "zero": 0, "negative": -5_00, "person": 70_00, "canceled": 70_00}
    report, told = pushed(ledger, made, {ids[n]: v for n, v in cents.items()} | {"ord_00000000": 70_00}, 100_00)
    made.close()
    became = {n: told[i] for n, i in ids.items()}
    assert {n: d.state for n, d in became.items()} == {
        "takes": "ACKED", "zero": "REJECTED", "negative": "REJECTED", "person": "CONFLICT", "canceled": "SKIPPED",
    }  # fmt: skip
    assert told["ord_00000000"].state == "REJECTED" and report.complete
    for name in ("zero", "negative"):
        assert (became[name].says or "").startswith("answered yes 3 times and still shows 10000")
    stands = {n: call("GET", f"{url}/orders/{i}")["budget"] for n, i in ids.items()}
    assert stands == {"takes": 70.5, "zero": 100, "negative": 100, "person": 77, "canceled": 100}


def test_a_budget_in_text_is_ignored_and_found(
    orders: tuple[str, dict[str, str]], tmp_path: Path, ledger: Ledger
) -> None:
    url, ids = orders
    made = connector(tmp_path, ORDERS.replace("{kind: decimal, decimals: 2}", "{kind: text, decimals: 2}"), url)
    report, told = pushed(ledger, made, {ids["takes"]: 70_00}, 100_00)
    made.close()
    assert (told[ids["takes"]].state, told[ids["takes"]].observed) == ("REJECTED", 100_00)
    assert report.failure().startswith("none of 1 deliveries was acknowledged")
    assert call("GET", f"{url}/orders/{ids['takes']}")["budget"] == 100


def test_a_time_of_change_that_the_ad_server_does_not_compare_is_no_condition(
    orders: tuple[str, dict[str, str]], tmp_path: Path, ledger: Ledger
) -> None:
    url, ids = orders
    said = ORDERS.replace("  watch:", "  token: {at: /updated_at}\n  watch:").replace(
        "client_request_id:", 'updated_at: "{token}", client_request_id:'
    )
    made = connector(tmp_path, said, url)
    assert made.capabilities.conditional_write
    report, told = pushed(ledger, made, {ids["takes"]: 70_00}, 100_00)
    made.close()
    assert told[ids["takes"]].state == "ACKED" and "counts for nothing" in report.guarantee


def test_the_ad_server_forgets_a_key_so_that_it_is_not_promised(
    orders: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """The same write with the same key, after a person's change: it is applied again."""
    url, ids = orders
    made = connector(tmp_path, ORDERS, url)
    assert not made.capabilities.idempotency_key
    write = a_write(ids["takes"], 70_00)
    assert made.apply([write])[0].outcome == "accepted"
    call("PATCH", f"{url}/orders/{ids['takes']}", {"budget": 77})
    assert made.apply([write])[0].outcome == "accepted"
    assert made.read([ids["takes"]])[ids["takes"]].value == 70_00, "it has forgotten the key"
    made.close()
