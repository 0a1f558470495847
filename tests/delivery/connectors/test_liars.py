"""Downstream systems that lie: every lie ends in the right state, and nothing is ever ACKED that is not so.

One push meets all liars at once, each entity being one, through the declarative REST connector, in each of the three ways
that a system can be written to. What is expected of each stands in ``LIES`` with the reason; the judge is what the server
really holds. Times are small, so that nobody waits.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from delivery.connectors import rest
from delivery.connectors.base import Misconfigured
from delivery.ledger import Delivery, Ledger, utc_now
from delivery.push import PushSettings, Report, push
from tests.support.ledgers import KEY, new_batch, some_decisions
from tests.support.liars import (
    TOKEN,
    VARIANTS,
    Elsewhere,
    Liar,
    Lie,
    Reply,
    after,
    applies_then,
    behind,
    described,
    honest_bulk,
    honest_read,
    honest_write,
    late,
    lying,
    only,
    stale,
    stores,
    unless,
)

BEFORE, AFTER = 100, 120
OVER = {"ACKED", "REJECTED", "CONFLICT", "OVERWRITTEN", "SKIPPED"}
variants = pytest.mark.parametrize("variant", VARIANTS)


@dataclass(frozen=True)
class Expected:
    """One liar, how it must end, and what must stand there then."""

    why: str
    state: str | tuple[str, ...]
    truth: Any
    write: Lie | None = None
    read: Lie | None = None
    writes: int | None = None
    """How many writes it may get at most, where that matters."""
    words: str = ""
    """What must be said of it."""
    starts: int = BEFORE


ELSEWHERE = "http://elsewhere.invalid"  # replaced by the other host's address
FAILS, SAYS_YES, HTML = Reply(500, {"error": "down"}), Reply(200, {"id": "x"}), Reply(200, b"<html>Bad gateway</html>")


def to_elsewhere(status: int) -> Reply:
    return Reply(status, None, {"Location": f"{ELSEWHERE}/taken"})


def another(liar: Liar, ask: Any) -> Reply:
    return Reply(200, {"id": "somebody-else", "value": AFTER})


def reads_break_after_the_write(liar: Liar, ask: Any) -> Reply:
    return honest_read(liar, ask) if not liar.applied[ask.id] else FAILS


NEVER_ANSWERED = ("REJECTED", "UNKNOWN")
"""No write of it was ever answered: given up, or left to the next run; not told as done either way."""

LIES: Mapping[str, Expected] = {
    "honest": Expected("it does as it is told", "ACKED", AFTER, writes=1),
    # -- yes, and nothing
    "ignores": Expected(
        "says yes with the new value in its answer, and the read-back still shows the old one",
        "REJECTED", BEFORE, only(Reply(200, {"id": "ignores", "value": AFTER})), words="still shows 100",
    ),
    "ignores_204": Expected("the same without a body", "REJECTED", BEFORE, only(Reply(204)), words="still shows 100"),
    "error_in_body": Expected(
        "its YAML knows the error: refused, in its own words",
        "REJECTED", BEFORE, only(Reply(200, {"error": "not your line"})), words="not your line", writes=1,
    ),
    "unknown_error_in_body": Expected(
        "an error that its YAML does not know looks like yes, and the read-back tells",
        "REJECTED", BEFORE, only(Reply(200, {"ok": False, "message": "quota"})), words="still shows 100",
    ),
    "warning_in_body": Expected(
        "it says error and has stored it all the same: what stands there counts",
        "ACKED", AFTER, applies_then(Reply(200, {"error": "rounded to cents"})), writes=1,
    ),
    # -- something else is stored
    "clamps": Expected(
        "stores 110, says 120", "REJECTED", 110, stores(lambda v: min(v, 110)), words="stored 110 instead of 120", writes=1,
    ),
    "coerces_to_0": Expected("stores 0", "REJECTED", 0, stores(lambda v: 0), words="stored 0 instead of 120", writes=1),
    "stores_words": Expected("stores what is no number", "REJECTED", "a lot", stores(lambda v: "a lot"), words="a lot"),
    "stores_nothing": Expected("empties the field", "REJECTED", None, stores(lambda v: None), words="empty"),
    "stores_text": Expected("stores the number as text: the same number", "ACKED", "120", stores(str), writes=1),
    "clears_other": Expected(
        "the value is right, and that another field is gone is said",
        "ACKED", AFTER, stores(lambda v: v, None), words="beside the value there changed: /other", writes=1,
    ),
    # -- odd but right
    "answers_204": Expected("stored, answered without a body", "ACKED", AFTER, applies_then(Reply(204)), writes=1),
    "no_op": Expected("it stands there already: nothing is sent", "ACKED", AFTER, only(Reply(204)), writes=0, starts=AFTER),
    # -- conditions
    "412_always": Expected(
        "every write is told to be late though nothing changed: bounded, and left; on a slow machine patience ends first",
        ("CONFLICT", "PENDING"), BEFORE, only(Reply(412, {"error": "changed"})), words="100",
    ),
    "412_once": Expected("another field changed: read again, written again", "ACKED", AFTER, unless(1, only(Reply(412)), honest_write)),
    # -- no answer, or one that says nothing
    "500_once": Expected("not applied: tried again", "ACKED", AFTER, unless(1, only(FAILS), honest_write)),
    "500_applied": Expected("applied: found by reading, never sent again", "ACKED", AFTER, applies_then(FAILS), writes=1),
    "500_always": Expected("never applied", NEVER_ANSWERED, BEFORE, only(FAILS)),
    "502_page": Expected("a proxy's page, not JSON", "ACKED", AFTER, unless(1, only(Reply(502, b"<h1>oh</h1>")), honest_write)),
    "hangs_once": Expected("no answer, not applied", "ACKED", AFTER, unless(1, only(Reply(manner="hang")), honest_write)),
    "hangs_always": Expected("no answer ever", NEVER_ANSWERED, BEFORE, only(Reply(manner="hang"))),
    "late": Expected("applies after we have given up waiting", "ACKED", AFTER, late(0.45)),
    "closes": Expected("hangs up without a word, not applied", "ACKED", AFTER, unless(1, only(Reply(manner="close")), honest_write)),
    "closes_applied": Expected("hangs up, applied", "ACKED", AFTER, applies_then(Reply(manner="close")), writes=1),
    "mid_body": Expected(
        "breaks off in its answer, not applied",
        "ACKED", AFTER, unless(1, only(Reply(200, {"id": "mid_body", "value": AFTER}, manner="mid_body")), honest_write),
    ),
    "mid_body_applied": Expected(
        "breaks off in its answer, applied", "ACKED", AFTER, applies_then(Reply(200, SAYS_YES.body, manner="mid_body")), writes=1,
    ),
    "invalid_json": Expected("200 and a page of HTML, applied", "ACKED", AFTER, applies_then(HTML), writes=1),
    "invalid_json_ignored": Expected("200 and a page of HTML, never applied", NEVER_ANSWERED, BEFORE, only(HTML)),
    "huge": Expected("an answer of 1 GB, applied: not taken in", "ACKED", AFTER, applies_then(Reply(200, manner="huge")), writes=1),
    "huge_chunked": Expected(
        "the same without saying so before", "ACKED", AFTER, applies_then(Reply(200, manner="huge_chunked")), writes=1,
    ),
    "drips": Expected(
        "a byte a second, applied: cut off", "ACKED", AFTER, applies_then(Reply(200, SAYS_YES.body, manner="drip")), writes=1,
    ),
    # -- elsewhere
    **{
        f"redirect_{status}": Expected(
            "sends us to another host: not followed", "REJECTED", BEFORE, only(to_elsewhere(status)), words="redirect", writes=1,
        )
        for status in (301, 302, 307, 308)
    },
    "redirect_applied": Expected("stored, then the way to a page elsewhere", "ACKED", AFTER, applies_then(to_elsewhere(303)), writes=1),
    # -- refusals
    "422": Expected("its rules forbid it", "REJECTED", BEFORE, only(Reply(422, {"error": "over the cap"})), words="over the cap", writes=1),
    "403": Expected("this one is not ours", "REJECTED", BEFORE, only(Reply(403, {"error": "not yours"})), words="not yours", writes=1),
    "404_at_the_write": Expected("deleted meanwhile, it says", "REJECTED", BEFORE, only(Reply(404)), writes=1),
    # -- reads
    "read_500_once": Expected("asked again", "ACKED", AFTER, read=unless(1, only(FAILS), honest_read), writes=1),
    "read_500": Expected("never shown, so never written", "PENDING", BEFORE, read=only(FAILS), writes=0),
    "read_hangs": Expected("never shown", "PENDING", BEFORE, read=only(Reply(manner="hang")), writes=0),
    "read_html": Expected("200 and a page", "PENDING", BEFORE, read=only(HTML), writes=0),
    "read_huge": Expected("1 GB", "PENDING", BEFORE, read=only(Reply(200, manner="huge_chunked")), writes=0),
    "read_drips": Expected("a byte a second", "PENDING", BEFORE, read=only(Reply(200, {"id": "x"}, manner="drip")), writes=0),
    "read_mid_body": Expected("breaks off", "PENDING", BEFORE, read=only(Reply(200, {"id": "x"}, manner="mid_body")), writes=0),
    "read_another": Expected("shows another entity, with the value wanted", "PENDING", BEFORE, read=another, writes=0),
    "read_404": Expected("not there", "REJECTED", BEFORE, read=only(Reply(404)), writes=0, words="not there"),
    "read_breaks": Expected(
        "stored, and cannot be read from then on: unknown, not believed", "UNKNOWN", AFTER, read=reads_break_after_the_write,
    ),
    "stale_undeclared": Expected(
        "shows the old value for longer than its YAML says: may be told as failed, never as done before it is",
        ("ACKED", "REJECTED", "CONFLICT"), AFTER, read=stale(0.25),
    ),
}  # fmt: skip


@dataclass
class Story:
    """One variant's push over all liars, and the one after everybody came round."""

    liar: Liar
    elsewhere: Elsewhere
    report: Report
    told: Mapping[str, Delivery]
    truth: Mapping[str, Any]
    applied: Mapping[str, int]
    writes: Mapping[str, int]
    again: Report
    told_then: Mapping[str, Delivery]
    truth_then: Mapping[str, Any]
    verified: bool
    files: bytes


