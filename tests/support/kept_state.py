"""The recipe of the kept state: a state folder as ``main`` wrote it before the modules moved, and how to open it again.

Belongs here: making the folder through the product's own jobs, taking out what names the machine, packing and unpacking.
Does not: what must still hold of it (``tests/system/test_kept_state.py``).

``python -m tests.support.kept_state`` makes the archive anew, in about two minutes, with the port of the local help desk free.
That gives the test up: what is read by the code that wrote it proves nothing. Do it only where a release changes what is
stored on purpose, and keep the old archive as well, as long as old state folders are to be read.

The worlds are seeded and every time is given. What differs from one making to the next is what the libraries draw themselves:
run ids, names of Delta's files, MLflow's and Delta's own times, the salt of an approver's secret.
MLflow stores absolute addresses: they are packed as ``PLACE``, and ``unpack`` makes them name the folder that it fills.
"""

from __future__ import annotations

import getpass
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import socket
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.resources import resources
from delivery import approvals, rollback
from delivery.ledger import Ledger
from delivery.sandbox import systems
from delivery.sandbox.worlds import advertising
from models.registry import Registry
from orchestration import runner
from pipeline import dispatch
from pipeline.lake import Lake
from pipeline.workflow import FOLDER, Workflow, load
from tests.support import ledger_content
from tests.support.moving import readdressed

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHIVE = ROOT / "tests" / "data" / "kept_state.tar.xz"
PLACE, CHECKOUT = "/signalbox-kept-state", "/signalbox-checkout"
"""Stand for the state folder, and for the checkout, in what is stored with an absolute address."""
GONE = "/signalbox-gone"
"""Stands for folders that had been removed by the time the state was whole."""
EXPECTED = "expected.json"
"""Beside the state: what was read from it on the day it was made."""
KEY, APPROVER, SECRET = "a key for tests only", "robin", "nobody else's secret"
KEPT = ("lake", "landing", "ledger.db", "mlflow.db", "mlflow-artifacts")
"""Of a state folder; pages for people, Dagster's history and the local systems are no part of what is read back."""
SEED, HISTORY, LIVE = 7, 10, 2
WORKFLOWS = ("ad_budget", "ticket_priority")
START = load(FOLDER / "ad_budget").start
DAYS = [START + timedelta(days=HISTORY + n) for n in range(LIVE)]
"""The days that were decided and sent."""
_ROUNDS = {"ad_budget": 60, "ticket_priority": 8}
_NAMES_A_MACHINE = re.compile(rb"(?<![\w.~-])/(?:tmp|work|root|home|Users|private|mnt|srv)/")


def small(name: str, **changed: Any) -> Workflow:
    """A shipped workflow on terms that a small world and ten days can meet. ``changed``: of its guardrails."""
    said = load(FOLDER / name)
    training = {"min_rows": 50, "holdout_days": 3, "maturity_days": min(4, said.training.maturity_days), "margin": 10.0}
    update: dict[str, Any] = {
        "model": said.model.model_copy(update={"rounds": _ROUNDS[name]}),
        "training": said.training.model_copy(update=training),
        "guardrails": said.guardrails.model_copy(update={"max_total_change": None, **changed}),
    }
    if name == "ticket_priority":
        update["policy"] = said.policy.model_copy(update={"review": "uncertainty"})
    return said.model_copy(update=update)


def at(day: date, hour: int) -> str:
    """An hour after the end of ``day``; it is decided on the morning after it."""
    return (datetime.combine(day, datetime.min.time()) + timedelta(days=1, hours=hour)).isoformat()


@contextmanager
def opened(now: str) -> Iterator[Ledger]:
    """The ledger of the state folder in the environment, at a moment."""
    book: Ledger = resources()["ledger"].open(lambda: datetime.fromisoformat(now))
    try:
        yield book
    finally:
        book.close()


