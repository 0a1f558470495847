"""Digests stand for names: keyed, equal for equal names, and without the key's bytes anywhere."""

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delivery.ledger.pseudonyms import ERASED, MARK, People, digests_in, eraser, unsealed

NAMES = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


@given(st.binary(min_size=16, max_size=200), NAMES)
def test_a_digest_is_the_start_of_an_hmac(key: bytes, name: str) -> None:
    assert People(key).digest("entity", name) == hmac.digest(key, b"entity\0" + name.encode(), "sha256").hex()[:32]


def test_kinds_and_keys_keep_equal_names_apart() -> None:
    one, other = People(b"k" * 16), People(b"l" * 16)
    assert len({one.digest("entity", "ann"), one.digest("person", "ann"), other.digest("person", "ann")}) == 3


def test_a_short_key_is_refused_and_none_is_shown() -> None:
    with pytest.raises(ValueError, match="16 random bytes"):
        People(b"short")
    assert "secret" not in repr(People(b"secret-secret-secret"))


def test_the_names_in_a_body_become_digests() -> None:
    people = People(b"k" * 16)
    body, mapping = people.sealed({"actor": "ann", "workflow": "ad_budget", "entity": "line-1", "approver": None})
    assert body == {
        "actor": people.digest("person", "ann"),
        "workflow": "ad_budget",
        "entity": people.digest("entity", "line-1"),
        "approver": None,
    }
    assert mapping == [(body["actor"], "person", "ann"), (body["entity"], "entity", "line-1")]


def test_names_in_lists_and_below_a_bodys_own_keys_become_marked_digests_and_come_back() -> None:
    people = People(b"k" * 16)
    body = {
        "examples": ["zoe", "bob", None],
        "evidence": {"entities": ["zoe"], "person": "ann", "deeper": [{"entity": "line-1", "rule": "zoe"}], "n": 1},
        "findings": [{"name": "change", "examples": []}],
    }
    sealed, mapping = people.sealed(body)
    assert "zoe" not in repr([sealed["examples"], sealed["evidence"]["entities"]])
    assert sealed["examples"] == [MARK + people.digest("entity", "zoe"), MARK + people.digest("entity", "bob"), None]
    assert sealed["evidence"]["person"] == MARK + people.digest("person", "ann")
    assert sorted(digests_in(sealed)) == sorted(digest for digest, _, _ in mapping)
    known = {digest: name for digest, _, name in mapping}
    assert unsealed(sealed, known) == body
    assert people.sealed({"below": sealed}) == ({"below": sealed}, []), "what is sealed stays as it is"
    del known[people.digest("entity", "zoe")]
    assert unsealed(sealed, known)["examples"] == [ERASED, "bob", None]
    assert people.sealed({"examples": [ERASED]}) == ({"examples": [ERASED]}, []), "nobody is called so"


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("zoe@example.org (120) and bob (90) share budget-1", "(erased) (120) and bob (90) share budget-1"),
        ("set by Zoe@Example.ORG.", "set by (erased)."),
        ("xzoe@example.org and zoe@example.orgs are others", "xzoe@example.org and zoe@example.orgs are others"),
        ("zoe@example.org", "(erased)"),
    ],
)
def test_a_name_is_erased_from_words_where_it_is_a_word_of_its_own(words: str, left: str) -> None:
    assert eraser(["zoe@example.org"])(words) == left


def test_an_eraser_of_nothing_changes_nothing() -> None:
    assert eraser([])("words") == eraser([""])("words") == "words"
