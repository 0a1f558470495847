"""The base of every page: escaped, offline, the same bytes; and there is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.page import Field, Form, Link, Picture, Table, Text, page, shown

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "models", "data_checks", "delivery", "pipeline", "assets", "orchestration", "sandbox")
NASTY = '<script>alert("1")</script>&'


def test_a_value_from_the_data_is_text_wherever_it_stands() -> None:
    made = page(
        NASTY,
        Text([NASTY]),
        Text([NASTY], bullets=True),
        Picture(NASTY, b"png"),
        Table([NASTY], [("bad", [NASTY])], title=NASTY, note=NASTY),
    )
    assert "<script" not in made and 'alert("' not in made
    # title and heading, paragraph, list, picture, label, column, cell, title, note
    assert made.count("&lt;script&gt;") == 10


def test_a_page_asks_nothing_of_the_network_and_is_the_same_bytes_again() -> None:
    parts = (Text(["one"]), Table(["a"], [("", [1.0])]), Picture("p", "<svg></svg>"))
    made = page("A page", *parts)
    assert made == page("A page", *parts)
    assert "://" not in made and "default-src 'none'" in made and "<svg></svg>" in made
    assert made.startswith("<!DOCTYPE html>\n") and made.endswith("</html>\n")


def test_a_table_with_a_title_and_no_row_is_left_out() -> None:
    assert "Largest" not in page("t", Table(["a"], [], title="Largest"))
    assert "a</th>" in page("t", Table(["a"], []))


def test_numbers_stand_right_short_and_truth_values_do_not() -> None:
    made = page("t", Table(["a"], [("good", [1 / 3, 7, None, True])], digits=3))
    assert '<tr class="good"><td class="n">0.333</td><td class="n">7</td><td>–</td><td>True</td></tr>' in made


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (1 / 3, "0.333333"),
        ({"a": None, "b": 0.5}, "a –, b 0.5"),
        ([1, (2.25, "x")], "1, 2.25, x"),
        (True, "True"),
    ],
)
def test_a_value_reads_short(value: object, text: str) -> None:
    assert shown(value) == text


@given(st.text())
def test_no_text_opens_an_element(text: str) -> None:
    empty = re.findall(r"<[^>]*>", page("t", Table(["a"], [("", [""])])))
    assert re.findall(r"<[^>]*>", page("t", Table(["a"], [("", [text])]))) == empty


def test_there_is_one_base() -> None:
    own = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if re.search(r"<!doctype|<(html|table|td|h1|style)\b", path.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert own == [], "a page is made of the parts of common.page"


def test_a_link_is_one_that_we_made_and_no_value_from_the_data() -> None:
    made = page(
        "t", Table(["a"], [("", [Link(NASTY, "/x"), {"href": "javascript:x", "text": "y"}])]), nav=[Link("Home", "/")]
    )
    assert re.findall(r"<a [^>]*>", made) == ['<a href="/">', '<a href="/x">']


def test_a_form_carries_what_it_was_given_and_keeps_no_secret() -> None:
    form = Form("/act", "Go", [Field("reason", NASTY), Field("secret", "Secret", "password")], {"token": '"t"'})
    made = page("t", form)
    assert (
        'action="/act"' in made
        and 'value="&#34;t&#34;"' in made
        and 'type="password" value="" autocomplete="off"' in made
    )
    assert "form-action 'self'" in made
