"""An event log (IEEE 1849) becomes rows: one an event, with what its case says, and nothing that it does not say."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.ingest import FileRefused, Raw, Snapshot, ingest, read_rows, xes
from pipeline.lake import Lake
from pipeline.workflow import Contract, Source, Workflow

HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n<log xes.version="1849-2016" xmlns="http://www.xes-standard.org/">\n'
LOG = (
    HEAD
    + """
  <extension name="Concept" prefix="concept" uri="http://www.xes-standard.org/concept.xesext"/>
  <global scope="trace"><string key="concept:name" value="UNKNOWN"/></global>
  <global scope="event"><string key="concept:name" value="UNKNOWN"/><string key="org:resource" value="nobody"/></global>
  <classifier name="Activity" keys="concept:name"/>
  <string key="concept:name" value="repairs"/>
  <trace>
    <string key="concept:name" value="case &amp; 1"/>
    <float key="amount" value="10.50"/>
    <event>
      <string key="concept:name" value="receive"/>
      <date key="time:timestamp" value="2024-05-01T10:00:00.123+02:00"/>
      <string key="org:resource" value="Ann"/>
    </event>
    <event>
      <string key="concept:name" value="repair"/>
      <date key="time:timestamp" value="2024-05-01T12:00:00Z"/>
      <int key="parts" value="007"><string key="unit" value="piece"><id key="of" value="x"/></string></int>
      <list key="steps"><values><string key="step" value="open"/><int key="step" value="2"/></values></list>
      <boolean key="done" value="true"/>
    </event>
  </trace>
  <trace><string key="concept:name" value="empty"/></trace>
  <event><string key="concept:name" value="audit"/></event>