def connector(liar: Liar, folder: Path, variant: str, **more: Any) -> rest.RestConnector:
    folder.mkdir(exist_ok=True)
    (folder / "liar.yaml").write_text(described(liar, variant, **more))
    said = rest.RestSettings(kind="rest", file="liar.yaml")
    return rest.connect(said, environ={"LIAR_TOKEN": TOKEN}, folder=folder, clock=utc_now)


def settings(**more: Any) -> PushSettings:
    said: dict[str, Any] = {
        "concurrency": 48, "attempts": 3, "patience_s": 4.0, "backoff_s": (0.01, 0.1), "breaker_failures": 10**6, "late_s": 0.5,
    }  # fmt: skip
    return PushSettings.model_validate(said | more)


def record(ledger: Ledger, liar: Liar, batch_id: str = "b1", after: int = AFTER, **more: Any) -> None:
    names = list(liar.truth)
    n = len(names)
    ledger.record_batch(
        new_batch(batch_id, pools=None, **more),
        some_decisions(batch_id, names, before=[BEFORE] * n, after=[after] * n),
    )


def deliver(
    ledger: Ledger,
    made: rest.RestConnector,
    batch_id: str = "b1",
    speed: float = 1.0,
    stop: threading.Event | None = None,
    **more: Any,
) -> Report:
    return push(
        ledger, made, batch_id, settings=settings(**more), run_id="run-1", rng=random.Random(7), stop=stop,
        monotonic=lambda: time.monotonic() * speed, sleep=lambda s: time.sleep(s / speed),
    )  # fmt: skip