@contextmanager
def environment(home: Path, also: Mapping[str, str] | None = None) -> Iterator[None]:
    """The variables under which the product works on a folder, and which name nobody."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("SIGNALBOX_", "DAGSTER_"))]:
            patch.delenv(name)
        said = {"SIGNALBOX_HOME": str(home), "SIGNALBOX_LEDGER_KEY": KEY, "LOGNAME": "signalbox", "USER": "signalbox"}
        for name, value in {**said, **(also or {})}.items():
            patch.setenv(name, value)
        yield


def lake(home: Path) -> Lake:
    """The lake of a state folder."""
    return Lake(str(home / "lake"))


def registry(home: Path) -> Registry:
    """The registry of a state folder."""
    return Registry(f"sqlite:///{home / 'mlflow.db'}", (home / "mlflow-artifacts").as_uri())


# --- making it


def make(home: Path) -> None:
    """Live ``DAYS`` of both workflows in an empty folder, with a history before them.

    The first batch of ``ad_budget`` is held and approved, its second is taken back after somebody changed one of its
    values; a second version of the tickets' model is in shadow on the second day, on which somebody sets one priority as the
    batch would, before it is sent; one row of a ticket file is bad; a workflow is stopped and goes on.
    """
    last = DAYS[0] - timedelta(days=1)
    setup, moment = systems.Setup(SEED, START, HISTORY, lines=18, teams=2, load=0.6), [at(last, 6)]
    queue = systems.history(setup, home / "landing")
    _spoil(home / "landing" / "ticket_priority" / "export" / f"tickets-{last}.jsonl.gz")
    clock = lambda: datetime.fromisoformat(moment[0])  # noqa: E731
    with (
        systems.Systems(home / "sandbox", setup, ports=(0, systems.PORTS[1]), tickets_world=queue, clock=clock) as both,
        environment(home, both.environment),
        dg.DagsterInstance.ephemeral() as instance,
    ):
        runner.prepare_home()

        def run(workflow: Workflow, job: str, first: date, until: date, hour: int) -> None:
            moment[0] = at(until, hour)
            done = runner.run(workflow, job, first, until, now=moment[0], instance=instance)
            assert done.success, f"{workflow.name} {job} {until}: {runner.failed_steps(done)}"

        def people(name: str, day: date, hour: int) -> None:
            """Of the first value that the day's batch changes: somebody changes a budget once more, or a priority first."""
            moment[0] = at(day, hour)
            with opened(moment[0]) as book:
                row = book.deliveries(dispatch.batch_of(book, name, day).batch_id)[0]
            assert row.entity is not None and row.after is not None
            if name == "ad_budget":
                both.ads.by_hand(row.entity, row.after + 1_000_000, "pat@example.org")
            else:
                both.desk.person(row.entity, priority=row.after)

        with opened(at(last, 5)) as book:
            approvals.enrol(book, APPROVER, SECRET)
            book.switch("ad_budget", True, APPROVER, "before the first day")
            book.switch("ad_budget", False, APPROVER, "the first day has come")
        for name in WORKFLOWS:
            run(small(name), "prepare", START, last, 4)
            run(small(name), "retrain", last, last, 5)
        for number, day in enumerate(DAYS):
            for name in WORKFLOWS:
                landing = home / "landing" / name
                if name == "ad_budget":
                    with opened(at(day, 1)) as book:
                        drawn = dispatch.randomised(book, name, day - timedelta(days=1))
                    both.ads.advance(None, multipliers=drawn)
                    advertising.export_day(both.ads.rows(day), landing / "export", day)
                else:
                    both.desk.advance(landing)
                held = {"max_changed": 1} if (number, name) == (0, "ad_budget") else {}
                run(small(name, **held), "daily", day, day, 4)
                with opened(at(day, 5)) as book:
                    batch = dispatch.batch_of(book, name, day)
                    if batch.status == "HELD":
                        approvals.approve(book, batch.batch_id, APPROVER, SECRET, "as planned")
                if (number, name) == (1, "ticket_priority"):
                    people(name, day, 4)
                run(small(name), "deliver", day, day, 5)
                if (number, name) == (0, "ticket_priority"):
                    run(_larger(small(name)), "retrain", day, day, 6)
        people("ad_budget", DAYS[-1], 6)
        moment[0] = at(DAYS[-1], 7)
        with opened(moment[0]) as book:
            done = dispatch.roll_back(
                book, runner.registry(), rollback.Batch(dispatch.batch_of(book, "ad_budget", DAYS[-1]).batch_id),
                actor=APPROVER, reason="the day was a test", trigger="person", run_id="kept", clock=clock,
                sleep=lambda seconds: None,
            )  # fmt: skip
        assert done.complete, done


def _larger(workflow: Workflow) -> Workflow:
    """Trained so, a version is another one than the champion."""
    return workflow.model_copy(update={"model": workflow.model.model_copy(update={"rounds": 12})})


def _spoil(file: Path) -> None:
    """One more row, with a time that is none."""
    rows = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    bad = json.dumps(json.loads(rows[0]) | {"ticket_id": "T9999999", "updated_at": "yesterday"}) + "\n"
    file.write_bytes(gzip.compress(b"".join(rows) + bad.encode(), mtime=0))


# --- what is in it


def fingerprint(rows: pa.Table) -> str:
    """A table's content, whatever the order of its rows and columns."""
    names = sorted(rows.column_names)
    return hashlib.sha256(
        "\n".join([repr(names), *sorted(map(repr, rows.select(names).to_pylist()))]).encode()
    ).hexdigest()


def tables(home: Path) -> list[str]:
    """The lake's tables as ``workflow/table``."""
    return sorted(log.parent.relative_to(home / "lake").as_posix() for log in (home / "lake").glob("*/*/_delta_log"))


