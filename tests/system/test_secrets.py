"""No secret in a log, an error, a ledger row, a report or an event: a full run with marked secrets, and a search for them.

What may hold one: the ledger's key file, and the help desk's own database (its tokens). Nothing else below the state folder.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

import dagster as dg
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy
from typer.testing import CliRunner

from assets.resources import resources
from common.clock import utc_now
from orchestration import runner
from orchestration.cli import command
from pipeline import dispatch
from pipeline import workflow as workflows
from pipeline.workflow import FOLDER, load
from tests.conftest import WorkflowHarness
from tests.support.aliases import promote
from tests.support.offices import Account, MorningHarness, Queue, checks
from tests.support.postgres import Server

pytestmark = pytest.mark.system
MARKS = {
    "ads token": "mk1ads+tok/7Qw3zX9pLk==",
    "wrong ads token": "mk2ads+bad/4Rt6yU8iOp==",
    "help desk token": "mk3desk-5hT8vB2nM4qW",
    "wrong help desk token": "mk4desk-9jK1lZ7xC3eD",
    "approver's secret": "mk5 only mine: Grüße & 42%",
    "secret typed by mistake": "mk6 another one of mine = 77",
    "ledger key": "mk7key-c0ffee-2b7e1516-28aed2a6",
    "ledger password": "mk8pg:p@ss/w?rd#1",
    "MLflow password": "mk9ml:p@ss/w?rd#2",
}
MAY_HOLD = ("ledger.key", "sandbox/helpdesk/helpdesk.sqlite3", "sandbox/helpdesk/helpdesk.sqlite3-wal")
"""Below the state folder: the key's own file, and the database in which the sandboxed help desk keeps its tokens."""


# --- the search -------------------------------------------------------------------------------------------------------


def shapes(mark: str) -> dict[str, bytes]:
    """How a mark may look: as it is or cut off, in a URL, in JSON, in hexadecimal, in base64 at any place."""
    raw = mark.encode()
    found = {
        "plain": raw,
        "cut off": raw[:10],
        "in a URL": quote(mark, safe="").encode(),
        "in a query": quote_plus(mark).encode(),
        "in JSON": json.dumps(mark)[1:-1].encode(),
        "in hexadecimal": raw.hex().encode(),
        "in HEXADECIMAL": raw.hex().upper().encode(),
    }
    for shift, first in enumerate((0, 2, 3)):
        whole = 8 * (shift + len(raw)) // 6  # characters that depend on nothing after the mark
        for name, coded in (("base64", base64.b64encode), ("base64 for URLs", base64.urlsafe_b64encode)):
            found[f"{name}, {shift}"] = coded(b"\0" * shift + raw)[first:whole]
    return found


SHAPES = {(what, how): shape for what, mark in MARKS.items() for how, shape in shapes(mark).items()}


def marks_in(where: str, content: bytes) -> list[str]:
    """Each mark in some bytes, in whatever shape, with where it was found."""
    return [f"{where}: {what} ({how})" for (what, how), shape in SHAPES.items() if shape in content]


def unpacked(path: Path) -> Iterator[bytes]:
    """What a file says beyond its own bytes: where rows are split over pages, or compressed."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"SQLite format 3"):
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            database.text_factory = lambda raw: raw.decode("utf-8", "replace")
            yield "\n".join(database.iterdump()).encode()
        database.close()
    elif start.startswith(b"\x1f\x8b"):
        yield gzip.decompress(path.read_bytes())
    elif start.startswith(b"PAR1"):
        yield str(pq.ParquetFile(path).read().to_pylist()).encode()


def marks_below(folder: Path, may_hold: tuple[str, ...] = ()) -> list[str]:
    """Each mark in any file below a folder; the files that may hold one are left out."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    files = [p for p in files if p.relative_to(folder).as_posix() not in may_hold]
    found = []
    for path in files:  # all of them before a database is opened, which may take its write-ahead log in
        found += marks_in(str(path.relative_to(folder)), path.read_bytes()) + marks_in("its name", str(path).encode())
    for path in files:
        for content in unpacked(path):
            found += marks_in(f"{path.relative_to(folder)}, unpacked", content)
    return found


