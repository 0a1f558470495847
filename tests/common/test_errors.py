"""One family of errors: whatever a person may read of us derives from it, and holds no secret."""

import importlib
import inspect
from pathlib import Path
from urllib.parse import quote

import pytest

from common.errors import SignalboxError, first_line, redacted

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "data_checks", "delivery", "models", "pipeline", "assets", "orchestration")
OUTSIDE = {
    "delivery.sandbox.advertising_api.Refused": "an answer of a stand-in, as HTTP",
    "delivery.sandbox.advertising_query.QueryError": "an answer of a stand-in, as HTTP",
}
"""Public exceptions that nobody reads as ours → why."""
SECRET = "planted/secret+of:the day"


def public_errors() -> dict[str, type[BaseException]]:
    found = {}
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            if "migrations" in file.parts or "class " not in file.read_text():
                continue
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for one in vars(importlib.import_module(name)).values():
                own = inspect.isclass(one) and one.__module__ == name and not one.__name__.startswith("_")
                if own and issubclass(one, BaseException):
                    found[f"{name}.{one.__name__}"] = one
    return found


def test_every_public_error_is_of_the_family() -> None:
    errors = public_errors()
    strangers = {name for name, one in errors.items() if not issubclass(one, SignalboxError)}
    assert len(errors) > 40 and strangers == set(OUTSIDE), strangers ^ set(OUTSIDE)


def test_no_error_lets_a_secret_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_ADS_TOKEN", SECRET)
    text = f"GET https://kim:hunter2@ads/x?key={quote(SECRET, safe='')} with {SECRET}: refused"
    plain = [one for one in public_errors().values() if one.__init__ is SignalboxError.__init__]
    assert len(plain) > 30
    for one in plain:
        error = one(text)
        for shown in (str(error), repr(error), repr(error.args)):
            assert SECRET not in shown and quote(SECRET, safe="") not in shown and "hunter2" not in shown, shown
        assert "refused" in str(error) and "ads" in str(error)


def test_of_a_strangers_error_the_first_line_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert first_line(OSError(f"postgresql://u:p@h {SECRET}\nmore")) == "postgresql://…@h …"


@pytest.mark.parametrize("name", ["SIGNALBOX_WORKFLOWS", "MONKEY_BUSINESS", "TOKENS_ALLOWED"])
def test_a_variable_that_is_no_secret_is_left_in_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ordinary-value")
    assert redacted("an ordinary-value") == "an ordinary-value"


def test_a_short_value_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_ADS_TOKEN", "refused")
    assert redacted("it was refused") == "it was refused"
