"""Landing zones as people keep them: files renamed, rotated, swapped, copied, restored; no point in time changes by that."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.ingest import manifest
from tests.pipeline.ingest.test_landing import CONTRACT, LATER, NOW, SQL, LandingHarness, _dying, line
from tests.support.properties import examples

HOUR = timedelta(hours=1)
BY_MOMENT = copy.deepcopy(CONTRACT)
"""A restated figure is a row of its own: known_at is one of the unique columns."""
BY_MOMENT["events"]["unique"] = ["id", "known_at"]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[LandingHarness]:
    yield LandingHarness(tmp_path)


def seen(desk: LandingHarness, at: datetime) -> list[tuple[str, float]]:
    """What is visible as of a time."""
    return sorted(
        (e["id"], e["amount"])
        for e in desk.rows("events")
        if e["known_at"] <= at and (e["superseded_at"] is None or e["superseded_at"] > at)
    )


def names(desk: LandingHarness, at: datetime) -> list[str]:
    return [name for name, _ in seen(desk, at)]


def standing(desk: LandingHarness) -> dict[str, tuple[str, str]]:
    """Path → (status, whose double) of what the paths hold."""
    return {
        r["path"]: (r["status"], r["duplicate_of"])
        for r in desk.rows("files")
        if r["superseded_at"] is None and r["left_at"] is None
    }


def rotate(desk: LandingHarness, *paths: str) -> None:
    """Each file takes the next one's name, the last is lost."""
    for older, newer in zip(reversed(paths), [*reversed(paths)][1:], strict=False):
        if (desk.zone / newer).exists():
            (desk.zone / newer).replace(desk.zone / older)


def test_a_rotation_in_one_ingest_changes_no_point_in_time(desk: LandingHarness) -> None:
    desk.put("export.csv", line("a"), line("b"))
    desk.land(files="export.csv*")
    rotate(desk, "export.csv", "export.csv.1")
    desk.put("export.csv", line("c"))
    found = desk.land(LATER, files="export.csv*")
    assert names(desk, NOW) == ["a", "b"]
    assert names(desk, LATER) == ["a", "b", "c"]
    assert standing(desk) == {"export.csv": ("landed", None), "export.csv.1": ("landed", None)}
    assert [f.path for f in found.files] == ["export.csv", "export.csv.1"] and found.landed == ("export.csv",)
    assert {(e["source_file"], e["known_at"], e["superseded_at"]) for e in desk.rows("events") if e["id"] == "a"} == {
        ("export.csv", datetime(2024, 5, 2), None)
    }


def test_a_rotation_over_several_ingests_changes_no_point_in_time(desk: LandingHarness) -> None:
    desk.put("export.csv", line("a"))
    desk.land(files="export.csv*")
    rotate(desk, "export.csv", "export.csv.1")
    desk.land(NOW + HOUR, files="export.csv*")
    assert standing(desk) == {"export.csv.1": ("landed", None)}
    desk.put("export.csv", line("c"))
    desk.land(LATER, files="export.csv*")
    assert (names(desk, NOW), names(desk, NOW + HOUR), names(desk, LATER)) == (["a"], ["a"], ["a", "c"])


@pytest.mark.parametrize("between", [False, True], ids=["at_once", "step_by_step"])
def test_what_falls_off_the_end_of_a_rotation_stays(desk: LandingHarness, between: bool) -> None:
    chain = ("export.csv", "export.csv.1", "export.csv.2")
    for n, name in enumerate("abcdef"):
        rotate(desk, *chain)
        if between:
            desk.land(NOW + n * HOUR - HOUR / 2, files="export.csv*")
        desk.put("export.csv", line(name))
        desk.land(NOW + n * HOUR, files="export.csv*")
    for n in range(6):
        assert names(desk, NOW + n * HOUR) == list("abcdef")[: n + 1]
    assert sum(r.status == "landed" for r in manifest.Manifest.read(desk.lake, "shop/files").owners()) == 6