def told(ledger: Ledger, batch_id: str = "b1") -> dict[str, Delivery]:
    return {str(d.entity): d for d in ledger.deliveries(batch_id)}


def false_acks(deliveries: Mapping[str, Delivery], truth: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger holds as proven and the server does not have."""
    return {
        name: truth[name]
        for name, d in deliveries.items()
        if d.state == "ACKED" and str(truth[name]) != str(d.sent if d.sent is not None else d.after)
    }


def truth_of(liar: Liar) -> dict[str, Any]:
    with liar.lock:
        return {name: item["value"] for name, item in liar.truth.items()}


def _story(variant: str, folder: Path, ledger: Ledger) -> Story:
    elsewhere = Elsewhere()

    def there(lie: Lie) -> Lie:
        def sent(liar: Liar, ask: Any) -> Reply:
            reply = lie(liar, ask)
            if "Location" in reply.headers:
                where = reply.headers["Location"].replace(ELSEWHERE, elsewhere.url)
                return Reply(reply.status, reply.body, {"Location": where}, reply.manner)
            return reply

        return sent

    lies = {
        "read": {name: e.read for name, e in LIES.items() if e.read},
        "write": {name: there(e.write) for name, e in LIES.items() if e.write},
    }
    with lying({name: e.starts for name, e in LIES.items()}, **lies) as liar:
        made = connector(liar, folder, variant, timeout_s=0.25)
        record(ledger, liar)
        report = deliver(ledger, made)
        time.sleep(0.05)
        state = (told(ledger), truth_of(liar), dict(liar.applied), {n: liar.seen["write", n] for n in LIES})
        liar.heal()
        again = deliver(ledger, made)
        then = (told(ledger), truth_of(liar))
        made.close()
    verified = ledger.verify().ok
    ledger.close()
    elsewhere.close()
    files = b"".join(path.read_bytes() for path in sorted(folder.glob("ledger.db*")))
    return Story(liar, elsewhere, report, *state, again, *then, verified, files)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger's file without a batch: making its tables takes half a second, copying it does not."""
    file = tmp_path_factory.mktemp("empty") / "ledger.db"
    Ledger.open(f"sqlite:///{file}", key=KEY).close()
    return file


def opened(empty: Path, folder: Path) -> Ledger:
    return Ledger.open(f"sqlite:///{shutil.copy(empty, folder)}", key=KEY)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, empty: Path) -> Mapping[str, Story]:
    """All three variants at once: they mostly wait."""
    folders = {variant: tmp_path_factory.mktemp(variant) for variant in VARIANTS}
    ledgers = {variant: opened(empty, folders[variant]) for variant in VARIANTS}
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(VARIANTS, pool.map(lambda v: _story(v, folders[v], ledgers[v]), VARIANTS), strict=True))


