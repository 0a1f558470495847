"""The file connector: files appear whole, the newest says the value, and nobody's file is lost."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delivery.connectors import atomic_files, file_drop
from delivery.connectors.base import Misconfigured, Reading, Unavailable, Write
from delivery.connectors.file_drop import FileDrop, FileDropSettings
from delivery.ledger import Ledger, utc_now
from delivery.push import PushSettings, push
from tests.support.ledgers import KEY, new_batch, some_decisions
from tests.support.properties import examples

NOW = datetime(2026, 5, 1, 6, 0)
FORMATS = pytest.mark.parametrize("format", ["csv", "parquet"])


def connect(folder: Path, clock: Callable[[], datetime] = lambda: NOW, **more: Any) -> FileDrop:
    said = {"kind": "file_drop", "path": "drop", "shape": "batches", "format": "csv", "key": "id", "value": "amount"}
    if more.get("shape") == "state":
        said["path"] = f"drop/lines.{more.get('format', 'csv')}"
    (folder / "drop").mkdir(exist_ok=True)
    return file_drop.connect(FileDropSettings.model_validate(said | more), environ={}, folder=folder, clock=clock)


def save(path: Path, columns: dict[str, Sequence[Any]], at: datetime | None = None) -> None:
    """As a person, or the other system, saves a file: whole, in one step."""
    new = path.with_name("person.tmp")
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), new)
    else:
        with new.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([list(columns), *zip(*columns.values(), strict=True)])
    if at is not None:
        ns = atomic_files.ns(at)
        os.utime(new, ns=(ns, ns))
    os.rename(new, path)


def table(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    rows = list(csv.reader(path.open(newline="")))
    return {name: [row[n] for row in rows[1:]] for n, name in enumerate(rows[0])}


def write(reading: Reading, value: int, **more: Any) -> Write:
    made = Write(reading.key, reading.target, value, reading.value, None, "key", f"d-{reading.key}", "batch-1", "run-1")
    return replace(made, **more)


def outcomes(answers: Sequence[Any]) -> list[str]:
    return [answer.outcome for answer in answers]


def dropped(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "drop").iterdir() if not p.name.startswith("."))


# -- a folder of files


@FORMATS
def test_a_call_drops_one_file_that_says_the_new_values(tmp_path: Path, format: str) -> None:
    drop = connect(tmp_path, format=format, missing_means=100)
    seen = drop.read(["b", "a"])
    assert [r.value for r in seen.values()] == [100, 100]
    answers = drop.apply([write(seen["b"], 120), write(seen["a"], 80)])
    assert outcomes(answers) == ["accepted", "accepted"]
    (file,) = dropped(tmp_path)
    said = table(file)
    assert [str(v) for v in said["amount"]] == ["80", "120"] and said["id"] == ["a", "b"]
    assert said["decision_id"] == ["d-a", "d-b"] and set(said["batch_id"]) == {"batch-1"}
    assert file.stem.endswith(hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    assert [r.value for r in drop.read(["a", "b"]).values()] == [80, 120]
    assert [r.value for r in connect(tmp_path, format=format).read(["a", "b"]).values()] == [80, 120]


@FORMATS
def test_the_same_writes_make_the_same_bytes_whatever_their_order(tmp_path: Path, format: str) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        drop = connect(tmp_path / name, format=format, missing_means=1)
        writes = [write(r, n) for n, r in enumerate(drop.read(["c", "a", "b"]).values(), 2)]
        drop.apply(writes if name == "one" else writes[::-1])
        made.append(dropped(tmp_path / name)[0])
    assert made[0].read_bytes() == made[1].read_bytes() and made[0].name == made[1].name


def test_a_rerun_drops_nothing(tmp_path: Path) -> None:
    drop = connect(tmp_path, missing_means=1)
    writes = [write(r, 5) for r in drop.read(["a", "b"]).values()]
    drop.apply(writes)
    assert outcomes(connect(tmp_path, missing_means=1).apply(writes)) == ["accepted", "accepted"]
    assert len(dropped(tmp_path)) == 1


def test_the_newest_file_wins_whoever_dropped_it(tmp_path: Path) -> None:
    drop = connect(tmp_path, missing_means=1)
    seen = drop.read(["a", "b"])
    drop.apply([write(r, 5) for r in seen.values()])
    save(tmp_path / "drop" / "correction.csv", {"id": ["a"], "amount": [7]}, at=NOW + timedelta(hours=1))
    assert [r.value for r in drop.read(["a", "b"]).values()] == [7, 5]
    answers = drop.apply([write(r, 9, expected=5) for r in seen.values()])
    assert outcomes(answers) == ["conflict", "accepted"] and "7" in answers[0].says
    assert [r.value for r in drop.read(["a", "b"]).values()] == [7, 9]
    # Ours is newer than the person's, though the clock says otherwise
    assert outcomes(drop.apply([write(seen["a"], 8, expected=7)])) == ["accepted"]
    assert drop.read(["a"])["a"].value == 8


def test_what_the_other_system_took_away_still_counts(tmp_path: Path) -> None:
    drop = connect(tmp_path, missing_means=1)
    drop.apply([write(drop.read(["a"])["a"], 5)])
    save(tmp_path / "drop" / "by_hand.csv", {"id": ["b"], "amount": [6]}, at=NOW + timedelta(hours=1))
    drop.apply([write(drop.read(["a"])["a"], 7)])
    for file in dropped(tmp_path):
        file.unlink()
    for one in (drop, connect(tmp_path, missing_means=1)):
        assert [r.value for r in one.read(["a", "b"]).values()] == [7, 6]


def test_a_copy_that_a_killed_process_did_not_make_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = connect(tmp_path, missing_means=1)
    with monkeypatch.context() as patch:
        patch.setattr(FileDrop, "_keep", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "power cut")))
        answers = drop.apply([write(drop.read(["a"])["a"], 5)])
    assert outcomes(answers) == ["unknown"]  # it is there, and we cannot promise that it will be
    assert drop.read(["a"])["a"].value == 5
    drop.apply([write(drop.read(["b"])["b"], 5)])
    for file in dropped(tmp_path):
        file.unlink()
    assert drop.read(["a"])["a"].value == 5


@FORMATS
def test_a_baseline_says_what_stands_until_a_newer_file_does(tmp_path: Path, format: str) -> None:
    export = tmp_path / f"export.{format}"
    save(export, {"amount": [100, 200], "id": ["a", "b"], "more": ["x", "y"]}, at=NOW)
    drop = connect(tmp_path, format=format, baseline=export.name)
    seen = drop.read(["a", "b", "c"])
    assert [(r.value, r.state) for r in seen.values()] == [(100, "open"), (200, "open"), (None, "missing")]
    assert outcomes(drop.apply([write(r, 150) for r in seen.values()])) == ["accepted", "accepted", "refused"]
    assert [r.value for r in drop.read(["a", "b"]).values()] == [150, 150]
    # The next export: a was taken in, b was set back by somebody over there
    save(export, {"amount": [150, 190], "id": ["a", "b"]}, at=NOW + timedelta(days=1))
    assert [r.value for r in drop.read(["a", "b"]).values()] == [150, 190]
    changes = drop.history(["a", "b"], NOW + timedelta(hours=12))
    assert [(c.key, c.value, c.actor, c.ours) for c in changes] == [("b", 190, "baseline", False)]


def test_history_tells_a_persons_file_from_ours(tmp_path: Path) -> None:
    drop = connect(tmp_path, missing_means=1)
    drop.apply([write(r, 5) for r in drop.read(["a", "b"]).values()])
    save(tmp_path / "drop" / "x.csv", {"id": ["a", "b"], "amount": [7, 5]}, at=NOW + timedelta(hours=1))
    drop.apply([write(r, 9) for r in drop.read(["a", "b"]).values()])
    told = drop.history(["a"], NOW)
    assert [(c.key, c.value, c.ours) for c in told] == [("a", 5, True), ("a", 7, False), ("a", 9, True)]
    assert [c.at for c in told] == sorted(c.at for c in told) and told[0].at == NOW
    assert [(c.key, c.value) for c in drop.history(["b"], NOW + timedelta(minutes=1))] == [("b", 9)]


def test_a_clock_that_went_back_does_not_make_an_older_file(tmp_path: Path) -> None:
    hours = iter([3, 3, 0, 0, 0])
    drop = connect(tmp_path, clock=lambda: NOW + timedelta(hours=next(hours)), missing_means=1)
    for value in (5, 6, 7):
        drop.apply([write(drop.read(["a"])["a"], value)])
        assert drop.read(["a"])["a"].value == value


def test_a_file_that_cannot_be_read_is_told_and_not_passed_over(tmp_path: Path) -> None:
    drop = connect(tmp_path, missing_means=1)
    for content, error, match in (
        (b"id,amount\na", Unavailable, "still being written"),
        (b"id,amount\n\xff,1\n", Unavailable, "UTF-8"),
        (b"name,amount\na,1\n", Misconfigured, "column 'id'"),
        (b"id,amount\na,1\na,2\n", Misconfigured, "twice"),
        (b"", Misconfigured, "column 'id'"),
    ):
        (tmp_path / "drop" / "x.csv").write_bytes(content)
        with pytest.raises(error, match=match):
            drop.read(["a"])
    (tmp_path / "drop" / "x.csv").unlink()
    (tmp_path / "drop" / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(Unavailable, match="no whole Parquet"):
        connect(tmp_path, format="parquet", missing_means=1).read(["a"])


# -- one state file


@FORMATS
def test_the_state_file_changes_only_where_a_decision_says(tmp_path: Path, format: str) -> None:
    path = tmp_path / "drop" / f"lines.{format}"
    path.parent.mkdir()
    before = {"note": ["x, y", "", 'say "no"'], "id": ["c", "a", "b"], "amount": [300, 100, 200], "n": [1, 2, 3]}
    save(path, before)
    path.chmod(0o640)
    drop = connect(tmp_path, shape="state", format=format)
    seen = drop.read(["a", "b", "nobody"])
    assert [r.value for r in seen.values()] == [100, 200, None] and drop.capabilities.conditional_write
    answers = drop.apply([write(seen["b"], 250), write(seen["a"], 90), write(seen["nobody"], 1)])
    assert outcomes(answers) == ["accepted", "accepted", "refused"]
    after = table(path)
    assert [int(v) for v in after.pop("amount")] == [300, 90, 250]
    assert {k: [str(c) for c in v] for k, v in after.items()} == {
        k: [str(c) for c in v] for k, v in before.items() if k != "amount"
    }
    assert path.stat().st_mode & 0o777 == 0o640
    # The version before is kept, once a batch
    drop.apply([write(drop.read(["a"])["a"], 91)])
    drop.apply([write(drop.read(["a"])["a"], 90, batch_id="batch-2")])
    kept = sorted(p for p in (tmp_path / "drop" / ".kept").iterdir())
    assert [[int(v) for v in table(p)["amount"]] for p in kept] == [[300, 100, 200], [300, 91, 250]]
    assert not list((tmp_path / "drop").glob(".*.new"))


def test_a_parquet_state_keeps_its_types(tmp_path: Path) -> None:
    path = tmp_path / "drop" / "lines.parquet"
    path.parent.mkdir()
    schema = pa.schema(
        [
            ("id", pa.int32()),
            ("amount", pa.decimal128(9, 2)),
            ("at", pa.timestamp("ns", "UTC")),
            ("tags", pa.list_(pa.string())),
        ]
    )
    rows = [{"id": 1, "amount": "10.00", "at": 5, "tags": ["x"]}, {"id": 2, "amount": None, "at": None, "tags": None}]
    from decimal import Decimal

    for row in rows:
        row["amount"] = row["amount"] and Decimal(str(row["amount"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    drop = connect(tmp_path, shape="state", format="parquet", decimals=6)
    seen = drop.read(["1", "2"])
    assert seen["1"].value == 10_000_000 and seen["2"].value is None
    answers = drop.apply([write(seen["1"], 12_340_000), write(seen["2"], 99_999_999_990_000)])
    assert outcomes(answers) == ["accepted", "refused"] and "cannot hold" in answers[1].says
    after = pq.read_table(path)
    assert after.schema.equals(schema) and after["amount"].to_pylist() == [Decimal("12.34"), None]
    assert after["tags"].to_pylist() == [["x"], None]


def test_a_csv_state_keeps_its_line_ends_its_mark_and_its_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "drop" / "lines.csv"
    path.parent.mkdir()
    path.write_bytes("\ufeffid;amount;note\r\nä;1,5;x\r\n".encode())
    drop = connect(tmp_path, shape="state", delimiter=";", decimals=2)
    assert drop.read(["ä"])["ä"].value is None  # a comma is no decimal point here: told, not guessed
    path.write_bytes("\ufeffid;amount;note\r\nä;1.5;x\r\n".encode())
    assert outcomes(drop.apply([write(drop.read(["ä"])["ä"], 170)])) == ["accepted"]
    assert path.read_bytes() == "\ufeffid;amount;note\r\nä;1.7;x\r\n".encode()


def test_a_row_that_somebody_changed_is_a_conflict_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "drop" / "lines.csv"
    path.parent.mkdir()
    save(path, {"id": ["a", "b"], "amount": [1, 1]})
    drop = connect(tmp_path, shape="state")
    seen = drop.read(["a", "b"])
    save(path, {"id": ["a", "b", "c"], "amount": [7, 1, 1]})
    assert outcomes(drop.apply([write(r, 5) for r in seen.values()])) == ["conflict", "accepted"]
    assert table(path) == {"id": ["a", "b", "c"], "amount": ["7", "5", "1"]}


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_file_put_in_place_during_the_write_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """A person saves after our compare and before our exchange, and again while theirs is being put back."""
    path = tmp_path / "drop" / "lines.csv"
    path.parent.mkdir()
    save(path, {"id": ["a", "b"], "amount": [1, 1]})
    drop = connect(tmp_path, shape="state")
    seen = drop.read(["a", "b"])
    exchange, saved = atomic_files.exchange, []

    def raced(one: Path, other: Path) -> None:
        if len(saved) < times:
            saved.append(1)
            save(path, {"id": ["a", "b"], "amount": [1, 70 + len(saved)]})
        exchange(one, other)

    monkeypatch.setattr(atomic_files, "exchange", raced)
    answers = drop.apply([write(seen["a"], 5)])
    assert outcomes(answers) == ["conflict"] and "theirs stands" in answers[0].says
    assert table(path) == {"id": ["a", "b"], "amount": ["1", str(70 + times)]}
    assert not list(path.parent.glob(".*.new"))
    assert outcomes(drop.apply([write(seen["a"], 5)])) == ["accepted"]
    assert table(path) == {"id": ["a", "b"], "amount": ["5", str(70 + times)]}


def test_where_files_cannot_be_exchanged_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Path) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(atomic_files, "exchange", cannot)
    path = tmp_path / "drop" / "lines.csv"
    path.parent.mkdir()
    save(path, {"id": ["a"], "amount": [1]})
    drop = connect(tmp_path, shape="state")
    assert not drop.capabilities.conditional_write and "not seen by the system" in drop.capabilities.guarantee
    assert outcomes(drop.apply([write(drop.read(["a"])["a"], 5)])) == ["accepted"]
    assert table(path)["amount"] == ["5"]


def test_a_state_file_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="missing_means"):
        connect(tmp_path, shape="state")
    for format in ("csv", "parquet"):
        drop = connect(tmp_path, shape="state", format=format, missing_means=3)
        assert outcomes(drop.apply([write(r, 4) for r in drop.read(["a", "b"]).values()])) == ["accepted"] * 2
        assert [str(v) for v in table(tmp_path / "drop" / f"lines.{format}")["amount"]] == ["4", "4"]
        assert outcomes(drop.apply([write(drop.read(["c"])["c"], 5)])) == ["accepted"]
        assert [r.value for r in drop.read(["a", "b", "c", "d"]).values()] == [4, 4, 5, 3]


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "drop" / "lines.csv"
    path.parent.mkdir()
    keys = [f"e{n}" for n in range(40)]
    save(path, {"id": keys, "amount": [1] * 40})
    drops = [connect(tmp_path, shape="state") for _ in range(4)]

    def push(n: int) -> list[str]:
        return [drops[n % 4].apply([write(r, 100 + n)])[0].outcome for r in drops[n % 4].read(keys[n::8]).values()]

    with ThreadPoolExecutor(8) as pool:
        told = [o for one in pool.map(push, range(8)) for o in one]
    assert told == ["accepted"] * 40
    assert table(path)["amount"] == [str(100 + n % 8) for n in range(40)]


# -- both


@pytest.mark.parametrize("shape", ["batches", "state"])
def test_an_entity_twice_a_bad_name_and_a_value_without_a_name_are_refused_alone(tmp_path: Path, shape: str) -> None:
    drop = connect(tmp_path, shape=shape, names={1: "low", 5: "high"}, missing_means=1)
    seen = drop.read(["a", "b", "\0", "\ud800"])
    writes = [
        write(seen["a"], 5),
        write(seen["a"], 5),
        write(seen["b"], 4),
        write(seen["\0"], 5),
        write(seen["\ud800"], 5),
    ]
    assert outcomes(drop.apply(writes)) == ["accepted", *["refused"] * 4]
    assert drop.read(["a", "b"])["a"].value == 5


@pytest.mark.parametrize("shape", ["batches", "state"])
def test_a_lock_held_by_another_program_is_waited_for_and_not_for_ever(tmp_path: Path, shape: str) -> None:
    drop = connect(tmp_path, shape=shape, missing_means=1, lock_timeout_s=0.1)
    seen = drop.read(["a"])["a"]
    with drop._lock_file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        answer = drop.apply([write(seen, 5)])[0]
        assert answer.outcome == "not_applied" and "locked" in answer.says
        threading.Timer(0.03, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        assert drop.apply([write(seen, 5)])[0].outcome == "accepted"


@pytest.mark.parametrize("shape", ["batches", "state"])
def test_a_full_disk_before_the_file_appears_is_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    drop = connect(tmp_path, shape=shape, missing_means=1)
    seen = drop.read(["a"])["a"]
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        answer = drop.apply([write(seen, 5)])[0]
    assert answer.outcome == "not_applied" and "No space" in answer.says
    assert drop.read(["a"])["a"].value == 1
    assert [p.name for p in (tmp_path / "drop").iterdir() if not p.name.endswith(".lock")] == []
    assert drop.apply([write(seen, 5)])[0].outcome == "accepted"


def test_a_folder_that_is_not_there_or_not_ours_is_told(tmp_path: Path) -> None:
    said = {"kind": "file_drop", "path": "gone", "shape": "batches", "format": "csv", "key": "id", "value": "amount"}
    with pytest.raises(Misconfigured, match="no folder"):
        file_drop.connect(FileDropSettings.model_validate(said), environ={}, folder=tmp_path, clock=lambda: NOW)
    with pytest.raises(ValueError, match="same name"):
        FileDropSettings.model_validate(said | {"key": "batch_id"})
    with pytest.raises(ValueError, match="baseline"):
        FileDropSettings.model_validate(said | {"shape": "state", "baseline": "x"})
    drop = connect(tmp_path, missing_means=1)
    with pytest.raises(Misconfigured, match="cannot check"):
        drop.apply([], validate_only=True)
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "drop").chmod(0o500)
    with pytest.raises(Misconfigured, match="must be able to write"):
        drop.apply([write(drop.read(["a"])["a"], 5)])


@pytest.mark.parametrize("shape", ["batches", "state"])
def test_a_file_appears_after_it_is_on_the_disk_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """What a power cut or a reader between any two steps would find."""
    drop = connect(tmp_path, shape=shape, missing_means=1)
    if shape == "state":
        drop.apply([write(drop.read(["b"])["b"], 5)])
    steps: list[str] = []
    before = [(p.name, p.read_bytes()) for p in dropped(tmp_path)]

    def step(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(first: Any, *more: Any) -> None:
            folder = isinstance(first, int) and os.path.isdir(f"/proc/self/fd/{first}")
            if ".kept" not in (os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(more[0])):
                unseen = [(p.name, p.read_bytes()) for p in dropped(tmp_path)] == before
                steps.append(f"{name} {'folder' if folder else 'file'}{' unseen' if unseen else ''}")
            real(first, *more)

        return call

    monkeypatch.setattr(os, "fsync", step("fsync", os.fsync))
    monkeypatch.setattr(os, "rename", step("place", os.rename))
    monkeypatch.setattr(atomic_files, "exchange", step("place", atomic_files.exchange))
    assert outcomes(drop.apply([write(drop.read(["a"])["a"], 5)])) == ["accepted"]
    assert steps == ["fsync file unseen", "place file unseen", "fsync folder"]


KILLED = """
import sys
from datetime import datetime
from pathlib import Path
from delivery.connectors import file_drop
from delivery.connectors.base import Write
folder, said = Path(sys.argv[1]), file_drop.FileDropSettings.model_validate_json(sys.argv[2])
drop = file_drop.connect(said, environ={}, folder=folder, clock=datetime.now)
keys = [f"e{n}" for n in range(50)]
for value in range(1, 10**9):
    seen = drop.read(keys)
    drop.apply([Write(k, k, r.value + 1, r.value, None, "key", "d", f"b{value}", "run") for k, r in seen.items()])
    if value == 1:
        print("go", flush=True)