def marks_in_database(url: str) -> list[str]:
    """Each mark in any cell of any table of a PostgreSQL database."""
    engine = sqlalchemy.create_engine(url)
    found = []
    with engine.connect() as connection:
        for table in sqlalchemy.inspect(connection).get_table_names():
            rows = connection.execute(sqlalchemy.text(f'SELECT * FROM "{table}"')).all()
            cells = [bytes(c) if isinstance(c, memoryview | bytes) else str(c).encode() for row in rows for c in row]
            found += marks_in(f"table {table}", b"\n".join(cells))
    engine.dispose()
    return found


@pytest.mark.parametrize("what", list(MARKS))
def test_the_search_finds_a_planted_mark_in_every_shape_and_kind_of_file(tmp_path: Path, what: str) -> None:
    mark = MARKS[what]
    assert marks_below(tmp_path) == []
    planted = {how: shape for how, shape in shapes(mark).items() if how != "cut off"}
    planted |= {f"a password, {n}": base64.b64encode(b"u" * n + b":" + mark.encode() + b"!") for n in (1, 2, 3)}
    for how, shape in planted.items():
        (tmp_path / "log.txt").write_bytes(b"error: " + shape + b"; run it again")
        assert any(what in hit for hit in marks_below(tmp_path)), how
    (tmp_path / "log.txt").unlink()
    assert marks_in("", b"only its beginning: " + mark.encode()[:12])
    (tmp_path / "export.csv.gz").write_bytes(gzip.compress(f"a,b\n1,{mark}\n".encode()))
    pq.write_table(pa.table({"reasons": [[f"it said {mark}"]] * 3}), tmp_path / "rows.parquet", compression="zstd")
    with sqlite3.connect(tmp_path / "events.db") as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE events (body TEXT)")
        database.execute("INSERT INTO events VALUES (?)", ["x" * 4050 + mark + "y" * 50])  # over the edge of a page
        database.commit()
        found = marks_below(tmp_path)
    database.close()
    for name in ("export.csv.gz", "rows.parquet", "events.db"):
        assert any(hit.startswith(name) and what in hit for hit in found), (name, found)
    assert marks_below(tmp_path, ("export.csv.gz", "rows.parquet", "events.db", "events.db-wal", "events.db-shm")) == []


def test_the_search_finds_a_planted_mark_in_postgres(postgres: Server) -> None:
    url = postgres.database("planted")
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE events (body JSON, raw BYTEA)"))
        rows = {"body": json.dumps({"says": MARKS["approver's secret"]}), "raw": MARKS["ledger key"].encode()}
        connection.execute(sqlalchemy.text("INSERT INTO events VALUES (:body, :raw)"), rows)
    engine.dispose()
    found = " ".join(marks_in_database(url))
    assert "approver's secret" in found and "ledger key" in found and "password" not in found


NAMED = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED"}


# --- a gate before a system, which tells what it was told -------------------------------------------------------------


