"""Hashes of the ledger: canonical text, unambiguous rows, and a Merkle tree that is the published one."""

import hashlib
from datetime import date, datetime

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from delivery.ledger import hash_chain

LEAVES = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40, unique=True)


def test_canonical_text_does_not_depend_on_order_and_keeps_what_json_cannot() -> None:
    assert hash_chain.canonical({"b": 1, "a": [1.0, None, "ü"]}) == '{"a":[1,null,"ü"],"b":1}'
    assert hash_chain.canonical({"n": 2**60, "d": date(2026, 1, 2), "x": float("inf")}) == (
        '{"d":"2026-01-02","n":"1152921504606846976","x":"inf"}'
    )
    with pytest.raises(TypeError, match="cannot hold a bytes"):
        hash_chain.canonical({"a": b"x"})


def test_an_event_hash_changes_with_everything_in_it() -> None:
    at = datetime(2026, 4, 11, 4)
    first = hash_chain.event_hash(hash_chain.NOTHING, 1, at, "note", "{}")
    others = {
        hash_chain.event_hash(first, 1, at, "note", "{}"),
        hash_chain.event_hash(hash_chain.NOTHING, 2, at, "note", "{}"),
        hash_chain.event_hash(hash_chain.NOTHING, 1, at.replace(microsecond=1), "note", "{}"),
        hash_chain.event_hash(hash_chain.NOTHING, 1, at, "switch", "{}"),
        hash_chain.event_hash(hash_chain.NOTHING, 1, at, "note", '{"a":1}'),
    }
    assert len(others) == 5 and first not in others


def split_from_above(leaves: list[bytes]) -> bytes:
    """The tree as RFC 6962 defines it, word by word."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + split_from_above(leaves[:k]) + split_from_above(leaves[k:])).digest()


@given(LEAVES)
def test_the_root_is_that_of_rfc_6962(leaves: list[bytes]) -> None:
    assert hash_chain.merkle_root(leaves) == split_from_above(leaves).hex()


def test_the_root_of_known_leaves_is_the_published_one() -> None:
    # Certificate Transparency's own test vectors.
    data = [b"", b"\x00", b"\x10", b"\x20\x21", b"\x30\x31", b"\x40\x41\x42\x43"]
    leaves = [hashlib.sha256(b"\x00" + d).digest() for d in data]
    assert hash_chain.merkle_root([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hash_chain.merkle_root(leaves[:1]) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert hash_chain.merkle_root(leaves[:3]) == "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"
    assert hash_chain.merkle_root(leaves) == "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"


TEXT = st.none() | st.text(alphabet=":-0123ab", max_size=4)
WHOLE = st.none() | st.integers(-(2**63), 2**63 - 1)
REAL = st.none() | st.floats(allow_nan=False)
ROWS = st.lists(st.tuples(TEXT, TEXT, WHOLE, REAL), min_size=2, max_size=6)
COLUMNS = {"a": pa.string(), "b": pa.string(), "c": pa.int64(), "d": pa.float64()}


@given(ROWS)
@example([("a:", "b", 1, 0.5), ("a", ":b", 1, 0.5)])
@example([("", "-", 1, 0.5), (None, None, 1, 0.5), ("-", "", 1, 0.5), (None, "", 1, 0.5)])
@example([("a", "b", None, 0.5), ("a", "b", -1, 0.5), ("a", "b", -1, None), ("a", "b", -1, 0.0), ("a", "b", -1, -0.0)])
def test_two_rows_encode_alike_only_when_they_are_equal(rows: list[tuple[object, ...]]) -> None:
    table = pa.table({name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(COLUMNS.items())})
    encoded = hash_chain.encode_rows(table)
    bits = [(*row[:3], None if row[3] is None else float(row[3]).hex()) for row in rows]  # type: ignore[arg-type]
    for x, a in zip(encoded, bits, strict=True):
        for y, b in zip(encoded, bits, strict=True):
            assert (x == y) == (a == b)


def test_leaves_do_not_depend_on_how_the_table_is_cut() -> None:
    table = pa.table({"a": ["x", "", None, "y"], "b": [1.0, None, -0.5, 2.0]})
    whole = hash_chain.leaf_hashes(table)
    assert (
        hash_chain.leaf_hashes(table, chunk=1)
        == whole
        == hash_chain.leaf_hashes(pa.concat_tables([table[:1], table[1:]]))
    )
    assert len(set(whole)) == 4