"""


@pytest.mark.parametrize(("shape", "format"), [("batches", "parquet"), ("state", "csv")])
def test_a_killed_process_leaves_whole_files(tmp_path: Path, shape: str, format: str) -> None:
    drop = connect(tmp_path, shape=shape, format=format, missing_means=0)
    last = 0
    for n in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), drop._settings.model_dump_json()],
            stdout=subprocess.PIPE, cwd=Path(__file__).parents[3],
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == b"go\n"
        time.sleep(0.03 + 0.037 * n)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        values = {r.value for r in drop.read([f"e{n}" for n in range(50)]).values()}
        assert len(values) == 1, "half a call is visible"
        (value,) = values
        assert value is not None and value >= last
        last = value
    assert last > 0
    drop.apply([write(drop.read(["e0"])["e0"], 10**6)])
    assert not list((tmp_path / "drop").glob(".*.new"))


@settings(max_examples=examples(40))
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=8), st.integers(-(2**63) + 1, 2**63 - 1)), min_size=1, max_size=6),
    st.integers(0, 9),
    st.sampled_from(["csv", "parquet"]),
    st.sampled_from(["batches", "state"]),
)
def test_whatever_is_dropped_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], decimals: int, format: str, shape: str
) -> None:
    folder = tmp_path_factory.mktemp("h")
    drop = connect(folder, format=format, shape=shape, decimals=decimals, missing_means=0)
    wanted = {key: value for key, value in rows if value}
    answers = drop.apply([write(r, wanted[k]) for k, r in drop.read(list(wanted)).items()])
    ok = {w.key for w in answers if w.outcome == "accepted"}
    assert ok == {key for key in wanted if "\0" not in key}
    read = connect(folder, format=format, shape=shape, decimals=decimals, missing_means=0).read(list(wanted))
    assert {key: read[key].value for key in ok} == {key: wanted[key] for key in ok}


# -- with the ledger and the push


@pytest.mark.parametrize("shape", ["batches", "state"])
def test_a_push_drops_one_file_and_leaves_what_people_changed(tmp_path: Path, shape: str) -> None:
    names = ["plain", "persons", "there", "bad"]
    (tmp_path / "drop").mkdir()
    file = tmp_path / ("drop/lines.csv" if shape == "state" else "export.csv")
    save(file, {"id": names, "amount": ["low", "high", "mid", "low"]}, at=NOW)
    more = {"baseline": "export.csv"} if shape == "batches" else {}
    drop = connect(tmp_path, clock=utc_now, shape=shape, names={100: "low", 120: "mid", 150: "high"}, **more)
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY) as ledger:
        ledger.record_batch(new_batch(pools=None), some_decisions("b1", names, after=[120, 120, 120, 110]))
        report = push(ledger, drop, "b1", settings=PushSettings(backoff_s=(0.01, 0.1), late_s=0.1))
        assert report.complete
        ends = {str(d.entity): (d.state, d.prior) for d in ledger.deliveries("b1")}
    assert ends["plain"] == ("ACKED", 100) and ends["there"][0] == "ACKED"
    assert ends["persons"][0] == "CONFLICT" and ends["bad"][0] == "REJECTED"
    if shape == "state":
        assert table(file)["amount"] == ["mid", "high", "mid", "low"]
    else:
        (made,) = dropped(tmp_path)
        assert table(made)["id"] == ["plain"] and table(made)["amount"] == ["mid"] and table(made)["before"] == ["low"]


@pytest.mark.parametrize(("later", "end"), [(False, "OVERWRITTEN"), (True, "CONFLICT")])
def test_a_persons_file_that_lands_while_ours_is_made_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool, end: str
) -> None:
    """A folder cannot refuse: if theirs is older than ours by a moment, theirs is lost and listed; else theirs stands."""
    drop = connect(tmp_path, clock=utc_now, missing_means=100)
    temporary, landed = FileDrop._temporary, []

    def raced(self: FileDrop, content: bytes, folder: Path) -> Path:
        if not landed:
            landed.append(1)
            now = utc_now() + timedelta(seconds=5 if later else -0.5)
            save(tmp_path / "drop" / "by_hand.csv", {"id": ["a"], "amount": [77]}, at=now)
        return temporary(self, content, folder)

    monkeypatch.setattr(FileDrop, "_temporary", raced)
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY) as ledger:
        ledger.record_batch(new_batch(pools=None), some_decisions("b1", ["a", "b"]))
        report = push(ledger, drop, "b1", settings=PushSettings(late_s=0.1))
        assert report.complete
        ends = {str(d.entity): d.state for d in ledger.deliveries("b1")}
        assert ends == {"a": end, "b": "ACKED"}
        assert [c.found for c in ledger.conflicts("b1")] == [77]
    assert drop.read(["a"])["a"].value == (77 if later else 120)


def test_a_lone_carriage_return_in_a_name_is_read_back(tmp_path: Path) -> None:
    for shape in ("batches", "state"):
        (tmp_path / shape / "drop").mkdir(parents=True)
        drop = connect(tmp_path / shape, format="csv", shape=shape, missing_means=0)
        assert [w.outcome for w in drop.apply([write(drop.read(["a\rb"])["a\rb"], 7)])] == ["accepted"]
        assert connect(tmp_path / shape, format="csv", shape=shape, missing_means=0).read(["a\rb"])["a\rb"].value == 7