@variants
def test_nothing_is_acked_that_is_not_so(stories: Mapping[str, Story], variant: str) -> None:
    story = stories[variant]
    assert not false_acks(story.told, story.truth)
    assert not false_acks(story.told_then, story.truth_then)
    assert story.verified
    assert sum(d.state == "ACKED" for d in story.told.values()) > len(LIES) / 3  # and not because nothing was


@variants
@pytest.mark.parametrize("name", LIES)
def test_each_liar_ends_in_the_right_state(stories: Mapping[str, Story], variant: str, name: str) -> None:
    story, expected = stories[variant], LIES[name]
    delivery = story.told[name]
    states = (expected.state,) if isinstance(expected.state, str) else expected.state
    assert delivery.state in states, (expected.why, delivery.state, delivery.says)
    assert story.truth[name] == expected.truth, expected.why
    assert expected.words in (delivery.says or ""), delivery.says
    if expected.writes is not None:
        assert story.writes[name] <= expected.writes, expected.why
    if variant != "neither":
        assert story.applied.get(name, 0) <= 1, "applied more than once"


@variants
def test_what_was_left_open_is_finished_when_the_system_comes_round(stories: Mapping[str, Story], variant: str) -> None:
    story = stories[variant]
    open_ = {n for n, d in story.told.items() if d.state not in OVER}
    assert {n for n, e in LIES.items() if e.state in ("PENDING", "UNKNOWN")} <= open_
    assert not story.report.complete and story.again.complete
    assert {n: story.told_then[n].state for n in open_} == dict.fromkeys(open_, "ACKED")
    assert all(story.told_then[n] == story.told[n] for n in LIES if n not in open_)