</log>
"""
)


def _read(content: str | bytes, **fields: Any) -> Raw:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.xes")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        source = {"files": "*", "format": "xes", "sql": "x.sql", "known_at": "landing", **fields}
        return read_rows(Snapshot("a.xes", path, "", 0), Source.model_validate(source))


def _cased(*events: str, case: str = "") -> str:
    return f"{HEAD}<trace>{case}{''.join(f'<event>{e}</event>' for e in events)}</trace></log>"


def test_an_event_is_a_row_with_its_case_and_nothing_is_filled_in() -> None:
    raw = _read(LOG)
    first, second, third = ({k: v for k, v in row.items() if v is not None} for row in raw.table.to_pylist())
    case = {"case:concept:name": "case & 1", "case:amount": "10.50"}
    assert first == {
        **case, "concept:name": "receive", "time:timestamp": "2024-05-01T10:00:00.123+02:00", "org:resource": "Ann", "source_row": 1,
    }  # fmt: skip
    assert second == {
        **case, "concept:name": "repair", "time:timestamp": "2024-05-01T12:00:00Z", "parts": "007", "parts/unit": "piece",
        "parts/unit/of": "x", "steps": '[{"key": "step", "value": "open"}, {"key": "step", "value": "2"}]', "done": "true",
        "source_row": 2,
    }  # fmt: skip
    assert third == {"concept:name": "audit", "source_row": 3}
    assert (raw.rows, raw.malformed, raw.floats) == (3, [], {"case:amount"})


def test_declared_columns_are_held_against_a_log_as_against_any_file() -> None:
    raw = _read(LOG, columns=["case:concept:name", "concept:name"], extra_columns="ignore")
    assert raw.table.column_names == ["case:concept:name", "concept:name", "source_row"]
    with pytest.raises(FileRefused, match="column 'cost:total' is missing"):
        _read(LOG, columns=["cost:total"], extra_columns="ignore")
    with pytest.raises(FileRefused, match="new column"):
        _read(LOG, columns=["concept:name"])


def test_a_log_in_parts_and_in_another_encoding_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _read(LOG).table
    monkeypatch.setattr(xes, "BLOCK", 7)
    assert _read(LOG).table == whole
    assert _read(LOG.replace("UTF-8", "UTF-16", 1).encode("utf-16")).table == whole
    assert (
        _read(LOG.replace("UTF-8", "ISO-8859-1", 1).replace("Ann", "Ä").encode("latin-1"))
        .table["org:resource"][0]
        .as_py()
        == "Ä"
    )


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ('<string key="a" value="1"/><string key="a" value="2"/>', "'a' stands twice"),
        ('<string key="a"/>', "'a' has no value"),
        ('<string value="a"/>', "<string> has no key"),
        ("<note>text</note>", "<note> is no attribute"),
        ('<event><string key="id" value="T-999"/></event>', "<event> is no attribute"),
        ('<string key="a" value="1">' * 9 + "</string>" * 9, "more than 8 deep"),
    ],
)
def test_an_event_that_cannot_be_read_is_malformed_alone_with_its_text(event: str, why: str) -> None:
    fine = '<string key="id" value="fine"/>'
    raw = _read(_cased(fine, event, fine))
    ((row, text, said),) = raw.malformed
    assert (row, text) == (2, f"<event>{event}</event>") and said.startswith("line 3: ") and why in said
    assert raw.table.select(["id", "source_row"]).to_pylist() == [{"id": "fine", "source_row": n} for n in (1, 3)]


def test_a_case_that_cannot_be_read_makes_its_events_malformed_and_no_others() -> None:
    fine = '<string key="id" value="fine"/>'
    two = _cased(fine, fine, case='<string key="k"/>').replace("</log>", f"<trace><event>{fine}</event></trace></log>")
    raw = _read(two)
    assert [(m[0], m[2]) for m in raw.malformed] == [(n, "line 3: the case: 'k' has no value") for n in (1, 2)]
    assert raw.table["source_row"].to_pylist() == [3]


def test_a_key_that_event_and_case_would_both_write_is_malformed() -> None:
    raw = _read(_cased('<string key="case:id" value="1"/>', case='<string key="id" value="2"/>'))
    assert "'case:id' stands twice: the case has it, too" in raw.malformed[0][2]


_BOMB = '<!DOCTYPE log [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_BOMB + '<log><event><string key="a" value="&b;"/></event></log>', "line 1: declares a document type"),
        ('<!DOCTYPE log SYSTEM "file:///etc/passwd"><log/>', "declares a document type"),
        ('<log><event><string key="a" value="&b;"/></event></log>', "not whole XML (undefined entity)"),
        (LOG[:-30], "not whole XML"),
        (HEAD + "<group><event/></group></log>", "line 3: a <event> stands in <group>, where none belongs"),
        (HEAD + "<trace><trace><event/></trace></trace></log>", "a <trace> stands in <trace>"),
        (HEAD + '<trace><string key="a" value="b"><event/></string></trace></log>', "a <event> stands in <string>"),
        ("<pnml/>", "it starts with <pnml> where <log> is due"),
        ("id,amount\n1,2\n", "line 1: is not whole XML"),
    ],
)
def test_what_is_no_event_log_is_refused_by_name(content: str, said: str) -> None:
    with pytest.raises(FileRefused) as refused:
        _read(content)
    assert str(refused.value).startswith("a.xes: ") and said in str(refused.value)


def test_a_log_without_events_is_a_file_without_rows() -> None:
    raw = _read(HEAD + "<trace/></log>", columns=["concept:name"])
    assert (raw.rows, raw.table.column_names) == (0, ["concept:name", "source_row"])


def test_a_log_lands_through_its_sql_and_contract(tmp_path: Path) -> None:
    (tmp_path / "landing" / "repairs").mkdir(parents=True)
    (tmp_path / "landing" / "repairs" / "log.xes").write_text(LOG)
    (tmp_path / "log.sql").write_text(
        'SELECT source_row, "case:concept:name" AS case_id, "concept:name" AS activity, "time:timestamp" AS event_at FROM raw'
    )
    source = {
        "files": "*.xes", "format": "xes", "sql": "log.sql", "known_at": "landing", "extra_columns": "ignore",
        "columns": ["case:concept:name", "concept:name", "time:timestamp"],
    }  # fmt: skip
    columns = {"case_id": {"type": "VARCHAR", "required": True}, "activity": {"type": "VARCHAR"}}
    workflow = Workflow.model_construct(
        name="repairs",
        sources={"log": Source.model_validate(source)},
        contract=Contract.model_validate({"events": {"columns": columns, "unique": ["case_id", "event_at"]}}),
        folder=tmp_path,
    )
    lake = Lake(str(tmp_path / "lake"))
    found = ingest(workflow, lake, tmp_path / "landing", now=datetime(2024, 5, 2))
    assert (found.accepted, found.rules) == (2, {"required:case_id": 1})
    times = {e["activity"]: e["event_at"] for e in lake.read("repairs/events").to_pylist()}
    assert times == {"receive": datetime(2024, 5, 1, 8, 0, 0, 123000), "repair": datetime(2024, 5, 1, 12)}