@dataclass
class Gate:
    """Passes requests on to a system, or answers by itself with everything that it was sent in the answer."""

    target: str
    status: int = 0
    """0: pass on. Else what to answer with."""
    writes_only: bool = False
    told: int = 0
    """How many answers held a token."""
    port: int = 0
    _server: ThreadingHTTPServer | None = field(default=None, repr=False)

    def up(self) -> Gate:
        gate, target = self, urlsplit(self.target)
        base = f"{target.scheme}://{target.netloc}"

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                write = self.command == "PATCH" or self.path.endswith(":mutate") or ":mutate?" in self.path
                if gate.status and (write or not gate.writes_only):
                    gate.told += 1
                    said = self.headers.get("authorization", "")
                    words = f"upstream said no to authorization: {said}, and once more {said.split()[-1]}"
                    error = {"code": gate.status, "message": words, "status": NAMED.get(gate.status, "INTERNAL")}
                    answer = json.dumps({"error": error, "detail": words}).encode()
                    self._answer(
                        gate.status,
                        answer,
                        {"WWW-Authenticate": said, "Location": f"https://elsewhere.example.org/?{said}"},
                    )
                    return
                kept = {
                    k: v
                    for k, v in self.headers.items()
                    if k.lower() not in ("host", "content-length", "accept-encoding")
                }
                found = httpx.request(self.command, base + self.path, content=body, headers=kept, timeout=60)
                self._answer(found.status_code, found.content, {"Content-Type": found.headers.get("content-type", "")})

            def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    **headers,
                    "Content-Length": str(len(content)),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = _do

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def down(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{urlsplit(self.target).path}"


# --- the run ----------------------------------------------------------------------------------------------------------


def role(url: str, name: str, password: str) -> str:
    """The database's URL for a user with this password in it."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD '{password}'")
    engine.dispose()
    place = url.split("@", 1)[1]
    return f"postgresql+psycopg2://{name}:{quote(password, safe='')}@{place}"


@dataclass
class Firm:
    """Everything of the run; ``said`` is what was printed, raised and logged."""

    home: Path
    ads: MorningHarness
    desk: MorningHarness
    gates: dict[str, Gate]
    patch: pytest.MonkeyPatch
    said: io.StringIO

    def command(self, *words: str, typed: str = "", fails: bool = False) -> str:
        """A command in this process; everything that it shows, a traceback too, is kept."""
        result = CliRunner().invoke(command.app, list(words), input=typed)
        text = result.output
        if result.exception is not None:
            text += "".join(traceback.format_exception(result.exception)) + repr(result.exception)
        self.said.write(text)
        assert (result.exit_code != 0) is fails, text
        return text

    def process(self, *words: str, typed: str = "", fails: bool = False) -> str:
        """A command in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestration.cli.command", *words], input=typed, capture_output=True, text=True,
            cwd=Path(command.__file__).parents[2], env=dict(os.environ), timeout=120, check=False,
        )  # fmt: skip
        text = done.stdout + done.stderr
        self.said.write(text)
        assert (done.returncode != 0) is fails, text
        return text

    def job(self, morning: MorningHarness, job: str, days_ago: int = 0, **how: Any) -> dg.ExecuteInProcessResult:
        """A run at DAGSTER_HOME, on the morning after its day."""
        day = morning.day - timedelta(days=days_ago)
        now = morning.bench.morning(day, 5)
        if isinstance(morning.system, Account):
            morning.system.now = now
        result = runner.run(
            how.pop("workflow", morning.workflow), job, how.pop("first", day), day, now=now.isoformat(), **how
        )
        self.said.write("\n".join(runner.failed_steps(result)) + json.dumps(runner.check_rows(result)))
        return result