@variants
def test_the_token_goes_to_its_own_host_and_nowhere_else(stories: Mapping[str, Story], variant: str) -> None:
    story = stories[variant]
    assert story.elsewhere.came == []
    assert set(story.liar.tokens) == {f"Bearer {TOKEN}"}
    assert TOKEN.encode() not in story.files
    assert TOKEN not in repr(story.report) + repr(story.told)


@variants
def test_a_gigabyte_is_not_taken_in(stories: Mapping[str, Story], variant: str) -> None:
    assert stories[variant].liar.sent < 64 << 20


@variants
def test_the_batch_the_decision_and_the_run_go_with_each_write(stories: Mapping[str, Story], variant: str) -> None:
    carried = stories[variant].liar.carried
    assert {(c["batch"], c["run"]) for c in carried} == {("b1", "run-1")} and all(c["decision"] for c in carried)


@variants
def test_repeats_are_counted_where_the_system_has_neither_key_nor_condition(
    stories: Mapping[str, Story], variant: str
) -> None:
    story = stories[variant]
    assert (story.report.repeats > 0) == (variant == "neither")
    assert story.told["late"].repeats == 0, "a late write was within the window in which it is waited for"
    twice = [name for name, n in story.applied.items() if n > 1]
    assert all(story.told[name].repeats for name in twice)


# -- a redirect, a slow down


@pytest.fixture
def ledger(tmp_path: Path, empty: Path) -> Iterator[Ledger]:
    with opened(empty, tmp_path) as made:
        yield made


@variants
def test_a_read_that_is_redirected_ends_the_push_and_shows_the_token_to_nobody(
    ledger: Ledger, tmp_path: Path, variant: str
) -> None:
    elsewhere = Elsewhere()
    reply = Reply(302, None, {"Location": f"{elsewhere.url}/items/a"})
    with lying({"a": BEFORE, "b": BEFORE}, read={"a": only(reply)}) as liar:
        made = connector(liar, tmp_path / "w", variant)
        record(ledger, liar)
        with pytest.raises(Misconfigured, match="redirects to localhost") as error:
            deliver(ledger, made)
        assert TOKEN not in str(error.value) and elsewhere.came == []
        assert liar.value("a") == BEFORE and not false_acks(told(ledger), truth_of(liar))
        liar.heal()
        assert deliver(ledger, made).complete
        assert truth_of(liar) == {"a": AFTER, "b": AFTER}
        made.close()
    elsewhere.close()


SLOW = {
    "seconds": Reply(429, {"error": "slow down"}, {"Retry-After": "3"}),
    "date": after(3.5),
    "plain": Reply(429, {"error": "slow down"}),
    "503": Reply(503, {"error": "busy"}, {"Retry-After": "3"}),
}


@variants
@pytest.mark.parametrize("how", SLOW)
def test_a_system_that_asks_for_time_gets_it(ledger: Ledger, tmp_path: Path, variant: str, how: str) -> None:
    """Ten seconds pass in one."""
    with lying({"a": BEFORE, "b": BEFORE}, write={"a": unless(1, only(SLOW[how]), honest_write)}) as liar:
        made = connector(liar, tmp_path / "w", variant)
        record(ledger, liar)
        report = deliver(ledger, made, speed=10, patience_s=60, concurrency=1)
        assert report.complete and truth_of(liar) == {"a": AFTER, "b": AFTER}
        assert {d.state for d in told(ledger).values()} == {"ACKED"}
        made.close()
        (first, _), *rest_ = [(at, name) for at, name in liar.writes]
        if how != "plain":
            assert min(at for at, _ in rest_) - first >= 0.2, "it asked for 3 s"


@variants
def test_a_system_that_asks_for_too_much_time_is_left_for_another_run(
    ledger: Ledger, tmp_path: Path, variant: str
) -> None:
    slow = only(Reply(429, {"error": "tomorrow"}, {"Retry-After": "999999999"}))
    with lying({"a": BEFORE, "b": BEFORE}, write={"a": slow, "b": slow}) as liar:
        made = connector(liar, tmp_path / "w", variant)
        record(ledger, liar)
        report = deliver(ledger, made)
        assert not report.complete and report.seconds < 2 and report.why
        assert {d.state for d in told(ledger).values()} == {"PENDING"}
        liar.heal()
        assert deliver(ledger, made).complete and truth_of(liar) == {"a": AFTER, "b": AFTER}
        made.close()


