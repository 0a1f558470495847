"""No property test is random in CI: a red run stays red, a green one was not lucky."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import properties

ROOT = Path(__file__).parents[1]
DECIDED_IN_ONE_PLACE = {"derandomize", "database", "deadline", "print_blob", "parent", "backend"}
PROFILES = {"register_profile", "load_profile"}
in_ci = pytest.mark.skipif(bool(properties.SOAK), reason="a soak is random on purpose")


def names_of(path: Path) -> list[tuple[int, str]]:
    """What a test module says of its own about randomness: lines and names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given_ = {one.arg or "**" for one in node.keywords}
        if called == "settings" and "max_examples" in given_:
            found += [(node.lineno, name) for name in sorted(given_ & DECIDED_IN_ONE_PLACE)]
        found += [(node.lineno, called)] if called in PROFILES else []
        true = [one for one in node.keywords if one.arg == "use_true_random" and ast.unparse(one.value) != "False"]
        found += [(node.lineno, "use_true_random") for _ in true]
    return found


def test_nothing_but_the_profile_decides_what_is_random() -> None:
    wrong = {
        f"{path.relative_to(ROOT)}:{line}": name
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path not in (Path(properties.__file__), ROOT / "tests" / "conftest.py")
        for line, name in names_of(path)
    }
    assert not wrong, wrong


@in_ci
def test_every_property_begins_with_the_profile() -> None:
    for one in (settings(), settings(max_examples=3), settings.get_profile("ci")):
        assert one.derandomize and one.database is None and one.deadline is None


@in_ci
def test_a_property_of_this_run_is_not_random(request: pytest.FixtureRequest) -> None:
    """Of every test module that was collected, state machines too."""
    found = 0
    for item in request.session.items:
        test = getattr(item, "obj", None)
        used = getattr(test, "_hypothesis_internal_use_settings", None)
        machine = getattr(getattr(item, "cls", None), "settings", None)
        for one in (used, machine):
            if isinstance(one, settings):
                found += 1
                assert one.derandomize, item.nodeid
    assert found


@in_ci
def test_a_property_tries_the_same_examples_every_time() -> None:
    seen: list[list[int]] = []

    @given(st.integers())
    def tries(number: int) -> None:
        seen[-1].append(number)

    for _ in range(2):
        seen.append([])
        tries()
    assert seen[0] == seen[1] and len(set(seen[0])) > 10


def test_a_soak_tries_others_and_more_of_them() -> None:
    program = (
        "from tests.support import properties; properties.load_profile(); from hypothesis import settings; "
        "print(settings().derandomize, settings().max_examples, properties.examples(8))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"SIGNALBOX_SOAK": "25", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.split() == ["False", "2500", "200"]


@given(st.booleans())
def test_this_module_has_a_property_to_look_at(either: bool) -> None:
    assert either in (True, False)