@pytest.fixture
def firm(
    ads: WorkflowHarness, queue: WorkflowHarness, postgres: Server, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Firm]:  # fmt: skip
    home, said = tmp_path / "home", io.StringIO()
    home.mkdir()
    (home / "ledger.key").write_text(MARKS["ledger key"])
    own = shutil.copytree(FOLDER, tmp_path / "workflows")
    for name in ("ad_budget", "ticket_priority"):
        text = (own / name / "workflow.yaml").read_text().replace("  push: {unit: 10000}\n", "")
        text = text.replace("  review: conformal\n", "")  # a dozen days would leave nearly every ticket to people
        text = text.replace("stale_reads_s: 0.5", "stale_reads_s: 0.05")
        unit = ", unit: 10000" if name == "ad_budget" else ""
        push = f"  push: {{patience_s: 0.5, backoff_s: [0.02, 0.05], late_s: 0.1, attempts: 2{unit}}}\n"
        (own / name / "workflow.yaml").write_text(text.replace("  guards:\n", push + "  guards:\n", 1))
    for module in (workflows, dispatch):
        monkeypatch.setattr(module, "FOLDER", own)
    shutil.copytree(ads.root / "lake", home / "lake")
    shutil.copytree(queue.root / "lake", home / "lake", dirs_exist_ok=True)
    for bench in (ads, queue):
        shutil.copytree(bench.root / "landing", home / "landing", dirs_exist_ok=True)
    benches = [WorkflowHarness(load(own / b.workflow.name), home, b.days, b.write) for b in (ads, queue)]
    account = Account(home / "sandbox" / "advertising", ads, MARKS["ads token"])
    templates = tmp_path_factory.getbasetemp() / "helpdesk-templates"
    desk = Queue(home / "sandbox" / "helpdesk", queue, MARKS["help desk token"], templates)
    gates = {
        "ads": Gate(account.environment["SIGNALBOX_ADS_ENDPOINT"]).up(),
        "desk": Gate(desk.environment["SIGNALBOX_HELPDESK_URL"]).up(),
    }
    values = {
        **account.environment, **desk.environment,
        "SIGNALBOX_HOME": str(home), "DAGSTER_HOME": str(home / "dagster"), "SIGNALBOX_WORKFLOWS": str(own),
        "SIGNALBOX_ADS_ENDPOINT": gates["ads"].url, "SIGNALBOX_HELPDESK_URL": gates["desk"].url,
        "SIGNALBOX_LEDGER_URL": role(postgres.database("marked_ledger"), "book", MARKS["ledger password"]),
        "SIGNALBOX_MLFLOW_URI": role(postgres.database("marked_mlflow"), "models", MARKS["MLflow password"]),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    registry = resources()["registry"].registry
    for shared in (ads, queue):
        promote(registry, shared.register(registry, shared.last - timedelta(days=3)))
    handler = logging.StreamHandler(said)
    # everything that anybody logs, but for httpcore: at its DEBUG it writes the headers of answers as they came
    levels = {None: logging.DEBUG, "httpcore": logging.INFO}
    before = {name: logging.getLogger(name).level for name in levels}
    logging.getLogger().addHandler(handler)
    for logger, level in levels.items():
        logging.getLogger(logger).setLevel(level)
    mornings = [
        MorningHarness(b, registry, s, None)
        for b, s in zip(benches, (account, desk), strict=True)  # type: ignore[arg-type]
    ]
    yield Firm(home, mornings[0], mornings[1], gates, monkeypatch, said)
    logging.getLogger().removeHandler(handler)
    for logger, level in before.items():
        logging.getLogger(logger).setLevel(level)
    for gate in gates.values():
        gate.down()
    account.close()
    desk.close()


def states_of(batch_id: str) -> set[str]:
    with resources()["ledger"].open(utc_now) as book:
        return {d.state for d in book.deliveries(batch_id)}


def words_in_ledger(batch_id: str) -> str:
    with resources()["ledger"].open(utc_now) as book:
        return " ".join(f"{d.state} {d.says}" for d in book.deliveries(batch_id))


def failing_deliveries(firm: Firm, name: str, morning: MorningHarness, token: str, wrong: str) -> None:
    """Through Dagster: a wrong token, nobody there, and a server that tells in its errors what it was sent."""
    gate, variable = firm.gates[name], next(k for k in morning.system.environment if k.endswith("_TOKEN"))
    with firm.patch.context() as patch:
        patch.setenv(variable, MARKS[wrong])
        said = " ".join(runner.failed_steps(firm.job(morning, "deliver")))
        assert variable in said and MARKS[wrong] not in said, said
    gate.down()
    assert not firm.job(morning, "deliver").success
    gate.up()
    for status in (500, 302):
        gate.status, before = status, gate.told
        result = firm.job(morning, "deliver")
        assert not result.success and gate.told > before, "it was never told"
    gate.writes_only = True
    for status in (500, 400):
        gate.status, before = status, gate.told
        firm.job(morning, "deliver")
        assert gate.told > before, "nothing was sent"
    for _ in range(
        20
    ):  # of an answer 500 nobody knows whether it acted: it is read and sent again, a few at a time where all fail
        if "UNKNOWN" not in states_of(morning.batch().batch_id):
            break
        firm.job(morning, "deliver")
    gate.status = 0
    gate.writes_only = False
    words = words_in_ledger(morning.batch().batch_id)
    assert "upstream said no to authorization: " in words and MARKS[token] not in words, words


def test_a_full_run_leaves_no_secret_anywhere(
    firm: Firm, ads: WorkflowHarness, queue: WorkflowHarness, capfd: pytest.CaptureFixture[str]
) -> None:
    ads_, ads, desk = ads, firm.ads, firm.desk  # type: ignore[assignment]
    for variable, nowhere in (
        ("SIGNALBOX_MLFLOW_URI", f"http://kim:{quote(MARKS['MLflow password'], safe='')}@127.0.0.1:9"),
        ("SIGNALBOX_LEDGER_URL", f"postgresql://kim:{quote(MARKS['ledger password'], safe='')}@127.0.0.1:9/none"),
    ):
        with firm.patch.context() as patch:
            patch.setenv(variable, nowhere)
            result = firm.job(desk, "decide", 2)
            assert result.success == (variable == "SIGNALBOX_MLFLOW_URI"), "a registry may be missing, the ledger not"
    lenient = {"max_total_change": None, "max_share_changed": None}
    for morning in (ads, desk):
        assert firm.job(morning, "decide", workflow=morning.saying(guardrails=lenient)).success
    failing_deliveries(firm, "ads", ads, "ads token", "wrong ads token")
    failing_deliveries(firm, "desk", desk, "help desk token", "wrong help desk token")
    for morning, shared, said in ((ads, ads_, lenient | {"max_changed": 1}), (desk, queue, lenient)):
        registry, failed = morning.registry, morning.batch().batch_id
        promote(registry, shared.register(registry, shared.last - timedelta(days=1)))
        firm.job(morning, "decide", workflow=morning.saying(guardrails=said))
        assert morning.batch().batch_id != failed
    assert (ads.batch().status, desk.batch().status) == ("HELD", "READY")
    assert checks(firm.job(desk, "deliver"))["reconciled"][0] == "passed"
    sent = desk.batch()
    request = dg.RunRequest(
        run_config={
            "ops": {"ticket_priority_take_back": {"config": {"batch": sent.batch_id, "reason": "it does harm"}}}
        }
    )
    assert runner.run_op(desk.workflow, "rollback", request, now=desk.bench.morning(desk.day, 6).isoformat()).success

    ads.system.now, batch = None, ads.batch().batch_id
    right, wrong = MARKS["approver's secret"], MARKS["secret typed by mistake"]
    firm.command("approvers", "add", "robin", typed=f"{right}\n")
    firm.command("approve", batch, "--as", "robin", "--reason", "as planned", typed=f"{wrong}\n", fails=True)
    firm.command("deliver", batch, "--late", fails=True)
    firm.command("approve", batch, "--as", "robin", "--reason", "as planned", typed=f"{right}\n")
    with firm.patch.context() as patch:
        patch.setenv("SIGNALBOX_ADS_TOKEN", MARKS["wrong ads token"])
        assert "SIGNALBOX_ADS_TOKEN" in firm.process("deliver", batch, "--late", fails=True)
    for status, how in ((500, "--late"), (401, "--dry-run")):
        firm.gates["ads"].status = status
        firm.command("deliver", batch, how, fails=True)
    firm.gates["ads"].status = 0
    firm.command("deliver", batch, "--dry-run")
    assert json.loads(firm.command("deliver", batch, "--late", "--json"))["complete"]
    row = next(d for d in ads.bench.decided(ads.day) if d["changed"])
    firm.command("explain", row["decision_id"], "--live")
    firm.command("show", batch)
    firm.command("rollback", batch, "--reason", "it does harm", "--as", "kim")
    assert json.loads(firm.command("verify", "--json", "--export", str(firm.home / "head.json")))["ok"]
    assert ads.stands() == ads.decided("before")

    found = marks_below(firm.home, MAY_HOLD)
    for variable in ("SIGNALBOX_LEDGER_URL", "SIGNALBOX_MLFLOW_URI"):
        found += marks_in_database(os.environ[variable])
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs()
        for run in runs:
            found += marks_in(f"run {run.job_name}", repr((run.run_config, run.tags)).encode())
            for entry in instance.all_logs(run.run_id):
                found += marks_in(f"event of {run.job_name}", (entry.to_json() + repr(entry)).encode())
    out, err = capfd.readouterr()
    found += marks_in("what was printed", (out + err).encode())
    found += marks_in("what was printed, raised or logged", firm.said.getvalue().encode())
    assert len(runs) > 15 and "127.0.0.1" in firm.said.getvalue(), "nothing was looked at"
    assert not found, "\n".join(sorted(set(found)))