@variants
def test_a_system_that_always_says_429_is_left_for_another_run(ledger: Ledger, tmp_path: Path, variant: str) -> None:
    with lying({"a": BEFORE}, write={"a": only(Reply(429))}) as liar:
        made = connector(liar, tmp_path / "w", variant)
        record(ledger, liar)
        report = deliver(ledger, made, patience_s=0.3)
        assert not report.complete and [d.state for d in told(ledger).values()] == ["PENDING"]
        assert liar.value("a") == BEFORE
        made.close()


# -- reads that are behind


@variants
def test_stale_reads_are_waited_out(ledger: Ledger, tmp_path: Path, variant: str) -> None:
    """What is read may be 0.3 s old, and the YAML says so."""
    reads = {"after_the_write": stale(0.3), "wanted_is_past": behind(0.3, AFTER), "persons_is_now": behind(0.3, BEFORE)}
    with lying({"after_the_write": BEFORE, "wanted_is_past": BEFORE, "persons_is_now": 77}, read=reads) as liar:
        made = connector(liar, tmp_path / "w", variant, stale_s=0.4)
        record(ledger, liar)
        report = deliver(ledger, made, attempts=2)
        states = {name: d.state for name, d in told(ledger).items()}
        assert not false_acks(told(ledger), truth_of(liar))
        assert states["after_the_write"] == states["wanted_is_past"] == "ACKED"
        assert liar.seen["write", "after_the_write"] == 1, "sent again though the read may have been old"
        assert report.repeats == 0
        if variant == "etag":
            # Only a condition can know: elsewhere the value read is all there is, and it was old
            assert states["persons_is_now"] == "CONFLICT" and liar.value("persons_is_now") == 77
        made.close()


@variants
def test_a_late_write_does_not_overtake_a_newer_batch(ledger: Ledger, tmp_path: Path, variant: str) -> None:
    """The first batch's write hangs, its push is ended, and it is applied only while the second batch is pushed."""
    ended = threading.Event()

    def hangs(liar: Liar, ask: Any) -> Reply:
        ended.set()
        return late(0.6)(liar, ask)

    with lying({"a": BEFORE}, write={"a": unless(1, hangs, honest_write)}) as liar:
        made = connector(liar, tmp_path / "w", variant, timeout_s=0.1)
        record(ledger, liar)
        first = deliver(ledger, made, stop=ended)
        assert not first.complete and told(ledger)["a"].state == "UNKNOWN"
        record(ledger, liar, "b2", after=130, day=date(2026, 4, 11))
        deliver(ledger, made, "b2", late_s=1.0)
        time.sleep(max(0.0, liar.writes[0][0] + 0.7 - time.monotonic()))  # whatever was late has come by now
        assert not false_acks(told(ledger, "b2"), truth_of(liar)), "the older write came last"
        made.close()


# -- many at once


def shifting(liar: Liar, ids: list[str], page: int) -> Reply:
    """Pages of five; before the second is asked for, somebody adds a line in front, so that one is shown twice."""
    with liar.lock:
        found = [{**liar.truth[id], "tag": f'"{liar.truth[id]["version"]}"'} for id in ids if id in liar.truth]
    if page == 1 and len(found) > 5:
        return Reply(200, {"items": found[:5], "pages": 3})
    if len(found) > 5:
        # and one was closed at the end: the shift loses the sixth
        return Reply(200, {"items": found[6:] if page == 2 else [], "pages": 3})
    return Reply(200, {"items": found if page == 1 else [], "pages": 1})


def partly(liar: Liar, rows: list[dict[str, Any]]) -> Reply:
    """Some fail, some are left out of the answer, which is in another order."""
    kept = [row for row in rows if row["id"] not in ("fails", "left_out")]
    done = (honest_bulk(liar, kept).body or {})["results"]
    done = [r for r in done if r["id"] != "left_out_applied"]
    failed = [{"id": row["id"], "status": 422, "error": "over the cap"} for row in rows if row["id"] == "fails"]
    return Reply(200, {"results": (done + failed)[::-1]})