def examined(home: Path) -> dict[str, Any]:
    """What is read from a state folder: the ledger's head and content, every table of the lake, who is champion."""
    here = lake(home)
    with environment(home), opened(at(DAYS[-1], 8)) as book:
        verdict = book.verify()
        kinds = sorted({event.kind for event in book.events()})
    read = {}
    for table in tables(home):
        rows = here.read(table)
        read[table] = {
            "version": here.version(table), "rows": rows.num_rows, "columns": sorted(rows.column_names),
            "content": fingerprint(rows),
        }  # fmt: skip
    champions = {name: registry(home).by_alias(name, "champion") for name in WORKFLOWS}
    return {
        "head": verdict.head.hash, "events": verdict.events, "kinds": kinds, "content": ledger_content.digests(home),
        "lake": read, "champions": {name: one and [one.number, one.digest] for name, one in champions.items()},
    }  # fmt: skip


def texts(file: Path) -> bytes:
    """What a file says, whatever it is packed in."""
    if file.suffix == ".gz":
        return gzip.decompress(file.read_bytes())
    if file.suffix == ".parquet":
        found = pq.ParquetFile(file)
        return repr((found.read().to_pylist(), found.metadata.metadata)).encode()
    if file.suffix == ".db":
        with closing(sqlite3.connect(file)) as database:
            return "\n".join(database.iterdump()).encode()
    return file.read_bytes()


def machine_in(home: Path, *names: str) -> list[str]:
    """Files of a folder that hold a path as machines have them, or one of these names; empty where none does."""
    wanted = [name.encode() for name in names]
    return [
        f"{file.relative_to(home)}: {found!r}"
        for file in sorted(home.rglob("*"))
        if file.is_file()
        for said in [texts(file)]
        for found in [_NAMES_A_MACHINE.search(said), *(name for name in wanted if name in said)]
        if found
    ]


# --- packing


def pack(home: Path, archive: Path) -> None:
    """Keep a folder that ``make`` filled: neutral, the same bytes for the same files. Refuses what still names the machine."""
    with tempfile.TemporaryDirectory() as place:
        kept = Path(place, "kept")
        kept.mkdir()
        for name in KEPT:
            copy = shutil.copytree if (home / name).is_dir() else shutil.copyfile
            copy(home / name, kept / name)
        for folder in [*kept.glob("mlflow-artifacts/**/plots"), *kept.glob("mlflow-artifacts/**/artifacts/code")]:
            shutil.rmtree(
                folder
            )  # pictures, and the code by which others score: half of all, and not read by the product
        with closing(sqlite3.connect(kept / "ledger.db")) as ledger:
            ledger.execute("UPDATE leases SET host = 'another-host', pid = 1, started = 'long ago'")
            ledger.commit()
        _move(kept, {str(home): PLACE, str(ROOT): CHECKOUT})
        for file in kept.glob("mlflow-artifacts/**/MLmodel"):
            # where MLflow copied a version's files from: a folder that was gone a moment later
            file.write_text(re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", GONE, file.read_text()))
        for name in ("ledger.db", "mlflow.db"):
            with closing(sqlite3.connect(kept / name)) as database:
                database.execute("PRAGMA journal_mode = DELETE")
                database.execute("VACUUM")  # pages that are free hold what was changed
        me = [name for name in {socket.gethostname(), getpass.getuser(), Path.home().name} if len(name) > 4]
        named = machine_in(kept, str(home), str(ROOT), str(Path.home()), tempfile.gettempdir() + "/", *me)
        assert not named, "\n".join(named)
        written = io.BytesIO()
        with tarfile.open(fileobj=written, mode="w:xz", preset=9 | lzma.PRESET_EXTREME) as packed:
            for file in sorted(one for one in kept.rglob("*") if one.is_file()):
                entry = tarfile.TarInfo(file.relative_to(kept).as_posix())
                entry.size, entry.mtime = (
                    file.stat().st_size,
                    int(datetime.fromisoformat(at(DAYS[-1], 7) + "+00:00").timestamp()),
                )
                packed.addfile(entry, io.BytesIO(file.read_bytes()))
            told = json.dumps(examined(home), indent=1, sort_keys=True).encode()
            entry = tarfile.TarInfo(EXPECTED)
            entry.size = len(told)
            packed.addfile(entry, io.BytesIO(told))
        archive.parent.mkdir(parents=True, exist_ok=True)
        archive.write_bytes(written.getvalue())


def unpack(home: Path, archive: Path = ARCHIVE, *, move: bool = True) -> dict[str, Any]:
    """Fill a folder from the archive; returns what was read from it when it was made. ``move`` False: as it was packed."""
    with tarfile.open(archive) as packed:
        packed.extractall(home, filter="data")
    expected: dict[str, Any] = json.loads((home / EXPECTED).read_text())
    if move:
        _move(home, {PLACE: str(home), CHECKOUT: str(ROOT)})
    return expected


def _move(home: Path, places: Mapping[str, str]) -> None:
    """Make everything that stores an absolute address store another one."""
    for old, new in places.items():
        readdressed(home / "mlflow.db", old, new)
        for file in home.glob("mlflow-artifacts/**/MLmodel"):
            file.write_text(file.read_text().replace(old, new))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "home")
        make(made)
        pack(made, ARCHIVE)
    print(f"{ARCHIVE.relative_to(ROOT)}: {ARCHIVE.stat().st_size / 1000:.0f} kB")
