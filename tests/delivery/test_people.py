"""Digests stand for names: keyed, equal for equal names, and without the key's bytes anywhere."""

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delivery.people import People

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