BULK = ["fails", "left_out", "left_out_applied", "clamps", "ignores", *(f"e{n}" for n in range(8))]
BULK_LIES = {"clamps": stores(lambda v: 110), "ignores": only(SAYS_YES)}
BULK_ENDS = {
    "fails": ("REJECTED", BEFORE), "left_out": ("REJECTED", BEFORE), "left_out_applied": ("ACKED", AFTER),
    "clamps": ("REJECTED", 110), "ignores": ("REJECTED", BEFORE), **{f"e{n}": ("ACKED", AFTER) for n in range(8)},
}  # fmt: skip


@variants
def test_a_bulk_answer_counts_row_by_row(ledger: Ledger, tmp_path: Path, variant: str) -> None:
    with lying(dict.fromkeys(BULK, BEFORE), write=BULK_LIES, bulk=partly, listing=shifting) as liar:
        made = connector(liar, tmp_path / "w", variant, bulk=True)
        record(ledger, liar)
        deliver(ledger, made, late_s=0.1, attempts=2)
        now = told(ledger)
        assert not false_acks(now, truth_of(liar))
        assert {n: (d.state, liar.value(n)) for n, d in now.items()} == BULK_ENDS, {n: d.says for n, d in now.items()}
        assert "over the cap" in (now["fails"].says or "")
        if variant != "neither":
            assert max(liar.applied.values()) == 1
        made.close()


def in_the_order_of_its_own(liar: Liar, rows: list[dict[str, Any]]) -> Reply:
    kept = [row for row in rows if row["id"] != "fails"]
    results = (honest_bulk(liar, kept).body or {})["results"]
    results.append({"id": "fails", "status": 422, "error": "over the cap"} if len(kept) < len(rows) else {})
    return Reply(200, {"results": [{k: r[k] for k in ("status", "error") if k in r} for r in reversed(results)]})


@variants
def test_bulk_rows_without_names_in_another_order_are_sorted_out_by_reading(
    ledger: Ledger, tmp_path: Path, variant: str
) -> None:
    """The YAML says that rows come in the order sent; they do not, so that each is told another's end."""
    with lying(dict.fromkeys(["fails", "b", "c"], BEFORE), bulk=in_the_order_of_its_own) as liar:
        folder = tmp_path / "w"
        connector(liar, folder, variant, bulk=True).close()
        said = (folder / "liar.yaml").read_text().replace("      key: id\n      errors", "      errors")
        (folder / "liar.yaml").write_text(said)
        made = rest.connect(
            rest.RestSettings(kind="rest", file="liar.yaml"),
            environ={"LIAR_TOKEN": TOKEN},
            folder=folder,
            clock=utc_now,
        )
        record(ledger, liar)
        deliver(ledger, made, late_s=0.1, attempts=2)
        now = told(ledger)
        assert not false_acks(now, truth_of(liar))
        assert {n: (d.state, liar.value(n)) for n, d in now.items()} == {
            "fails": ("REJECTED", BEFORE), "b": ("ACKED", AFTER), "c": ("ACKED", AFTER),
        }  # fmt: skip
        made.close()


def dies_half_way(liar: Liar, rows: list[dict[str, Any]]) -> Reply:
    """Applies half of the first call and falls over; is well again afterwards."""
    half = rows[: len(rows) // 2] if not liar.applied else rows
    told_ = honest_bulk(liar, half)
    return told_ if len(half) == len(rows) else FAILS


@variants
def test_a_bulk_call_that_dies_half_way_is_finished(ledger: Ledger, tmp_path: Path, variant: str) -> None:
    names = [f"e{n}" for n in range(12)]
    with lying(dict.fromkeys(names, BEFORE), bulk=dies_half_way, listing=shifting) as liar:
        made = connector(liar, tmp_path / "w", variant, bulk=True)
        record(ledger, liar)
        report = deliver(ledger, made)
        assert report.complete and {d.state for d in told(ledger).values()} == {"ACKED"}
        assert set(truth_of(liar).values()) == {AFTER}
        assert set(liar.applied.values()) == {1}, "what was applied was read back and not sent again"
        made.close()