def test_a_file_that_took_anothers_name_is_restated_there(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    desk.land()
    (desk.zone / "a.csv").rename(desk.zone / "b.csv")
    desk.land(NOW + HOUR)
    desk.put("b.csv", line("b"))
    desk.land(LATER)
    assert (names(desk, NOW + HOUR), names(desk, LATER)) == (["a"], ["b"])


def test_a_swap_moves_no_row(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    desk.put("b.csv", line("b"))
    desk.land()
    before = desk.digests()["events"]
    (desk.zone / "a.csv").rename(desk.zone / "x.part")
    (desk.zone / "b.csv").rename(desk.zone / "a.csv")
    (desk.zone / "x.part").rename(desk.zone / "b.csv")
    desk.land(LATER)
    assert desk.digests()["events"] == before
    assert standing(desk) == {"a.csv": ("landed", None), "b.csv": ("landed", None)}


def test_an_old_content_under_a_new_name_brings_nothing_back_to_life(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    desk.land()
    desk.put("a.csv", line("b"))
    desk.land(NOW + HOUR)
    desk.put("a.bak.csv", line("a"))
    desk.land(LATER)
    assert (names(desk, NOW), names(desk, LATER)) == (["a"], ["b"])
    (record,) = [r for r in desk.rows("files") if r["path"] == "a.bak.csv"]
    assert (record["status"], record["duplicate_of"], record["rows"]) == ("duplicate", "a.csv", 0)
    assert "superseded at 2024-05-02 05:00:00 in a.csv" in record["reason"]
    (desk.zone / "a.bak.csv").replace(desk.zone / "a.csv")  # and yet it may be taken back for good
    desk.land(LATER + HOUR)
    assert (names(desk, NOW), names(desk, LATER), names(desk, LATER + HOUR)) == (["a"], ["b"], ["a"])


def test_a_path_that_comes_back_to_what_it_held_is_restated(desk: LandingHarness) -> None:
    for n, name in enumerate(["a", "b", "a"]):
        desk.put("a.csv", line(name), line("bad", amount=-1))
        desk.land(NOW + n * HOUR)
    assert [names(desk, NOW + n * HOUR) for n in range(3)] == [["a"], ["b"], ["a"]]
    assert [q["superseded_at"] for q in desk.rows("quarantine") if q["superseded_at"] is None] == [None]


def test_a_vanished_file_keeps_its_rows(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    desk.land()
    (desk.zone / "a.csv").unlink()
    desk.land(LATER)
    assert names(desk, LATER) == ["a"]


def test_a_rotation_that_packs_the_file_adds_nothing(desk: LandingHarness) -> None:
    import gzip

    desk.put("export.csv", line("a"), line("b"))
    desk.land(files="export.csv*")
    (desk.zone / "export.csv.1.gz").write_bytes(gzip.compress((desk.zone / "export.csv").read_bytes()))
    (desk.zone / "export.csv").unlink()
    desk.put("export.csv", line("c"))
    desk.land(LATER, files="export.csv*")
    assert (names(desk, NOW), names(desk, LATER)) == (["a", "b"], ["a", "b", "c"])
    assert [e["known_at"] for e in desk.rows("events") if e["id"] == "a" and e["superseded_at"] is None] == [LATER]


def test_a_bad_file_in_a_rotation_stops_no_other(desk: LandingHarness) -> None:
    desk.put("export.csv", line("a"))
    desk.land(files="export.csv*")
    rotate(desk, "export.csv", "export.csv.1")
    (desk.zone / "export.csv").write_text("nonsense\n")
    assert list(desk.land(LATER, files="export.csv*").refused) == ["export.csv"]
    assert names(desk, LATER) == ["a"]
    desk.put("export.csv", line("b"))
    desk.land(LATER + HOUR, files="export.csv*")
    assert (names(desk, LATER), names(desk, LATER + HOUR)) == (["a"], ["a", "b"])


def test_a_run_of_some_days_looks_for_a_content_in_the_files_of_all(desk: LandingHarness) -> None:
    first, second = "in-2024-05-01.csv", "in-2024-05-02.csv"
    desk.put(first, line("a"))
    desk.land(files="in-{day}.csv")
    (desk.zone / first).rename(desk.zone / second)
    days = [datetime(2024, 5, 2).date()]
    desk.land(NOW + HOUR, days=days, files="in-{day}.csv")
    assert standing(desk) == {second: ("landed", None)}
    desk.put(second, line("b"))
    desk.land(LATER, days=days, files="in-{day}.csv")
    assert (names(desk, NOW), names(desk, LATER)) == (["a"], ["b"])


# --- duplicates of rows that left


def test_a_duplicate_comes_in_when_the_row_that_pushed_it_out_has_left(desk: LandingHarness) -> None:
    desk.put("a.csv", line("K", amount=1), line("a"))
    desk.put("b.csv", line("K", amount=2), line("b"))
    desk.put("c.csv", line("K", amount=3))
    desk.land()
    desk.put("a.csv", line("a"))
    found = desk.land(LATER)
    assert found.admitted == 1 and ("K", 2.0) in seen(desk, LATER) and ("K", 1.0) in seen(desk, NOW)
    assert Counter(names(desk, NOW)) == Counter(names(desk, LATER)) == Counter("Kab")
    assert [(q["source_file"], q["rule"]) for q in desk.rows("quarantine")] == [("c.csv", "duplicate")]
    counts = {
        r["path"]: (r["rows"], r["accepted"], r["quarantined"]) for r in desk.rows("files") if not r["superseded_at"]
    }
    assert counts == {"a.csv": (1, 1, 0), "b.csv": (2, 2, 0), "c.csv": (1, 0, 1)}
    desk.put("b.csv", line("b"))
    desk.land(LATER + HOUR)
    assert ("K", 3.0) in seen(desk, LATER + HOUR) and ("K", 2.0) in seen(desk, LATER)
    assert desk.rows("quarantine") == []
    assert desk.land(LATER + 2 * HOUR).admitted == 0


def test_a_duplicate_of_another_source_comes_in_too(desk: LandingHarness) -> None:
    desk.put("a.csv", line("K"), line("a"))
    desk.put("other/b.csv", line("K", amount=2))
    said: dict[str, dict[str, Any]] = {"first": {}, "second": {"files": "other/*.csv"}}
    desk.land(sources=said)
    desk.put("a.csv", line("a"))
    assert desk.land(LATER, sources=said).admitted == 1
    assert desk.live() == {"a": 1.0, "K": 2.0}


def test_a_row_pushed_out_by_one_that_leaves_in_the_same_run_comes_in(desk: LandingHarness) -> None:
    desk.put("b.csv", line("K"))
    desk.land()
    desk.put("a.csv", line("K", amount=2))
    desk.put("b.csv", line("b"))
    found = desk.land(LATER)
    assert desk.live() == {"K": 2.0, "b": 1.0} and (found.accepted, found.quarantined, found.rules) == (2, 0, {})
    assert desk.rows("quarantine") == []


def test_what_comes_late_is_known_no_earlier_than_the_row_left_whose_columns_it_has(desk: LandingHarness) -> None:
    desk.put("a.csv", line("K"))
    desk.land()
    desk.put("a.csv", line("a"))
    desk.land(LATER)
    desk.put("b.csv", line("K", amount=2))  # mapped as known long ago
    desk.land(LATER + HOUR)
    for at in (NOW, LATER - HOUR, LATER, LATER + HOUR):
        assert names(desk, at).count("K") == 1


def test_a_duplicate_comes_in_when_the_restated_row_in_the_place_of_its_double_has_left(desk: LandingHarness) -> None:
    desk.put("a.csv", line("K", amount=1), line("a"))
    desk.put("b.csv", line("K", amount=2), line("b"))
    desk.land(contract=BY_MOMENT)
    for n in range(1, 4):  # restated again and again, each time known from then on
        desk.put("a.csv", line("K", amount=10 * n), line("a"))
        assert desk.land(NOW + n * HOUR, contract=BY_MOMENT).admitted == 0
    desk.put("a.csv", line("a"))
    assert desk.land(NOW + 4 * HOUR, contract=BY_MOMENT).admitted == 1
    assert [[v for k, v in seen(desk, NOW + n * HOUR) if k == "K"] for n in range(5)] == [[1], [10], [20], [30], [2]]
    assert desk.rows("quarantine") == []
    assert desk.land(NOW + 5 * HOUR, contract=BY_MOMENT).new == ()


def test_of_duplicates_that_come_in_at_one_moment_what_upstream_told_last_stands(desk: LandingHarness) -> None:
    early, late = "2024-05-01 12:00:00", "2024-05-02"
    desk.put("a.csv", line("K", known=early), line("K", known=late), line("a"))
    desk.put("b.csv", line("K", known=early, amount=5), line("b"))
    desk.put("c.csv", line("K", known=late, amount=7), line("c"))
    desk.land(contract=BY_MOMENT)
    desk.put("a.csv", line("a"))
    assert desk.land(LATER, contract=BY_MOMENT).admitted == 1
    assert [v for k, v in seen(desk, LATER) if k == "K"] == [7]


def test_what_comes_late_is_known_no_earlier_than_the_last_that_stood_in_the_place_of_its_double(
    desk: LandingHarness,
) -> None:
    desk.put("a.csv", line("K"))
    desk.land(contract=BY_MOMENT)
    for n in range(1, 6):
        desk.put("a.csv", line("K", amount=n + 1) if n < 5 else line("a"))
        desk.land(NOW + n * HOUR, contract=BY_MOMENT)
    desk.put("b.csv", line("K", amount=9))  # mapped as known long ago
    desk.land(LATER, contract=BY_MOMENT)
    assert [[v for k, v in seen(desk, NOW + n * HOUR) if k == "K"] for n in range(6)] == [[1], [2], [3], [4], [5], [9]]


@pytest.mark.parametrize("after", [False, True], ids=["before_the_write", "after_the_write"])
@pytest.mark.parametrize("at", range(1, 5))
def test_a_crash_while_files_rotate_and_duplicates_come_in_ends_in_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    found = []
    for name in ("undisturbed", "crashing"):
        desk = LandingHarness(tmp_path / name)
        desk.put("export.csv", line("a"), line("x", amount=-1))
        desk.put("k.csv", line("K"), line("k", amount=-1))
        desk.put("l.csv", line("K", amount=2))
        desk.land(files="*.csv*")
        rotate(desk, "export.csv", "export.csv.1")
        desk.put("export.csv", line("c"))
        desk.put("k.csv", line("k"))
        if name == "crashing":
            with _dying(monkeypatch, at, after), pytest.raises(KeyboardInterrupt):
                desk.land(LATER, files="*.csv*")
        desk.land(LATER if (at, after) == (1, False) else LATER + HOUR, files="*.csv*")
        found.append(desk)
    plain = LandingHarness.digests(found[0])
    if (at, after) == (1, False):
        assert found[1].digests() == plain
    assert found[1].live() == found[0].live() == {"a": 1.0, "c": 1.0, "k": 1.0, "K": 2.0}


# --- any sequence of what people do to a zone


PATHS = ("a.csv", "a.csv.1", "a.csv.2", "b.csv")
KEYS = ("K", "L")


@dataclass
class Model:
    """Which contents stand, told from what the zone held at each ingest and nothing else."""

    held: dict[str, int] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    past: dict[str, set[int]] = field(default_factory=dict)

    def ingest(self, zone: dict[str, int]) -> None:
        """Contents that come, that are superseded, and that a path takes back."""
        here, held = set(zone.values()), dict(self.held)
        moved = {c for c in held.values() if all(zone.get(p) != c for p, h in held.items() if h == c)}
        dying, back = set(), set()
        for path, content in zone.items():
            old = held.get(path)
            if old == content:
                continue
            restated = old in self.live and old not in here
            again = content in self.dead and old is not None
            if again and (content in self.past.get(path, ()) or (restated and content not in moved)):
                back.add(content)
            elif content in moved:
                restated = False
            if restated and old is not None:
                dying.add(old)
        self.live, self.dead = self.live - dying | (here - self.dead) | back, self.dead - back | dying
        for path, content in zone.items():
            self.held[path] = content
            if content in self.live:
                self.past.setdefault(path, set()).add(content)
        for path, content in held.items():
            if path not in zone and content in here:
                del self.held[path]  # renamed


class MovesHarness:
    """A desk, the model, and what was seen at each ingest."""

    def __init__(self, root: Path, by_moment: bool = False) -> None:
        self.desk, self.model, self.zone, self.made, self.now = LandingHarness(root), Model(), dict[str, int](), 0, NOW
        self.by_moment = by_moment
        if not by_moment:
            (root / "mapping.sql").write_text(SQL.replace("known AS known_at,", ""))
        self.looks: list[tuple[datetime, list[tuple[str, float]]]] = []

    def keys(self, content: int) -> set[str]:
        """The keys of a content's good rows: its own, and some that others have, too."""
        return {f"own-{content}", *(k for n, k in enumerate(KEYS) if content >> n & 1)}

    def write(self, path: str, content: int) -> None:
        rows = [line(k, amount=content) for k in sorted(self.keys(content))]
        self.desk.put(path, *rows, line("bad", amount=-content - 1))
        self.zone[path] = content

    def do(self, what: str, one: str, two: str, pick: int) -> None:
        if what == "put":
            self.made += 1
            self.write(one, self.made)
        elif what == "restore" and self.made:
            self.write(one, 1 + pick % self.made)
        elif what == "rename" and one in self.zone and one != two:
            self.write(two, self.zone.pop(one))
            (self.desk.zone / one).unlink()
        elif what == "copy" and one in self.zone:
            self.write(two, self.zone[one])
        elif what == "delete" and self.zone.pop(one, None) is not None:
            (self.desk.zone / one).unlink()
        elif what == "ingest":
            self.ingest()

    def ingest(self) -> None:
        self.now += HOUR
        if self.by_moment:
            self.desk.land(self.now, files="*.csv*", contract=BY_MOMENT)
        else:
            self.desk.land(self.now, files="*.csv*", known_at="landing")
        self.model.ingest(dict(self.zone))
        if self.desk.lake.exists("shop/events"):
            self.check()

    def check(self) -> None:
        stands = names(self.desk, self.now)
        if self.by_moment:  # what comes late may be known from before, and a restated row stands beside its double
            at_once = [
                (e["id"], e["known_at"])
                for e in self.desk.rows("events")
                if e["superseded_at"] is None or e["superseded_at"] > e["known_at"]
            ]
            assert len(set(at_once)) == len(at_once), "a key stands twice"
        else:
            for at, before in self.looks:
                assert seen(self.desk, at) == before, "an earlier point in time has changed"
            self.looks.append((self.now, seen(self.desk, self.now)))
            assert len(set(stands)) == len(stands), "a key stands twice"
        assert set(stands) == set().union(*(self.keys(c) for c in self.model.live)) if self.model.live else not stands
        book = manifest.Manifest.read(self.desk.lake, "shop/files")
        live = Counter(e["source_file_id"] for e in self.desk.rows("events") if e["superseded_at"] is None)
        rejected = Counter(
            manifest.standing(book, manifest.read_quarantine(self.desk.lake, "shop/quarantine"))[
                "source_file_id"
            ].to_pylist()
        )
        owners = book.owners()
        assert len({o.file_id for o in owners}) == len(owners) == len(self.model.live)
        for owner in owners:
            assert owner.rows == owner.accepted + owner.quarantined
            assert (live[owner.file_id], rejected[owner.file_id]) == (owner.accepted, owner.quarantined)
        assert sum(live.values()) == sum(o.accepted for o in owners)


ACTS = st.tuples(
    st.sampled_from(["put", "put", "restore", "rename", "rename", "copy", "delete", "ingest", "ingest", "ingest"]),
    st.sampled_from(PATHS), st.sampled_from(PATHS), st.integers(0, 9),
)  # fmt: skip


DOUBLED = [
    (what, path, path, 0)
    for what, path in [
        *[("put", "b.csv")] * 2, ("ingest", ""), *[("put", "a.csv")] * 2, ("ingest", ""), ("put", "a.csv"), ("ingest", ""),
    ]
]  # fmt: skip
"""A file doubles a row of another that is restated, and then leaves."""


@pytest.mark.parametrize("by_moment", [False, True], ids=["by_id", "by_id_and_moment"])
@settings(max_examples=examples(20))
@given(acts=st.lists(ACTS, min_size=4, max_size=16))
@example(acts=DOUBLED)
def test_whatever_people_do_to_a_zone_the_past_stays_and_each_content_stands_once(
    tmp_path_factory: pytest.TempPathFactory, by_moment: bool, acts: list[tuple[str, str, str, int]]
) -> None:
    world = MovesHarness(tmp_path_factory.mktemp("zone"), by_moment)
    world.do("put", PATHS[0], PATHS[0], 0)
    world.ingest()
    for act in acts:
        world.do(*act)
    world.ingest()
